"""The runners through papermill, from nothing to tables, with a reader of two steps and a random encoder."""
import nbformat
import pytest
import yaml
from conftest import ROOT

from medvlm3d.base.core import read_json
from medvlm3d.evaluation.prediction import read_predictions
from medvlm3d.evaluation.scores import score_predictions
from medvlm3d.evaluation.temperature import confidence_words
from medvlm3d.front.runners import run_plan
from medvlm3d.method.seen import read_seen
from medvlm3d.studies import demo

STEPS = ("90_prepare", "91_train", "92_evaluate", "99_report")
SEED = 5


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A finished study in a folder of its own."
    base = tmp_path_factory.mktemp("study")
    where = {name: str(base/name) for name in ("out", "data", "store")}
    reader = {"90a_reader": {"out": str(base/"reader"), "steps": 2, "held_out": 2}}
    run_plan(reader, base/"reader", show=False, tell=lambda _: None)
    where |= {"reader": str(base/"reader"/"model"), "seed": SEED}
    plan = {"90_prepare": {"train": 9},
            "91_train": {"channels": 12, "accumulation": 2, "policy": "truncate", "save_every": 7,
                         "report_to": "none", "workers": 1},
            "92_evaluate": {"scans": ["brain2"], "resamples": 60}, "99_report": {}}
    run_plan(plan, base/"out", show=False, tell=lambda _: None, **where)
    return base/"out", plan, where


def test_it_ends_with_tables_figures_and_a_model(study):
    out = study[0]
    tables = {"closed", "open", "reports", "findings", "clinical", "seeds", "differences", "differences-open",
              "differences-reports", "calibration", "strata", "failed", "examples", "real-scans"}
    figures = {"loss", "accuracy", "reliability", "paper-figure-1", "paper-figure-2", "phantom-slices",
               "real-brain2-slices", "real-brain2-attention"}
    tables |= {f"paper-table-{n}" for n in range(1, 9)}
    for kind in ("md", "csv", "tex"): assert {p.stem for p in (out/"tables").glob(f"*.{kind}")} >= tables
    for kind in ("png", "pdf"): assert {p.stem for p in (out/"figures").glob(f"*.{kind}")} >= figures
    assert (out/"model"/"model.safetensors").exists()
    assert "Research use only" in (out/"model"/"README.md").read_text()


def test_parameters_arrived(study):
    out = study[0]
    prepared, training = read_json(out/"prepared.json"), read_json(out/"training.json")
    plan = training["plan"]
    assert (prepared["cases"]["train"], prepared["seed"], len(prepared["truth sha256"])) == (9, SEED, 64)
    assert plan["model"]["channels"] == 12 and plan["seed"] == SEED and training["seeds"] == [SEED]
    assert (plan["policy"], plan["save_every"], plan["workers"]) == ("truncate", 7, 1)
    assert {stage["accumulation"] for stage in plan["stages"]} == {2}
    assert training["blind"]["share"] == 1 and training["blind"]["plan"]["blind"]
    assert (out/"log-blind.jsonl").exists() and read_json(out/"manifest.json")["status"] == "done"
    signature = stored_systems(out)["model"]["signatures"]["bootstrap"]
    assert f"60 resamples of cases, seed {SEED}" in signature


def test_the_model_knows_its_training_scans_and_how_sure_it_may_be(study):
    "The record of the training split, and a temperature where the validation split has enough questions."
    out = study[0]
    seen, confidence = read_seen(out/"model"), read_json(out/"results.json")["confidence"]
    assert (seen.volumes, seen.modalities, seen.intensities) == (9, {"CT": 9}, None)
    assert sum(seen.planes.values()) == 9 and seen.features["limit"] > 0
    assert (seen.temperature, seen.threshold) == (confidence["temperature"], confidence["threshold"])
    assert confidence_words(seen) in (out/"model"/"README.md").read_text()
    assert read_seen(out/"training"/"blind"/"model") is None


