"""What is committed is what the results say: tables, cards and the front page are rendered anew and compared.

Each is rendered from its run folder and compared text for text; numbers in prose are those of a run."""
import ast
import csv
import re

import nbformat
import pytest
import yaml
from conftest import ROOT
from IPython.display import Markdown

from medvlm3d.base.core import read_json, sha256_file
from medvlm3d.base.table import Table, write_table
from medvlm3d.studies.crossmodal_study import accuracy_table, difference_table, agreement_table, source_table
from medvlm3d.studies.data import audit_table, balance_table, scale_table, speed_table
from medvlm3d.studies.efficiency import COLUMNS, Finding, goal_rows
from medvlm3d.data.ties import write_audit
from medvlm3d.studies.stress import stress_note, stress_rows
from medvlm3d.report.study_tables import render
from medvlm3d.studies.sweep import ablation_tables
from medvlm3d.studies.waterfall import waterfall_tables
from medvlm3d.studies.paper_tables import write_paper_tables

REPORTS = ROOT/"reports"
FOLDERS = sorted(p.parent for p in REPORTS.glob("*/tables"))
PAGES = [c for name in ("index", "findings", "rooms") for c in nbformat.read(ROOT/"nbs"/f"{name}.ipynb", 4).cells]


# --- tables -------------------------------------------------------------------------------------------------

def note_in(runner):
    "The text that a runner notebook puts below its table."
    cells = nbformat.read(ROOT/"nbs"/"runners"/f"{runner}.ipynb", 4).cells
    nodes = [n for c in cells if c.cell_type == "code" for n in ast.walk(ast.parse(c.source))]
    return next(n.value.value for n in nodes if isinstance(n, ast.Assign) and n.targets[0].id == "note")


def crossmodal(folder, results):
    account = read_json(folder/"review.json")
    return {"accuracy": accuracy_table(results, account), "differences": difference_table(results, account),
            "agreement": agreement_table(account), "sources": source_table(account)}


def data(folder, results):
    workers = yaml.safe_load((folder/"config.yaml").read_text())["workers"]
    return {"balance": balance_table(results["balance"]), "speed": speed_table(results["speed"], workers),
            "audit": audit_table(results["audit"]), "scale": scale_table(results["scale"])}


def efficiency(folder, results):
    found = [Finding(**{k: v for k, v in f.items() if k != "met"}) for f in results["findings"]]
    assert [f.met for f in found] == [f["met"] for f in results["findings"]]
    return {"goals": Table("Goals of cost", COLUMNS, goal_rows(found), note_in("94_efficiency"))}


def ablation(folder, results): return ablation_tables(results)


def stress(folder, results):
    columns, rows = stress_rows(results["falls"])
    note = stress_note(results["cases"])
    return {"stress": Table("What each score loses by one error", columns, rows, note)}


def waterfall(folder, results): return waterfall_tables(results)


RENDERERS = {"ablation": ablation, "crossmodal": crossmodal, "data": data, "efficiency": efficiency,
             "stress": stress, "waterfall": waterfall}


def render_study(folder, scratch, patch):
    "A study's tables and model card below `scratch`, from what else its folder holds; no picture is drawn."
    scratch.mkdir()
    for part in folder.iterdir():
        if part.name not in ("tables", "figures", "model", "notebooks"): (scratch/part.name).symlink_to(part)
    (scratch/"model").mkdir()
    if (folder/"model"/"seen.json").exists(): (scratch/"model"/"seen.json").symlink_to(folder/"model"/"seen.json")
    patch.setattr("medvlm3d.report.study_tables.save_figure", lambda *_: None)
    render(scratch)
    plan = folder/"run.yaml" if (folder/"run.yaml").exists() else ROOT/"runs"/f"{folder.name}.yaml"
    options = yaml.safe_load(plan.read_text())["99_report"]
    beside = {key: options[key] for key in ("ablation", "crossmodal") if options.get(key)}
    write_paper_tables(scratch, study=options["out"], **beside)


