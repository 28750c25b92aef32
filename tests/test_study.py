"""The runners through papermill, from nothing to tables: a reader of two steps, a random encoder, all the rest real."""
import json

import nbformat
import pytest
import yaml
from conftest import ROOT

from medvlm3d.evaluation.scores import score_predictions
from medvlm3d.evaluation.prediction import read_predictions
from medvlm3d.front.runners import run_plan
from medvlm3d.studies.demo import file_stem

STEPS = ("90_prepare", "91_train", "92_evaluate", "99_report")
SEED = 5


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A finished study in a folder of its own."
    base = tmp_path_factory.mktemp("study")
    where = {"out": str(base/"out"), "data": str(base/"data"), "store": str(base/"store")}
    run_plan({"90a_reader": {"out": str(base/"reader"), "steps": 2, "held_out": 2}}, base/"reader", show=False, tell=lambda _: None)
    where |= {"reader": str(base/"reader"/"model"), "seed": SEED}
    plan = {"90_prepare": {"train": 9},
            "91_train": {"channels": 12, "accumulation": 2, "policy": "truncate", "save_every": 7, "report_to": "none", "workers": 1},
            "92_evaluate": {"scans": ["brain2"], "resamples": 60}, "99_report": {}}
    run_plan(plan, base/"out", show=False, tell=lambda _: None, **where)
    return base/"out", plan, where


def test_it_ends_with_tables_figures_and_a_model(study):
    out = study[0]
    tables = {"closed", "open", "reports", "findings", "clinical", "seeds", "differences", "differences-open",
              "differences-reports", "calibration", "strata", "failed", "examples", "real-scans"}
    for kind in ("md", "csv", "tex"): assert {p.stem for p in (out/"tables").glob(f"*.{kind}")} >= {*tables, *(f"paper-table-{n}" for n in range(1, 9))}
    for kind in ("png", "pdf"):
        assert {p.stem for p in (out/"figures").glob(f"*.{kind}")} >= {"loss", "accuracy", "reliability", "paper-figure-1", "paper-figure-2",
                                                                       "phantom-slices", "real-brain2-slices", "real-brain2-attention"}
    assert (out/"model"/"model.safetensors").exists() and "Research use only" in (out/"model"/"README.md").read_text()


def test_parameters_arrived(study):
    out = study[0]
    prepared, made = (json.loads((out/f"{name}.json").read_text()) for name in ("prepared", "training"))
    assert (prepared["cases"]["train"], prepared["seed"], len(prepared["truth sha256"])) == (9, SEED, 64)
    assert made["plan"]["model"]["channels"] == 12 and made["plan"]["seed"] == SEED and made["seeds"] == [SEED]
    assert (made["plan"]["policy"], made["plan"]["save_every"], made["plan"]["workers"],
            {s["accumulation"] for s in made["plan"]["stages"]}) == ("truncate", 7, 1, {2})
    assert made["blind"]["share"] == 1 and made["blind"]["plan"]["blind"] and (out/"log-blind.jsonl").exists()
    assert json.loads((out/"manifest.json").read_text())["status"] == "done"
    assert f"60 resamples of cases, seed {SEED}" in json.loads((out/"results.json").read_text())["systems"]["model"]["signatures"]["bootstrap"]


def test_all_that_the_model_must_beat_stands_beside_it(study):
    systems = json.loads((study[0]/"results.json").read_text())["systems"]
    assert set(systems) == {"model", "model, in words", "other image", "no image", "blank image",
                            "slices reversed", "blind", "nearest caption", "constant", "chance"}
    assert {s: systems[s]["items"]["closed"] for s in systems} == dict.fromkeys(systems, 20)
    assert {s for s in systems if systems[s]["items"].get("report") == 4} == {*systems} - {"model, in words", "chance"}
    assert systems["model"]["items"] == {"closed": 20, "open": 20, "report": 4, "answered": 44, "failed": 0, "cases": 4}


def test_strata_are_of_the_models_answers(study):
    results = json.loads((study[0]/"results.json").read_text())
    micro = results["systems"]["model"]["standard"]["closed"]["accuracy"]["micro"]
    for values in results["strata"].values():
        n = sum(cells["micro"]["n"] for cells in values.values())
        assert (n == micro["n"]
                and sum(cells["micro"]["value"] * cells["micro"]["n"] for cells in values.values()) / n == pytest.approx(micro["value"], abs=1e-3))
    assert {*results["strata"]} >= {"plane", "organ", "lesion volume"} and all(len(values) > 1 for values in results["strata"].values())
    assert {*results["strata_beside"]} == {"blind", "other image"}


def test_every_answer_is_kept(study):
    "Also those that no model made; scored again they give the same numbers."
    systems = json.loads((study[0]/"results.json").read_text())["systems"]
    for name in {*systems} - {"chance"}:
        lines = read_predictions(study[0]/"predictions"/f"{file_stem(name)}.jsonl")
        assert score_predictions(lines, n=2)["m3d"]["closed"]["accuracy"]["macro"]["value"] == systems[name]["m3d"]["closed"]["accuracy"]["macro"]["value"]


def test_tables_and_card_say_how_it_was_trained(study):
    for text in ((study[0]/"tables"/"closed.md").read_text(), (study[0]/"tables"/"seeds.md").read_text(), (study[0]/"model"/"README.md").read_text()):
        assert f"One training (seed {SEED})" in text and "100 % of the epochs" in text


def test_cost_is_kept_apart_from_results(study):
    cost = json.loads((study[0]/"cost.json").read_text())
    assert cost["ms an item"] > 0 and "cost" not in json.loads((study[0]/"results.json").read_text())


def test_records_hold_no_path_of_this_machine(study):
    for step in STEPS:
        text = (study[0]/"notebooks"/f"{step}.ipynb").read_text()
        assert str(ROOT) not in text and "/tmp/" not in text
        assert nbformat.read(study[0]/"notebooks"/f"{step}.ipynb", 4).cells


def test_a_second_run_does_nothing(study):
    out, plan, where = study
    before, said = (out/"results.json").stat().st_mtime_ns, []
    run_plan(plan, out, show=False, tell=said.append, **where)
    assert (out/"results.json").stat().st_mtime_ns == before and all("already done" in line for line in said)


def test_the_demo_plan_names_the_four_steps():
    assert tuple(yaml.safe_load((ROOT/"runs"/"demo.yaml").read_text())) == STEPS


def test_ranks_and_allowances_reach_the_launcher(tmp_path, monkeypatch):
    from medvlm3d.studies import demo as study
    told = []
    monkeypatch.setattr(study, "launch", lambda folder, plan, **how: told.append(how) or (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError): study.train_twins(tmp_path, study.Plan("data", "store", {}), ranks=2, allow_changes=True, allow_shared=True)
    with pytest.raises(InterruptedError): study.train_twins(tmp_path, study.Plan("data", "store", {}))
    assert told[0]["launcher"] == study.on_ranks(2) and told[0]["allow_changes"] and told[0]["allow_shared"]
    assert told[1] == {"progress": True, "allow_changes": False, "allow_shared": False}
