"""What stands on a command line is used, or refused by name: every verb, every option, every mode."""
import ast
import inspect
import textwrap
from enum import Enum
from typing import get_args

import pytest
import yaml
from conftest import ROOT
from typer.main import get_command
from typer.testing import CliRunner

from medvlm3d.base.core import MedVLM3DError
from medvlm3d.front import runners
from medvlm3d.front.cli import app
from medvlm3d.front.options import refuse_unused, spelled


def walk(command, path=()):
    "(words, command) of every verb, from the command line's own definition."
    for name, inner in getattr(command, "commands", {}).items(): yield from walk(inner, (*path, name))
    if not hasattr(command, "commands"): yield " ".join(path), command


VERBS = dict(walk(get_command(app)))


def modes_of(verb): return getattr(VERBS[verb].callback, "modes", ())


def options_of(verb): return [p for p in VERBS[verb].params if p.name != "help"]


def choices_of(annotation):
    "The values of the Enum in an annotation such as `Annotated[Optional[list[Kind]], …]`; none of another type."
    if isinstance(annotation, type) and issubclass(annotation, Enum): return [member.value for member in annotation]
    return next(filter(None, map(choices_of, get_args(annotation))), [])


def words_of(verb, parameter):
    "Words that give a parameter a value."
    declared = inspect.signature(inspect.unwrap(VERBS[verb].callback)).parameters[parameter.name]
    value = (choices_of(declared.annotation) or ["1"])[0]
    if parameter.param_type_name == "argument": return [value]
    if getattr(parameter, "is_flag", False): return [(parameter.secondary_opts if parameter.default is True else parameter.opts)[0]]
    return [max(parameter.opts, key=len), *[value] * parameter.nargs]


def context_of(verb, words, option=None):
    "The context of a call with `words`, what the verb requires, and an option."
    required = [w for p in options_of(verb) if p.required and p is not option for w in words_of(verb, p)]
    given = [] if option is None else words_of(verb, option)
    return VERBS[verb].make_context(verb, [*required, *words, *given])


PAIRS = [(verb, mode) for verb in VERBS for mode in modes_of(verb)]


@pytest.mark.parametrize("verb, mode", PAIRS, ids=[f"{v}, {m.name}" for v, m in PAIRS])
def test_an_option_that_a_mode_does_not_read_is_refused_with_the_mode(verb, mode):
    "Each option of the verb: refused by its name and that of the mode, or read by all modes that apply."
    assert mode.applies(context_of(verb, mode.example).params), "the example does not choose the mode"
    for option in options_of(verb):
        try: context = context_of(verb, mode.example, option)
        except Exception: continue                       # given twice: the option is part of the example
        if option.name in context_of(verb, mode.example).params and not mode.applies(context.params): continue
        if mode.reads(option.name): continue
        with pytest.raises(MedVLM3DError) as refused: refuse_unused(context, modes_of(verb))
        assert spelled(context, option.name) == refused.value.what and "is not used by" in refused.value.why


@pytest.mark.parametrize("verb", [v for v in VERBS if modes_of(v)])
def test_every_option_counts_somewhere(verb):
    listed = [m for m in modes_of(verb) if m.uses is not None]
    names = {p.name for p in options_of(verb)}
    assert not listed or {name for m in listed for name in m.uses} == names
    assert not any(m.reads("a new option") for m in listed), "what is new is refused until a mode lists it"
    assert all(spelled(context_of(verb, ()), name) for name in names)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_reads_every_option_before_it_can_leave(verb):
    """In the body of a verb each parameter is read; and where an `if` on a parameter leaves the verb, the others
    were read before, or modes say which of them count."""
    function = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(VERBS[verb].callback)))).body[0]
    names = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}
    def read(nodes): return {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)} & names
    assert read(function.body) == names
    if any(m.uses is not None for m in modes_of(verb)): return
    for i, line in enumerate(function.body):
        if not isinstance(line, ast.If) or not any(isinstance(n, ast.Return) for n in ast.walk(line)): continue
        assert not read([line.test]) or read(function.body[:i + 1]) == names, ast.unparse(line.test)


# --- what was dropped -----------------------------------------------------------------------------------------------

@pytest.fixture
def started(monkeypatch):
    "What would run: (runner, parameters), each checked."
    calls = []
    def record(name, given, out, *_):
        calls.append((name, runners.check_parameters(name, given)))
        return out/"notebooks"/f"{name}.ipynb"
    monkeypatch.setattr(runners, "run_notebook", record)
    return calls


def call(*words):
    "The error of a command line, or None."
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0 or isinstance(result.exception, MedVLM3DError), (result.exception, result.output)
    return None if result.exit_code == 0 else str(result.exception)


