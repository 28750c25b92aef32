"""Code that reads at a glance: limits on functions, lines, signatures and cells, with lists of exceptions that may only shrink."""
import ast
import json
import statistics

import pytest
from conftest import COMPONENTS, MODULES, RUNNERS, place

NODES, WIDTH = 250, 110                      # syntax nodes of a function without its docstring; characters of a line
# by position, because transformers calls or overrides them so, and because the arguments of a command are places
GIVEN = {"method/model Forward.forward", "method/connector MedVLM3DConfig.__init__", "method/keeping Keeping.save_pretrained",
         "front/cli answer"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def functions(tree, prefix=""):
    "(qualified name, node) of every function and method."
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + node.name, node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from functions(node, f"{prefix}{node.name}.")
        elif not isinstance(node, ast.expr):
            yield from functions(node, prefix)


def size(function):
    "Syntax nodes of a function's body without its docstring."
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return sum(1 for statement in body for _ in ast.walk(statement))


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
FUNCTIONS = {f"{place(path)} {name}": node for path, tree in TREES.items() for name, node in functions(tree)}


def test_functions_can_be_taken_in():
    large = {name for name, node in FUNCTIONS.items() if size(node) > NODES}
    assert not large


def middle_and_most(numbers):
    "The median, and the number that nine of ten do not exceed."
    return statistics.median(numbers), statistics.quantiles(numbers, n=10)[-1]


def test_most_functions_are_small():
    middle, most = middle_and_most([size(node) for node in FUNCTIONS.values()])
    assert middle <= 50 and most <= 150, f"median {middle}, nine of ten {most}: name one idea of a large function"


def test_an_exported_cell_is_one_idea():
    middle, most = middle_and_most(
        [sum(bool(line.strip()) for line in source.splitlines())
         for path in COMPONENTS for source in code_cells(path) if source.startswith("#| export")])
    assert middle <= 12 and most <= 24, f"median {middle} lines, nine of ten {most}"


def parameters(function):
    "Names of the parameters that may be given by position, and of all; without self."
    given = [a.arg for a in function.args.posonlyargs + function.args.args if a.arg not in ("self", "cls")]
    return given, [*given, *(a.arg for a in function.args.kwonlyargs)]


def test_long_signatures_are_keyword_only_after_the_second_parameter():
    wrong = set()
    for name, node in FUNCTIONS.items():
        given, every = parameters(node)
        if len(every) > 4 and len(given) > 2 and not node.args.vararg: wrong.add(name)
    assert wrong == GIVEN, "take them by keyword"


def code_cells(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not source.startswith("%%"):
            yield "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())


@pytest.mark.parametrize("path", [*MODULES, *RUNNERS], ids=place)
def test_no_call_tells_six_things_by_their_place(path):
    trees = [TREES[path]] if path in TREES else [ast.parse(source) for source in code_cells(path)]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [ast.unparse(call) for call in calls if len(call.args) >= 6]


def test_comprehensions_are_one_deep():
    nested = sum(any(isinstance(inner, COMPREHENSIONS) for inner in ast.walk(node) if inner is not node)
                 for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, COMPREHENSIONS))
    lines = sum(bool(line.strip()) for path in MODULES for line in path.read_text(encoding="utf-8").splitlines())
    assert nested / lines * 100 <= .3


def test_lines_fit_a_page():
    "Not counted: what nbdev writes (`__all__`), and the sentence of a notebook that becomes the docstring of its module."
    wide = {}
    for path in COMPONENTS:
        count = sum(len(line) > WIDTH for source in code_cells(path) for line in source.splitlines())
        if count: wide[place(path)] = count
    assert not wide


def test_there_is_one_way_to_a_pool():
    "A worker that is started elsewhere would outlive a killed parent."
    for path, tree in TREES.items():
        names = {alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        assert not names & {"ProcessPoolExecutor", "ThreadPoolExecutor", "multiprocessing"} or place(path) == "base/pool", place(path)


def test_there_is_one_table_writer():
    "Escapes for terminals, pages and spreadsheets stand in one place; readers of CSV are free."
    for path, tree in TREES.items():
        used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.ImportFrom))}
        assert not used & {"csv.writer", "csv.DictWriter", "from html import escape"} or place(path) == "base/table", place(path)