def stored_systems(out): return read_json(out/"results.json")["systems"]


def test_all_that_the_model_must_beat_stands_beside_it(study):
    systems = stored_systems(study[0])
    assert set(systems) == {"model", "model, in words", "other image", "no image", "blank image",
                            "slices reversed", "blind", "nearest caption", "constant", "chance"}
    assert {s: systems[s]["items"]["closed"] for s in systems} == dict.fromkeys(systems, 20)
    with_reports = {s for s in systems if systems[s]["items"].get("report") == 4}
    assert with_reports == {*systems} - {"model, in words", "chance"}
    assert systems["model"]["items"] == {"closed": 20, "open": 20, "report": 4,
                                         "answered": 44, "failed": 0, "cases": 4}


def test_strata_are_of_the_models_answers(study):
    results = read_json(study[0]/"results.json")
    micro = results["systems"]["model"]["standard"]["closed"]["accuracy"]["micro"]
    for values in results["strata"].values():
        cells = [groups["micro"] for groups in values.values()]
        n = sum(cell["n"] for cell in cells)
        mean = sum(cell["value"] * cell["n"] for cell in cells) / n
        assert n == micro["n"] and mean == pytest.approx(micro["value"], abs=1e-3)
        assert len(values) > 1
    assert {*results["strata"]} >= {"plane", "organ", "lesion volume"}
    assert {*results["strata_beside"]} == {"blind", "other image"}


def test_every_answer_is_kept(study):
    "Also those that no model made; scored again they give the same numbers."
    def accuracy(scores): return scores["m3d"]["closed"]["accuracy"]["macro"]["value"]
    for name, scores in stored_systems(study[0]).items():
        if name == "chance": continue
        lines = read_predictions(study[0]/"predictions"/f"{demo.file_stem(name)}.jsonl")
        assert accuracy(score_predictions(lines, n=2)) == accuracy(scores), name


def test_tables_and_card_say_how_it_was_trained(study):
    for path in ("tables/closed.md", "tables/seeds.md", "model/README.md"):
        text = (study[0]/path).read_text()
        assert f"One training (seed {SEED})" in text and "100 % of the epochs" in text


def test_cost_is_kept_apart_from_results(study):
    assert read_json(study[0]/"cost.json")["ms an item"] > 0
    assert "cost" not in read_json(study[0]/"results.json")


def test_records_hold_no_path_of_this_machine(study):
    for step in STEPS:
        text = (study[0]/"notebooks"/f"{step}.ipynb").read_text()
        assert str(ROOT) not in text and "/tmp/" not in text
        assert nbformat.read(study[0]/"notebooks"/f"{step}.ipynb", 4).cells


def test_a_second_run_does_nothing(study):
    out, plan, where = study
    before, messages = (out/"results.json").stat().st_mtime_ns, []
    run_plan(plan, out, show=False, tell=messages.append, **where)
    assert (out/"results.json").stat().st_mtime_ns == before
    assert all("already done" in message for message in messages)


def test_the_demo_plan_names_the_four_steps():
    assert tuple(yaml.safe_load((ROOT/"runs"/"demo.yaml").read_text())) == STEPS


def test_ranks_and_allowances_reach_the_launcher(tmp_path, monkeypatch):
    calls = []

    def launch(folder, plan, **options):
        calls.append(options)
        raise InterruptedError

    monkeypatch.setattr(demo, "launch", launch)
    plan = demo.Plan("data", "store", {})
    for options in (dict(ranks=2, allow_changes=True, allow_shared=True), {}):
        with pytest.raises(InterruptedError): demo.train_twins(tmp_path, plan, **options)
    assert calls[0] == {"progress": True, "launcher": demo.on_ranks(2),
                        "allow_changes": True, "allow_shared": True}
    assert calls[1] == {"progress": True, "allow_changes": False, "allow_shared": False}