def texts(folder):
    return {p.name: p.read_text(encoding="utf-8") for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_tables_are_those_of_the_results(folder, tmp_path, monkeypatch):
    again = tmp_path/folder.name
    if folder.name in RENDERERS:
        tables = RENDERERS[folder.name](folder, read_json(folder/"results.json"))
        for name, table in tables.items(): write_table(table, again/"tables", name)
    else: render_study(folder, again, monkeypatch)
    committed, rendered = texts(folder/"tables"), texts(again/"tables")
    assert sorted(committed) == sorted(rendered)
    for name in committed: assert committed[name] == rendered[name], name
    card = again/"model"/"README.md"
    if card.exists(): assert (folder/"model"/"README.md").read_text() == card.read_text()


def test_the_audits_files_are_those_of_its_results(tmp_path):
    write_audit(tmp_path, read_json(REPORTS/"data"/"results.json")["audit"])
    assert texts(tmp_path) == texts(REPORTS/"data"/"audit")


@pytest.mark.parametrize("study", ["demo", "crossmodal"])
@pytest.mark.parametrize("system", ["model", "other-image"])
def test_answers_are_of_the_committed_model(study, system):
    answered = read_json(REPORTS/study/"predictions"/f"{system}.json")
    assert answered["weights"] == sha256_file(REPORTS/"demo"/"model"/"model.safetensors")


# --- the front page -----------------------------------------------------------------------------------------

def computed_now():
    "(stored, computed) Markdown of each cell of the front pages that is tagged `result`."
    names = {"Markdown": Markdown}
    for cell in (c for c in PAGES if "result" in c.metadata.get("tags", [])):
        body = ast.parse(cell.source).body
        exec(compile(ast.Module(body[:-1], []), "index", "exec"), names)
        value = eval(compile(ast.Expression(body[-1].value), "index", "eval"), names)
        computed = value.data if isinstance(value, Markdown) else value.markdown()
        yield cell.outputs[0].data["text/markdown"], computed


def test_the_front_page_shows_what_the_results_say():
    pairs = list(computed_now())
    assert len(pairs) >= 5
    for stored, computed in pairs: assert stored == computed


NUMBER = re.compile(r"(?<![\w.,/])(\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?)(?![\w/]|[.,]\d)"
                    r"( ?(?:%|M\b|million\b|GB\b|MB\b|minutes?\b|seconds?\b|hours?\b|points?\b)"
                    r"| (?:[a-z]+ ){0,2}(?:cases|volumes|questions|parameters|steps)\b)?")
SAID = {   # sentences whose number is in no run folder, and why
    r"about (\d+) GB of disk": "an upper bound, from a finished set-up and demo",
    r"less than (\d+) GB of memory": "an upper bound, from the demo's peak",
    r"the demo (\d+) minutes": "by the clock, on two cores",
    r"the ablations (\d+) minutes": "by the clock, on the same cores",
    r"hold a (\d+) % interval": "the level of every interval in this repository",
    r"DINOv2-S, (\d+) M parameters": "a ViT-S/14, as its authors count",
}


def numbers(value):
    "All numbers in a JSON value."
    if isinstance(value, dict): value = list(value.values())
    if isinstance(value, list): return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def held(name): return [n for p in sorted(REPORTS.glob(f"*/{name}")) for n in numbers(read_json(p))]


def literature():
    with open(ROOT/"data"/"published.csv", newline="") as f: return {r["value"] for r in csv.DictReader(f)}


def rounded(values, decimals): return {f"{scale * abs(v):.{decimals}f}" for v in values for scale in (1, 100)}


def unexplained(text, results, facts):
    """Numbers in `text` that nothing explains: decimals must be of `results`, `facts` or the literature;
    integers with a unit of `facts` (few, so that a match means something) or the literature."""
    for pattern in SAID: text = re.sub(pattern, "", text)
    left = []
    for number, unit in NUMBER.findall(text):
        bare = number.replace(",", "")
        if "." in bare: known = rounded(results + facts, len(bare.split(".")[1]))
        else: known = rounded(facts, 0) if "%" in unit else {f"{v:.0f}" for v in facts}
        if ("." in bare or unit) and bare not in known | literature(): left.append((number + unit).strip())
    return left


NO_PROSE = re.compile(r"^```.*?^```|https?://\S+|`[^`\n]*`|Python [0-9.]+ to [0-9.]+", re.M | re.S)
PROSE = "\n".join(NO_PROSE.sub("", c.source) for c in PAGES if c.cell_type == "markdown")


def test_numbers_in_the_prose_are_of_a_run():
    assert not unexplained(PROSE, held("results.json"), held("prepared.json") + held("cost.json"))


@pytest.mark.parametrize("pattern", SAID)
def test_what_is_said_without_a_run_is_still_said(pattern): assert re.search(pattern, PROSE)


@pytest.mark.parametrize("text, left", [
    ("accuracy 87.3 [81.0, 90.2]", ["87.3"]), ("240 test cases", []), ("241 test cases", ["241 test cases"]),
    ("kept 99 % of them, not 62 %", ["62 %"]), ("24 minutes, 3 GB", ["24 minutes", "3 GB"]),
    ("1.8 M parameters, 7 M", ["1.8 M", "7 M"]), ("120,000 volumes", []), ("all 21 equations", []),
    ("doi 10.1038/s41598", [])])
def test_an_invented_number_is_noticed(text, left):
    assert unexplained(text, [.871, 81.02, 90.24], [240, .9852]) == left


# --- the guards guard ---------------------------------------------------------------------------------------

def test_a_changed_cell_is_noticed(tmp_path):
    results = read_json(REPORTS/"stress"/"results.json")
    table = lambda: RENDERERS["stress"](None, results)["stress"].markdown()
    before, cell = table(), results["falls"]["negation"]["BLEU-1"]
    cell["value"] += .1
    assert table() != before
