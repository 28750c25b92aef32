"""One command takes twelve scans with written reports to tables, figures and a card; run again, it does nothing."""
import json
import shutil

import pytest
import yaml
from own_corpus import report, write_llm, write_scans
from typer.testing import CliRunner

from medvlm3d.base.core import MedVLM3DError, read_json
from medvlm3d.data.manifest import read_manifest
from medvlm3d.evaluation.prediction import read_predictions
from medvlm3d.features.store import FeatureStore
from medvlm3d.front.cli import app

SMALL = {"encoder": "tiny", "depth": 8, "size": 32, "rho": 50, "channels": 12, "stage1_epochs": 1, "stage2_epochs": 1,
         "resamples": 50, "blind": 0.2}


def study(corpus, out, *words):
    changes = [word for name, value in SMALL.items() for word in ("-p", f"{name}={value}")]
    return CliRunner().invoke(app, ["study", str(corpus), "--out", str(out), "--preset", "laptop", *changes, *map(str, words)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A finished study of twelve scans and a cut one, outside the project."
    base = tmp_path_factory.mktemp("own")
    write_scans(base/"scans")
    cut = base/"scans"/"patient 05"/"ct 90.nii.gz"
    cut.write_bytes((base/"scans"/"patient 05"/"ct 05.nii.gz").read_bytes()[:700])
    cut.with_name("ct 90.txt").write_text("A cut file.\n")
    write_llm(base/"llm")
    result = study(base/"scans", base/"run", "--llm", base/"llm")
    assert result.exit_code == 0, (result.exception, result.output[-2000:])
    return base, result


def test_it_ends_with_scores_and_with_where_everything_lies(finished):
    base, result = finished
    lines = result.stdout.splitlines()
    assert lines[0].startswith("report (2 asked): ROUGE-1 ") and "blind" in lines[0] and "nearest caption" in lines[0]
    for place in ("model", "tables", "figures", "predictions", "set-aside.jsonl"): assert any(line.strip().startswith(place) for line in lines)
    run = base/"run"
    assert {"reports", "clinical", "differences-reports", "examples", "failed"} <= {p.stem for p in (run/"tables").glob("*.md")}
    assert not {"closed", "open", "seeds", "calibration"} & {p.stem for p in (run/"tables").glob("*.md")}, "what was not asked has no table"
    assert "run" in {p.stem for p in (run/"tables").glob("*.md")} and not [*(run/"tables").glob("paper-*")], "only tables of this run"
    heads = {p.stem: p.read_text().splitlines()[0] for p in (run/"tables").glob("*.csv")}
    assert not [stem for stem, head in heads.items() if "M3D-LaMed" in head or "paper" in head], "no published column beside other data"
    assert {"loss", "accuracy", "paper-figure-1", "paper-figure-2"} <= {p.stem for p in (run/"figures").glob("*.png")}
    card = (run/"model"/"README.md").read_text()
    assert "Research use only" in card and "a corpus of its user" in card and "ROUGE-1" in card
    assert "phantom" not in card and str(base) not in card


def test_a_bad_scan_is_set_aside_and_patients_stay_together(finished):
    base, _ = finished
    (row,) = map(json.loads, (base/"run"/"set-aside.jsonl").read_text().splitlines())
    assert "damaged" in row["why"] and row["where"].startswith("study-all.jsonl:")
    samples, sides = read_manifest(base/"scans"/"study.jsonl"), {}
    assert len(samples) == 12 and {s.split for s in samples} == {"train", "validation", "test"}
    for s in samples: sides.setdefault(s.patient, set()).add(s.split)
    assert len(sides) == 11 and all(len(names) == 1 for names in sides.values())
    assert read_json(base/"run"/"audit"/"audit.json")["passed"]


def test_every_word_of_the_reports_is_learned_and_nothing_is_cut(finished):
    "All tokens of all reports are known to the language model, and the context follows from their lengths."
    base, _ = finished
    trained = read_json(base/"run"/"training.json")
    assert {split: counts["unknown"] for split, counts in trained["unknown"].items()} == dict.fromkeys(("train", "validation", "test"), 0)
    assert trained["truncated"] == 0 and trained["plan"]["llm"] == str(base/"llm")
    lines = read_predictions(base/"run"/"predictions"/"model.jsonl")
    assert {line["task"] for line in lines} == {"report"} and len(lines) == 2
    texts = {" ".join(report(n).split()) for n in range(12)}
    assert all(" ".join(line["answer"].split()) in texts for line in lines)


def test_intensities_are_scaled_as_is_said(finished):
    "In HU the window, else percentiles; the guess that a scan is not in HU is said too, and kept with its features."
    base, result = finished
    facts, store = read_json(base/"run"/"prepared.json"), FeatureStore(base/"run"/"features")
    assert (facts["preprocess"]["window"], facts["preprocess"]["percentiles"]) == ([-1000, 1000], [.5, 99.5])
    notes = {s.image: " ".join(store.notes(s.image)) for s in read_manifest(base/"scans"/"study.jsonl")}
    unknown = {image for image in notes if int(image[-9:-7]) % 4 == 3}
    assert len(unknown) == 3 and all(("was not applied" in note) == (image in unknown) for image, note in notes.items())


def test_nothing_of_the_demonstration_is_in_it(finished):
    run = yaml.safe_load((finished[0]/"run"/"run.yaml").read_text())
    assert [*run] == ["90b_own", "91_train", "92_evaluate", "99_report"]
    values = [str(v) for given in run.values() for name, v in given.items() if name != "reader"]
    assert not [v for v in values if "phantom" in v or "demo" in v]


def test_a_second_run_does_nothing_and_a_changed_corpus_is_prepared_again(finished):
    base, _ = finished
    before = (base/"run"/"results.json").stat().st_mtime_ns
    again = study(base/"scans", base/"run", "--llm", base/"llm")
    assert again.exit_code == 0 and again.stderr.count("already done") == 4, again.stderr
    assert (base/"run"/"results.json").stat().st_mtime_ns == before
    from medvlm3d.studies.own import corpus_state
    state = corpus_state(base/"scans")
    shutil.copy(base/"scans"/"patient 01"/"ct 01.txt", base/"scans"/"patient 01"/"new.txt")
    assert corpus_state(base/"scans") != state


@pytest.mark.parametrize("words, names", [
    (["--min-max", "--window", "-100", "100"], ["--window", "with --min-max"]),
    (["--llm", "no/such/model/at/all"], ["no/such/model/at/all"]),
    (["-p", "epochs=3"], ["epochs", "unknown to 90b_own"]),
    (["-p", "data=x"], ["-p data", "too"]),
    (["-p", "shares=[a, b]"], ["shares", "a list, each a number"]),
], ids=lambda v: " ".join(v))
def test_what_cannot_be_used_is_refused_before_anything_is_read(words, names, tmp_path):
    write_scans(tmp_path/"scans", 2)
    result = study(tmp_path/"scans", tmp_path/"run", *words)
    assert isinstance(result.exception, MedVLM3DError) and all(name in str(result.exception) for name in names), result.exception
    assert not (tmp_path/"run").exists() and not list((tmp_path/"scans").glob("study*"))
