"""The command line as its user meets it: a real process, a real scan."""
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from scan_files import PET, patient, save_dicom
from typer.testing import CliRunner

from medvlm3d.front.cli import app
from medvlm3d.base.core import MedVLM3DError

SCRIPT = Path(sys.executable).parent/"medvlm3d"
VERBS = ["info", "fetch", "demo", "train", "evaluate", "report", "ablate", "efficiency", "waterfall",
         "predict", "encode", "data", "data phantom", "data crossmodal"]
NOTICE = "Research use only, not a medical device"
DEMO = ROOT/"reports"/"demo"/"model"


def run(*args, cwd=ROOT):
    return subprocess.run([SCRIPT, *map(str, args)], capture_output=True, text=True, cwd=cwd, env={**os.environ, "COLUMNS": "120", "TERM": "dumb"})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A saved tiny model: random weights, every stage."
    from medvlm3d import tiny
    folder = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    "A NIfTI whose file name, as in life, holds a patient's name."
    path = tmp_path_factory.mktemp("scans")/"DOE_JANE_1970.nii.gz"
    values = np.random.default_rng(0).normal(0, 300, (40, 36, 24)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.diag([2., 2., 5., 1.])), path)
    return path


def test_help_is_quick_and_says_what_this_is():
    "Under a second of processor time: what the machine does besides is not its fault."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.returncode == 0 and NOTICE in shown.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb):
    shown = run(*verb.split(), "--help")
    assert shown.returncode == 0 and "Usage" in shown.stdout and not shown.stderr


def test_version_and_short_help():
    from medvlm3d import __version__
    assert CliRunner().invoke(app, ["--version"]).stdout == f"medvlm3d {__version__}\n"
    for words in (["-h"], ["train", "-h"], ["data", "split", "-h"]): assert CliRunner().invoke(app, words).exit_code == 0
    assert "--show-completion" in CliRunner().invoke(app, ["-h"]).stdout


def test_list_of_assets_has_all_with_size_and_state():
    shown = run("fetch", "--list").stdout
    assert "wordnet" in shown and "MB" in shown and "there" in shown and "dinov2-s" in shown


def test_info_json():
    facts = json.loads(run("info", "--json").stdout)
    assert facts["versions"]["medvlm3d"] and "radiomics" in facts["fetched"]
    assert str(Path.home()) not in json.dumps(facts) and str(ROOT) not in json.dumps(facts)


def test_predict_closed_and_open(model, scan):
    shown = run("predict", scan, "--model", model, "-q", "Which plane is this?",
                "-q", "Which organ is abnormal?", "--choices", "liver,spleen,left lung,axial", "--json")
    assert shown.returncode == 0, shown.stderr
    answers = json.loads(shown.stdout)["answers"]
    assert len(answers) == 2 and answers[0]["letter"] in "ABCD"
    assert answers[0]["text"] in ("liver", "spleen", "left lung", "axial")
    assert abs(sum(answers[0]["probabilities"].values()) - 1) < 1e-3
    assert json.loads(shown.stdout)["notes"] == ["this reader does not know the words: plane, axial"]
    assert "note: this reader does not know the words: plane, axial" in shown.stderr
    assert "DOE" not in shown.stdout + shown.stderr


def test_predict_report_and_overlay(model, scan, tmp_path):
    shown = run("predict", scan, "--model", model, "--overlay", tmp_path/"seen.png")
    assert shown.returncode == 0, shown.stderr
    assert NOTICE in shown.stdout and "DOE" not in shown.stdout + shown.stderr
    assert (tmp_path/"seen.png").read_bytes()[:4] == b"\x89PNG"


VOXELS = np.random.default_rng(1).integers(0, 900, (9, 8, 7)).astype(np.int16)


def two_series(folder):
    array, affine = patient(VOXELS, "SPL")
    save_dicom(save_dicom(folder/"two", array, affine), array[:4], affine, series=2, Modality="MR")
    return folder/"two"


def nifti(name, array, **header):
    def make(folder):
        image = nib.Nifti1Image(array, np.diag([2., 2., 5., 1.]))
        if header: image.set_sform(None, 0), image.set_qform(None, 0)
        nib.save(image, folder/name)
        return folder/name
    return make