@pytest.mark.parametrize("words, names", [
    (["train", "--preset", "paper", "--out", "f", "-p", "stage1_rate=0.5"], ["stage1_rate", "unknown to this plan"]),
    (["train", "--preset", "paper", "--dry-run", "-p", "bach=1"], ["bach", "Did you mean 'batch'?"]),
    (["train", "--preset", "paper", "--dry-run", "--data", "x", "-p", "data=y"], ["-p data", "--data too"]),
    (["train", "--preset", "paper", "--out", "f", "--config", "ablate"], ["--config", "with --preset"]),
    (["train", "--config", "demo", "--dry-run"], ["--config", "with --dry-run"]),
    (["train", "--rate", "3"], ["--rate", "without --preset"]),
    (["train", "--preset", "paper", "--out", "f", "--ranks", "2", "--gpus", "8"], ["--gpus", "--ranks"]),
    (["train", "--preset", "paper", "--out", "f", "--allow-shared"], ["--allow-shared", "Give --start"]),
    (["evaluate", "--predictions", "f.csv", "-p", "nonsense=1"], ["--set", "with --predictions"]),
    (["evaluate", "--predictions", "f.csv", "--config", "nosuch"], ["--config", "with --predictions"]),
    (["evaluate", "--layer", "3"], ["--layer", "without --predictions"]),
    (["evaluate", "--config", "ablate"], ["has nothing for 92_evaluate", "93_ablate"]),
    (["demo", "-p", "trian=3", "-p", "no_such=1"], ["trian", "Did you mean 'train'?"]),
    (["demo", "-p", "ablation=3"], ["ablation", "Give a text"]),
    (["demo", "--llm", "smollm2", "-p", "llm=reader"], ["-p llm", "--llm too"]),
    (["train", "-p", "seed=1", "-p", "seed=2"], ["-p seed", "given twice"]),
    (["train", "-p", "stage1_lr=["], ["-p stage1_lr", "not valid YAML"]),
    (["train", "--config", "dmo"], ["Did you mean 'demo'?"]),
    (["features", "a", "b", "--seed", "3"], ["--seed", "random"]),
    (["fetch", "--list", "wordnte"], ["wordnte", "Did you mean 'wordnet'?"]),
    (["data", "folder", "x", "--show", "1", "--out", "y"], ["--out", "with --show"]),
    (["data", "verify", "x", "--no-images", "--near-image", ".9"], ["--near-image", "with --no-images"]),
    (["data", "split", "x", "--tie", "bytes", "--near-text", ".3"], ["--near-text", "near text"]),
    (["data", "split", "x", "--tie", "patient"], ["--tie patient", "--by"]),
], ids=lambda v: " ".join(v) if isinstance(v, list) else v)
def test_nothing_given_is_dropped(words, names, started):
    error = call(*words)
    assert error and all(name in error for name in names), error
    assert not started


def test_numbers_in_any_spelling_reach_the_runner(started):
    assert call("train", "-p", "stage1_lr=1e-3", "-p", "stage2_lr=5E-4") is None
    assert started[0][1]["stage1_lr"] == 1e-3 and started[0][1]["stage2_lr"] == 5e-4


def test_options_of_train_are_used_without_a_preset(started, tmp_path):
    "The corpus, the store and the language model that are given are those of the run; nothing of the demonstration comes along."
    assert call("train", "--data", tmp_path/"x", "--store", tmp_path/"y", "--llm", "own", "--out", tmp_path/"r", "--ranks", 2) is None
    (name, given), = started
    assert name == "91_train" and given["ranks"] == 2
    assert (given["data"], given["store"], given["llm"], given["out"]) == (*(str(tmp_path/n) for n in "xy"), "own", str(tmp_path/"r"))
    assert not any("demo" in str(value) for value in given.values())
    assert "needs --store" in call("train", "--data", tmp_path/"x", "--out", tmp_path/"r")


# --- a run folder is the truth about a run ----------------------------------------------------------------------------

@pytest.fixture
def run(tmp_path):
    "A folder in which a corpus of one's own was trained on."
    runners.remember(tmp_path/"run", "91", {"data": "own/scans", "store": "own/store", "out": str(tmp_path/"run"), "batch": 3})
    return tmp_path/"run"


def test_evaluation_and_report_read_the_run_and_not_the_demonstration(run, started):
    for verb in ("evaluate", "report", "train"): assert call(verb, "--out", run) is None
    evaluation, report, training = (given for _, given in started)
    assert (evaluation["data"], evaluation["store"], evaluation["out"]) == ("own/scans", "own/store", str(run))
    assert training["batch"] == 3 and training["data"] == "own/scans"
    assert not any("demo" in str(v) or "phantom" in str(v) for given in started for v in given[1].values())
    assert report.get("ablation", "") == report.get("crossmodal", "") == ""


def test_a_plan_may_not_exchange_the_corpus_of_a_run(run, started):
    error = call("evaluate", "--config", "demo", "--out", run)
    assert "was trained with data own/scans, the plan has data/demo/phantom" in error and not started
    assert call("evaluate", "--out", run, "-p", "data=other", "-p", "store=elsewhere") is None
    assert started[0][1]["data"] == "other"


def test_a_run_from_before_has_its_corpus_in_its_training(tmp_path, started):
    (tmp_path/"training.json").write_text('{"plan": {"data": "a/b", "store": "a/c", "llm": null}}')
    assert call("evaluate", "--out", tmp_path) is None
    assert (started[0][1]["data"], started[0][1]["store"]) == ("a/b", "a/c")


def test_a_folder_without_a_run_is_no_run(tmp_path, started):
    for verb in ("evaluate", "report"): assert "holds no run" in call(verb, "--out", tmp_path)
    assert not started


def test_what_runs_is_written_down_whole(run):
    kept = yaml.safe_load((run/"run.yaml").read_text())["91_train"]
    assert {*kept} == {*runners.runner_parameters("91")} and kept["batch"] == 3


def test_the_demonstration_is_the_plan_where_nothing_else_is_named(started):
    assert call("train") is None and call("evaluate", "--out", ROOT/"reports"/"demo") is None
    assert [given["out"] for _, given in started] == ["reports/demo"] * 2
    assert {given["data"] for _, given in started} == {"data/demo/phantom"}
