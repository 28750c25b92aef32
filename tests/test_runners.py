"""A parameter given to a runner arrives, or the run does not start."""
import ast
import re

import nbformat
import pytest
import yaml
from conftest import ROOT, RUNNERS

from medvlm3d.base.core import MedVLM3DError
from medvlm3d.base.values import fits
from medvlm3d.front import runners
from medvlm3d.front.runners import check_parameters, read_plan, run_notebook, runner_parameters

PLANS = sorted((ROOT/"runs").glob("*.yaml"))


def code_after_parameters(path):
    "The code cells above and below the parameters cell, as syntax trees."
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    sources = [(c.source, "parameters" in c.metadata.get("tags", [])) for c in cells]
    at = next(i for i, (_, tagged) in enumerate(sources) if tagged)
    return [ast.parse(s) for s, _ in sources[:at]], [ast.parse(s) for s, _ in sources[at + 1:]]


@pytest.mark.parametrize("path", RUNNERS, ids=lambda p: p.stem)
def test_each_parameter_is_read_and_none_is_overwritten(path):
    above, below = code_after_parameters(path)
    names = [n for tree in below for n in ast.walk(tree) if isinstance(n, ast.Name)]
    read = {n.id for n in names if isinstance(n.ctx, ast.Load)}
    written = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    parameters = set(runner_parameters(path))
    assert parameters and parameters <= read, f"never read: {sorted(parameters - read)}"
    assert not parameters & written, f"overwritten: {sorted(parameters & written)}"
    assert not parameters & {n.id for tree in above for n in ast.walk(tree) if isinstance(n, ast.Name)}


@pytest.mark.parametrize("path", RUNNERS, ids=lambda p: p.stem)
def test_wrong_parameters_stop_the_run_before_it_starts(path, tmp_path):
    name, default = next(iter(runner_parameters(path).items()))
    with pytest.raises(MedVLM3DError, match="unknown"): run_notebook(path, {name + "s": default}, tmp_path)
    with pytest.raises(MedVLM3DError, match="unknown"): run_notebook(path, {"no_such_parameter": 1}, tmp_path)
    typed = {k: v for k, v in runner_parameters(path).items() if v is not None}
    for key in typed:
        with pytest.raises(MedVLM3DError, match="expects"): check_parameters(path, {key: object()})
    assert not list(tmp_path.rglob("*.ipynb"))


@pytest.mark.parametrize("path", RUNNERS, ids=lambda p: p.stem)
def test_defaults_are_accepted(path):
    assert check_parameters(path, runner_parameters(path))


def call_problems(sources, parameters):
    """Calls of the library in a runner's cells in which two values could be swapped without an error.

    Arguments are passed by keyword, at most the first by position; a keyword that is named like a parameter
    of the runner gets that parameter."""
    nodes = [n for source in sources for n in ast.walk(ast.parse(source))]
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("medvlm3d")]
    library = {alias.asname or alias.name for n in imports for alias in n.names}
    problems = []
    for call in (n for n in nodes if isinstance(n, ast.Call) and base_name(n.func) in library):
        name = ast.unparse(call.func)
        if len(call.args) > 1: problems.append(f"{name} gets {len(call.args)} arguments by position")
        for keyword in call.keywords:
            given = {n.id for n in ast.walk(keyword.value) if isinstance(n, ast.Name)} & {*parameters}
            if keyword.arg in parameters and given and keyword.arg not in given:
                problems.append(f"{name} gets {', '.join(sorted(given))} as {keyword.arg}")
    return problems


def base_name(node):
    "The name that a called expression such as `a.b.c` begins with, or None."
    while isinstance(node, ast.Attribute): node = node.value
    return node.id if isinstance(node, ast.Name) else None


@pytest.mark.parametrize("path", RUNNERS, ids=lambda p: p.stem)
def test_the_library_is_called_by_keyword(path):
    sources = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    assert not call_problems(sources, runner_parameters(path))


@pytest.mark.parametrize("call, problem", [
    ("train(out=out, lr=lr, volume_lr=volume_lr)", None),
    ("train(out, lr=lr, volume_lr=volume_lr)", None),
    ("train(root()/out, lr=lr, rate=volume_lr)", None),
    ("train(out, lr, volume_lr=volume_lr)", "train gets 2 arguments by position"),
    ("train(out=out, lr=volume_lr, volume_lr=lr)", "train gets volume_lr as lr"),
    ("train(out=out, lr=2 * volume_lr)", "train gets volume_lr as lr"),
    ("Plan.of(out=out, setup=Plan(lr=volume_lr))", "Plan gets volume_lr as lr"),
    ("Plan.of(out, lr)", "Plan.of gets 2 arguments by position"),
    ("print(out, lr)", None)])
