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

SCRIPT = Path(sys.executable).parent/"medvlm3d"
VERBS = ["info", "fetch", "demo", "train", "evaluate", "report", "predict", "encode", "data", "data phantom"]
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


def test_info_json():
    facts = json.loads(run("info", "--json").stdout)
    assert facts["versions"]["medvlm3d"] and "radiomics" in facts["fetched"]
    assert str(Path.home()) not in json.dumps(facts) and str(ROOT) not in json.dumps(facts)


def test_predict_closed_and_open(model, scan):
    shown = run("predict", scan, "--model", model, "-q", "Which plane is this?", "-q", "Which organ is abnormal?", "--choices", "liver,spleen,left lung,axial", "--json")
    assert shown.returncode == 0, shown.stderr
    answers = json.loads(shown.stdout)["answers"]
    assert len(answers) == 2 and answers[0]["letter"] in "ABCD"
    assert answers[0]["text"] in ("liver", "spleen", "left lung", "axial")
    assert abs(sum(answers[0]["probabilities"].values()) - 1) < 1e-3
    assert "DOE" not in shown.stdout + shown.stderr


def test_predict_report_and_overlay(model, scan, tmp_path):
    shown = run("predict", scan, "--model", model, "--overlay", tmp_path/"seen.png")
    assert shown.returncode == 0, shown.stderr
    assert NOTICE in shown.stdout and "DOE" not in shown.stdout + shown.stderr
    assert (tmp_path/"seen.png").read_bytes()[:4] == b"\x89PNG"


def test_demo_model_answers(scan):
    "The committed model answers; without one, the error says how to get it."
    shown = run("predict", scan, "-q", "Which plane is this?", "--choices", "axial,coronal,sagittal,oblique", "--json")
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


def test_debug_keeps_the_traceback():
    assert "Traceback" in run("--debug", "train", "-p", "seed").stderr


def test_truncated_scan_is_named_not_answered(model, scan, tmp_path):
    (tmp_path/"cut.nii.gz").write_bytes(scan.read_bytes()[:4000])
    shown = run("predict", tmp_path/"cut.nii.gz", "--model", model, "-q", "Which plane?", "--json")
    assert shown.returncode == 1 and "cut.nii.gz" in shown.stderr and not shown.stdout


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
