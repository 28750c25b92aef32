"""The commands of the pages on public corpora, typed from the first to the tables on a generated corpus in the same layout."""
import json
import shlex

import pytest
from conftest import ROOT
from corpora import rad_row, write_rows
from own_corpus import write_llm
from typer.testing import CliRunner

from medvlm3d.base.core import read_json
from medvlm3d.front.cli import app
from medvlm3d.front.runners import check_parameters, read_plan

SMALL = {"encoder": "tiny", "depth": 8, "size": 32, "rho": 50, "channels": 12, "stage1_epochs": 1, "stage2_epochs": 1,
         "accumulation": 1, "workers": 1, "checkpointing": "false", "resamples": 50, "blind": 0.2}


def commands(page):
    "The lines of the cell of commands of a page."
    sources = ["".join(c["source"]) for c in json.loads((ROOT/"nbs"/"front"/f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]]
    scope = {}
    exec(next(s for s in sources if s.startswith("COMMANDS")).split("print(")[0], scope)
    return scope["COMMANDS"].splitlines()


def typed(line, folder, *more):
    "A command with its folders below `folder`; it must succeed."
    words = [f"{folder}/{word}" if word.startswith(("data/", "reports/")) else word for word in shlex.split(line)]
    assert words[0] == "medvlm3d"
    result = CliRunner().invoke(app, [*words[1:], *map(str, more)])
    assert result.exit_code == 0, (line, result.exception, result.output[-2000:])
    return result


@pytest.mark.parametrize("corpus, task", [("ctrate", "report"), ("totalseg", "closed")])
def test_the_commands_of_a_page_lead_to_scores(corpus, task, tmp_path):
    (tmp_path/"data").mkdir()
    typed(f"medvlm3d data layout {corpus} --out data/{corpus} --studies 16 --depth 20 --size 32", tmp_path)
    *listing, study = commands(f"on_{corpus}")
    for line in listing: typed(line, tmp_path)
    changes = [word for name, value in SMALL.items() for word in ("-p", f"{name}={value}")]
    ended = typed(study, tmp_path, *changes, "--llm", write_llm(tmp_path/"llm"))
    run = tmp_path/"reports"/corpus
    assert f"{task} (" in ended.stdout and "Research use only" in ended.stdout
    assert read_json(run/"audit"/"audit.json")["passed"] and list((run/"tables").glob("*.md"))
    assert "blind" in read_json(run/"results.json")["systems"]


def test_questions_of_others_join_the_volumes(tmp_path):
    (tmp_path/"data").mkdir()
    typed("medvlm3d data layout ctrate --out data/ctrate --studies 8 --depth 16 --size 24", tmp_path)
    write_rows(tmp_path/"data"/"3DRAD"/"test"/"Task4_Existence_Detection"/"Effusion.csv",
               [rad_row("test_4_a_1.nii.gz", "Is there an effusion?", "No", "Close", "B", ("Yes", "No", "-", "-"))])
    for line in commands("on_questions")[:2]: typed(line, tmp_path)
    lines = (tmp_path/"data"/"ctrate"/"threedrad.jsonl").read_text().splitlines()
    assert [(row["case"], row["split"]) for row in map(json.loads, lines)] == [("valid_4_a", "test")]


@pytest.mark.parametrize("plan", ["ctrate", "totalseg"])
def test_plans_name_what_the_runners_know_and_no_path(plan):
    steps = read_plan(plan)
    assert [*steps] == ["90b_own", "91_train", "92_evaluate", "99_report"]
    for name, given in steps.items(): assert check_parameters(name, given) == given
    assert not [v for given in steps.values() for v in given.values() if isinstance(v, str) and "/" in v]