def test_a_swapped_call_is_noticed(call, problem):
    imports = "from pathlib import Path as root\nfrom medvlm3d.training.plan import Plan, train"
    sources = [imports, f"result = {call}"]
    found = call_problems(sources, {"out": "reports/tiny", "lr": .003, "volume_lr": .002})
    assert problem in found if problem else not found


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_plan_is_valid_yaml(path):
    "Each plan is safe YAML; those that name runners pass the gate."
    plan = yaml.safe_load(path.read_text())
    assert isinstance(plan, dict)
    if all(str(name)[:2].isdigit() for name in plan): assert read_plan(path)


def test_a_failing_item_does_not_end_an_evaluation_and_a_lost_one_does():
    "The last cell of 92_evaluate."
    check = nbformat.read(ROOT/"nbs"/"runners"/"92_evaluate.ipynb", 4).cells[-1].source
    asked = {"closed": 20, "open": 20, "report": 4}
    def system(answered, failed, report=4):
        return {"items": {**asked, "report": report, "answered": answered, "failed": failed, "cases": 4}}
    def run(**systems):
        systems = {"model": system(43, 1), "chance": {"items": {"closed": 20}}, **systems}
        exec(check, {"results": {"asked": asked, "systems": systems}})
    run(other=system(40, 0, report=0))
    for lost in ({"other": system(43, 0)}, {"model": system(40, 0, report=0)}, {"model": system(0, 44)}):
        with pytest.raises(AssertionError): run(**lost)


def write_runner(path, parameters, *sources):
    "A runner notebook of these code cells, the first with the parameters; returns its path."
    cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def test_parameter_arrives(tmp_path):
    "End to end through papermill: default, given value, injected cell; the record holds no path of this machine."
    source = write_runner(tmp_path/"95_arrive.ipynb", "depth = 3\nname = 'a'",
                          "import os\nprint(name * depth, os.getcwd())")
    record = run_notebook(source, {"depth": 5}, tmp_path/"out", show=False)
    value, folder = nbformat.read(record, 4).cells[-1].outputs[0].text.split()
    assert value == "aaaaa" and folder.endswith(tmp_path.name), "a runner works in its own folder"
    assert str(ROOT) not in record.read_text() and str(tmp_path) not in record.read_text()


def test_a_dead_kernel_is_one_error_and_the_record_holds_what_ran(tmp_path):
    source = write_runner(tmp_path/"95_die.ipynb", "depth = 3", "print('so far', depth)",
                          "import os\nos.kill(os.getpid(), 9)", "print('never')")
    with pytest.raises(MedVLM3DError, match="its kernel died") as e:
        run_notebook(source, {"depth": 5}, tmp_path/"out", show=False)
    assert e.value.what.endswith("95_die.ipynb") and "start again" in e.value.remedy
    cells = nbformat.read(tmp_path/"out"/"notebooks"/"95_die.ipynb", 4).cells
    texts = [output.text for cell in cells for output in cell.get("outputs", []) if "text" in output]
    assert texts == ["so far 5\n"]


@pytest.mark.parametrize("changes, message", [
    ({"trian": 3}, "Did you mean 'train'?"), ({"no_such": 1}, "It takes: "),
    ({"stage1_lr": "fast"}, "expects a number"), ({"batch": 2.5}, "expects a whole number"),
    ({"forms": "bth"}, "Did you mean 'both'?"), ({"ablation": 7}, "Give a text"), ({"scans": [1]}, "each a text"),
    ({"deepspeed": True}, "a text or nothing")], ids=str)
def test_a_plan_is_checked_whole_before_its_first_runner(changes, message, tmp_path, monkeypatch):
    "Also a value for the last runner of the plan, which would start hours later."
    monkeypatch.setattr(runners, "run_notebook", lambda *_: pytest.fail("a runner was started"))
    with pytest.raises(MedVLM3DError, match=re.escape(message)): runners.run_plan("demo", tmp_path, tell=lambda _: None, **changes)


@pytest.mark.parametrize("path", RUNNERS, ids=lambda p: p.stem)
def test_choices_of_a_runner_hold_its_default(path):
    "What a parameters cell declares is a kind that takes its own default, and refuses something else."
    for name, kind in runners.runner_kinds(path).items():
        assert fits(runner_parameters(path)[name], kind), name
        assert runner_parameters(path)[name] is None or not fits(object(), kind), name