def array_file(folder):
    np.save(folder/"x.npy", VOXELS)
    return folder/"x.npy"


def pet(folder): return save_dicom(folder/"pet", *patient(VOXELS, "SPL"), **{**PET, "PatientWeight": ""})


HOLES = VOXELS.astype(np.float32)
HOLES[0, 0, :3] = np.nan
CHOICES = {  # what is asked for: (scan, what it says without the option, the options, what the record then holds)
    "series": (two_series, "Choose one with series=0 to 1", ["--series", 1], {"modality": "MR"}),
    "frame": (nifti("four.nii.gz", np.stack([VOXELS, VOXELS], -1)), "Choose one with frame=0 to 1", ["--frame", 1], {"voxels": [7, 8, 9]}),
    "axis order": (array_file, "Pass axis_order", ["--axis-order", "HWD"], {"voxels": [7, 9, 8], "assumed": True}),
    "an orientation": (nifti("none.nii", VOXELS, codes=0), "pass axis_order", ["--axis-order", "LAS"], {"voxels": [7, 8, 9]}),
    "non-finite": (nifti("holes.nii", HOLES), "3 of 504 voxels are NaN", ["--non-finite", "replace"], {"voxels": [7, 8, 9]}),
    "no SUV": (pet, "read it with suv=False", ["--no-suv"], {"modality": "PT", "intensity": "arbitrary"}),
    "unit": (nifti("uptake.nii", VOXELS), None, ["--intensity", "SUV"], {"modality": "PT", "intensity": "SUV", "window": None}),
    "modality": (nifti("head.nii", VOXELS), None, ["--modality", "MR"], {"modality": "MR", "intensity": "arbitrary"}),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_what_a_file_leaves_open_is_told_to_predict(choice, model, tmp_path):
    "Without the option the error names it; with it the answer comes, the record says what was read, and notes are shown."
    make, missing, options, expected = CHOICES[choice]
    def ask(*more):
        return CliRunner().invoke(app, ["predict", str(make(tmp_path)), "--model", str(model), "-q", "Which plane?",
                                        "--choices", "axial,coronal", "--json", *map(str, more)])
    if missing:
        refused = ask()
        assert refused.exit_code == 1 and isinstance(refused.exception, MedVLM3DError) and missing in str(refused.exception)
    told = ask(*options)
    assert told.exit_code == 0, told.exception
    record = json.loads(told.stdout)["scan"]
    assert {k: record[k] for k in expected} == expected
    assert ([f"note: {w}" for w in record["warnings"] + json.loads(told.stdout)["notes"]]
            == [line for line in told.stderr.splitlines() if line.startswith("note: ")])
    assert "Zaphod" not in told.stdout + told.stderr


def test_demo_model_answers_from_anywhere(scan, tmp_path):
    "The committed model answers, also outside the clone; without one, the error says how to get it."
    shown = run("predict", scan, "-q", "Which plane is this?", "--choices", "axial,coronal,sagittal,oblique", "--json", cwd=tmp_path)
    if DEMO.is_dir(): assert json.loads(shown.stdout)["answers"][0]["letter"] in "ABCD", shown.stderr
    else: assert shown.returncode == 1 and "medvlm3d demo" in shown.stderr


@pytest.mark.parametrize("args, message", [
    (["predict", "missing.nii.gz"], "missing.nii.gz"),
    (["train", "--config", "no-such-plan"], "Plans are in runs/"),
    (["train", "-p", "seed"], "NAME=VALUE"),
    (["demo", "--llm", "gpt"], "reader or smollm2"),
    (["fetch", "no-such-asset"], "no-such-asset"),
], ids=lambda v: v if isinstance(v, str) else "-".join(v[:2]))
def test_errors_are_one_line_and_status_one(args, message, model, tmp_path):
    if args[0] == "predict": args = [*args, "--model", model]
    shown = run(*args)
    assert shown.returncode == 1 and message in shown.stderr, shown.stderr
    assert "Traceback" not in shown.stderr


def test_options_of_training_are_parameters_of_its_runner(monkeypatch, tmp_path):
    from medvlm3d.front import runners
    told = []
    monkeypatch.setattr(runners, "run_notebook", lambda name, given, out: told.append(runners.check_parameters(name, given)) or out)
    CliRunner().invoke(app, ["train", "--config", "demo", "--out", str(tmp_path), "--ranks", "2", "--allow-changes", "-p", "policy=truncate"],
                       catch_exceptions=False)
    assert told[0]["ranks"] == 2 and told[0]["allow_changes"] is True and told[0]["policy"] == "truncate" and "allow_shared" not in told[0]


def test_debug_keeps_the_traceback():
    assert "Traceback" in run("--debug", "train", "-p", "seed").stderr


WRONG = {  # what was typed wrong: the options, what the one line says
    "a GPU that is not there": (["--device", "cuda:99"], "device 'cuda:99': is not to be had"),
    "a device misspelt": (["--device", "cudda"], "device 'cudda': is not known. Use auto"),
    "an overlay": (["--overlay", "o.xyz"], "--overlay o.xyz: has an ending that is not written. Let it end in .png"),
    "an overlay on the grid": (["--overlay-nifti", "o.png"], "--overlay-nifti o.png: has an ending that is not written"),
    "options without a question": (["--choices", "a,b"], "--choices: are the options of a question, and none is typed"),
    "a table": (["--out", "answers.xlsx"], "Let it end in .csv or .jsonl"),
    "JSON beside a table": (["--out", "answers.csv", "--json"], "--json: is about one scan, and --out writes a table"),
    "a file of questions": (["--questions", "gone.txt"], "gone.txt: does not exist"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_typed_wrong_is_told_before_a_model_is_loaded(wrong, scan, monkeypatch):
    from medvlm3d.front import scan as front
    monkeypatch.setattr(front, "load_model", lambda *_: pytest.fail("a model was loaded"))
    options, message = WRONG[wrong]
    refused = CliRunner().invoke(app, ["predict", str(scan), *options])
    assert refused.exit_code == 1 and isinstance(refused.exception, MedVLM3DError) and message in str(refused.exception)
    missing = CliRunner().invoke(app, ["predict", "missing.nii.gz"])
    assert missing.exit_code == 1 and "missing.nii.gz: does not exist" in str(missing.exception)


def test_the_answer_is_printed_before_a_picture_fails(model, scan, tmp_path, monkeypatch):
    from medvlm3d.front import scan as front
    def fails(*_, **__): raise MedVLM3DError("o.png", "cannot be drawn", "Try again.")
    monkeypatch.setattr(front, "draw_overlay", fails)
    shown = CliRunner().invoke(app, ["predict", str(scan), "--model", str(model), "-q", "Which organ?", "--choices", "liver,spleen",
                                     "--overlay", str(tmp_path/"o.png"), "--json"])
    assert shown.exit_code == 1 and "cannot be drawn" in str(shown.exception)
    assert json.loads(shown.stdout)["answers"][0]["text"] in ("liver", "spleen")


def test_json_says_what_answered(model, scan, tmp_path):
    "Model hash, versions, device, time and the reader's notes; a single option has no probability; a cut answer is marked."
    def ask(*options):
        shown = CliRunner().invoke(app, ["predict", str(scan), "--model", str(model), "--json", *options])
        assert shown.exit_code == 0, shown.exception
        return json.loads(shown.stdout)
    told = ask("-q", "Which organ?", "--choices", '["liver, right lobe"]')
    (answer,) = told["answers"]
    assert (answer["text"], answer["probabilities"]) == ("liver, right lobe", None)
    weights = (model/"model.safetensors.sha256").read_text().split()[0]
    assert told["model"]["weights"] == weights and told["device"] == "cpu" and told["versions"]["torch"]
    assert told["time"].endswith("Z") and "taken for CT in HU because of its values" in told["scan"]["warnings"]
    cut = ask("-q", "Where is it?", "--max-new-tokens", "1")["answers"][0]
    assert cut["cut"] is True and ask("--max-new-tokens", "1")["cut"] is True


def test_a_scan_unlike_the_training_is_answered_with_a_warning_or_refused(scan, tmp_path):
    "A model that was trained on thin MR slices, asked about a thick CT; a confidence below its threshold gives no answer."
    from medvlm3d import tiny
    from medvlm3d.method.seen import Seen
    known = dict(modalities={"MR": 9}, intensities={"arbitrary": 9}, spacing=[[.5, 1.], [.5, 1.], [.5, 1.]])
    network = tiny()
    network.seen = Seen(volumes=9, **known, temperature=50., threshold=.9)
    network.save_pretrained(tmp_path/"model")
    typed = ["predict", str(scan), "--model", str(tmp_path/"model"), "-q", "Which organ?", "--choices", "liver,spleen"]
    told = json.loads(CliRunner().invoke(app, [*typed, "--json"]).stdout)
    assert "modality CT: the model was trained on MR" in told["outside"] and any("spacing of slices 5 mm" in line for line in told["outside"])
    assert told["answers"][0]["abstained"] is True and told["answers"][0]["text"] == ""
    shown = CliRunner().invoke(app, typed).stdout
    assert "warning: modality CT: the model was trained on MR" in shown and "below the threshold of 90.0%" in shown
    refused = CliRunner().invoke(app, [*typed, "--strict"])
    assert refused.exit_code == 1 and "is unlike the training scans (modality CT" in str(refused.exception) and not refused.stdout


def test_a_folder_without_reports_becomes_one_table(model, scan, tmp_path):
    "Two scans and a cut one, questions from a file: a row each, one file of what was set aside, and nothing is answered twice."
    folder = tmp_path/"scans"
    folder.mkdir()
    for name in "ab": (folder/f"{name}.nii.gz").write_bytes(scan.read_bytes())
    (folder/"cut.nii.gz").write_bytes(scan.read_bytes()[:900])
    (tmp_path/"asked.txt").write_text("Which plane?\nWhere is it?\n")
    typed = ["predict", folder, "--model", model, "--questions", tmp_path/"asked.txt", "--max-new-tokens", 3, "--out", tmp_path/"answers.csv"]
    shown = run(*typed)
    assert shown.returncode == 1 and "done: 2 of 3 scans" in shown.stderr and "1 scans set aside" in shown.stderr, shown.stderr
    rows = (tmp_path/"answers.csv").read_text().splitlines()
    assert len(rows) == 5 and rows[0].startswith("scan,question,choices,answer")
    (row,) = map(json.loads, (tmp_path/"answers.rejects.jsonl").read_text().splitlines())
    assert row["where"].endswith("cut.nii.gz") and row["why"] and row["remedy"]
    assert json.loads((tmp_path/"answers.about.json").read_text())["max_new_tokens"] == 3
    (folder/"cut.nii.gz").write_bytes(scan.read_bytes())
    again = CliRunner().invoke(app, [*map(str, typed), "--quiet"])
    assert again.exit_code == 0 and "done: 3 of 3 scans in" in again.stderr and "1 of them now" in again.stderr
    assert (tmp_path/"answers.csv").read_text().splitlines()[:5] == rows


def test_an_overlay_lies_on_the_grid_of_its_scan(model, tmp_path):
    "Shape and affine of a sagittal file, stored from head to feet, are those of the map and of the mask of kept slices."
    affine = np.array([[0, 0, 4., -30], [0, -1.5, 0, 60], [-2., 0, 0, 20], [0, 0, 0, 1]])
    values = np.random.default_rng(0).normal(0, 300, (40, 36, 12)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, affine), tmp_path/"x.nii.gz")
    shown = CliRunner().invoke(app, ["predict", str(tmp_path/"x.nii.gz"), "--model", str(model), "-q", "Which organ?", "--choices", "liver,spleen",
                                     "--overlay-nifti", str(tmp_path/"map.nii.gz")])
    assert shown.exit_code == 0, shown.exception
    for name in ("map", "map-kept"):
        image = nib.load(tmp_path/f"{name}.nii.gz")
        assert image.shape == values.shape and np.allclose(image.affine, affine)
        marked = image.get_fdata().any((0, 1))
        assert 0 < marked.sum() < 12, "some slices are kept, and not all"


def test_truncated_scan_is_named_not_answered(model, scan, tmp_path):
    (tmp_path/"cut.nii.gz").write_bytes(scan.read_bytes()[:4000])
    shown = run("predict", tmp_path/"cut.nii.gz", "--model", model, "-q", "Which plane?", "--json")
    assert shown.returncode == 1 and "cut.nii.gz" in shown.stderr and not shown.stdout


def test_a_scan_larger_than_the_limit_is_let_in_by_the_option(model, scan):
    def ask(limit):
        return CliRunner().invoke(app,
                                  ["predict", str(scan), "--model", str(model), "-q", "Which plane?", "--choices", "axial,coronal", "--max-voxels", str(limit)])
    refused = ask(34559)
    assert refused.exit_code == 1 and "declares 34560 voxels, the limit is 34559. Pass a larger max_voxels" in str(refused.exception)
    assert ask(34560).exit_code == 0


def test_encode_takes_the_options_of_predict_and_a_bad_scan_does_not_stop_the_others(tmp_path):
    """Two arrays that need their axes told, and between them a cut one: two files, one reject with reason and remedy, status 1;
    once it is mended, status 0 and no reject."""
    from safetensors import safe_open
    scans = [tmp_path/f"{name}.npy" for name in "abc"]
    for i, path in enumerate(scans): np.save(path, VOXELS + i)
    whole = scans[1].read_bytes()
    scans[1].write_bytes(whole[:200])
    def ask(*more):
        return CliRunner().invoke(app, ["encode", *map(str, scans), "--encoder", "tiny", "--depth", "8",
                                        "--size", "32", "--rho", "50", "--out", str(tmp_path/"out"), *more])
    assert ask().exit_code == 1 and not list((tmp_path/"out").glob("*.safetensors"))
    told = ask("--axis-order", "HWD", "--modality", "MR")
    assert told.exit_code == 1 and "done: 2 of 3" in told.stderr and "1 scans set aside" in told.stderr
    (row,) = map(json.loads, (tmp_path/"out"/"rejects.jsonl").read_text().splitlines())
    assert row["where"] == str(scans[1]) and row["why"] and row["remedy"]
    for kept in (tmp_path/"out").glob("*.safetensors"):
        with safe_open(kept, "pt") as f: assert f.get_tensor("features").shape[0] == 4
    assert len(list((tmp_path/"out").glob("*.safetensors"))) == 2
    scans[1].write_bytes(whole)
    assert ask("--axis-order", "HWD").exit_code == 0 and (tmp_path/"out"/"rejects.jsonl").read_text() == ""


def test_encode_names_a_file_by_all_that_determines_it(tmp_path):
    "Two frames of one file, and two depths of one frame, are three files."
    nib.save(nib.Nifti1Image(np.stack([VOXELS, VOXELS + 1], -1), np.diag([2., 2., 5., 1.])), tmp_path/"four.nii.gz")
    for frame, depth in ((0, 8), (1, 8), (1, 6)):
        done = CliRunner().invoke(app, ["encode", str(tmp_path/"four.nii.gz"), "--encoder", "tiny", "--depth", str(depth), "--size", "32",
                                        "--frame", str(frame), "--modality", "MR", "--out", str(tmp_path/"out")])
        assert done.exit_code == 0, done.exception
    assert len(list((tmp_path/"out").glob("*.safetensors"))) == 3


def test_encode(scan, tmp_path):
    from safetensors import safe_open
    shown = run("encode", scan, "--encoder", "tiny", "--depth", 8, "--size", 32, "--rho", 50, "--out", tmp_path)
    assert shown.returncode == 0, shown.stderr
    (kept,) = tmp_path.glob("*.safetensors")
    with safe_open(kept, "pt") as f: assert f.get_tensor("features").shape[0] == len(f.get_tensor("indices")) == 4


def test_data_phantom(tmp_path):
    shown = run("data", "phantom", "--out", tmp_path/"p", "--train", 2, "--validation", 2, "--test", 2, "--depth", 8, "--size", 32, "--workers", 1)
    assert shown.returncode == 0, shown.stderr
    assert set(json.loads((tmp_path/"p"/"M3D_Cap.json").read_text())) == {"train", "validation", "test"}
