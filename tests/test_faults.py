"""Nothing is lost and nothing leaks, whatever is done: models that were tampered with, two writers, dead parents, damaged files of every kind,
eight threads, a secret for pseudonyms, and the lists of what is installed."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from scan_files import SECRETS, nifti_bytes, save_dicom

from medvlm3d.base.core import MedVLM3DError, write_json
from medvlm3d.base.lock import only_writer
from medvlm3d.method.model import MedVLM3D, tiny
from medvlm3d.method.sealed import seal

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")/"model"
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    import shutil
    return Path(shutil.copytree(saved, tmp_path/"model"))


@pytest.fixture
def no_network(monkeypatch):
    "Whoever asks a network fails, and is counted."
    asked = []

    def refuse(*args, **options):
        asked.append(args)
        raise OSError("the test has no network")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


# --- a model is all its files ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
                                  "tokenizer_config.json"])
def test_every_file_that_decides_is_hashed(copy, name):
    (copy/name).write_bytes((copy/name).read_bytes() + b"\n")
    with pytest.raises(MedVLM3DError, match=re.escape(f"{name} (changed)")): MedVLM3D.from_pretrained(copy)


def test_exchanged_words_added_and_missing_files_are_named(copy):
    words = (copy/"tokenizer.json").read_text()
    (copy/"tokenizer.json").write_text(words.replace("liver", "#").replace("spleen", "liver").replace("#", "spleen"))
    (copy/"seen.json").write_text("{}")
    (copy/"generation_config.json").unlink()
    with pytest.raises(MedVLM3DError, match=r"tokenizer.json \(changed\); generation_config.json \(missing\); seen.json \(added\)"):
        MedVLM3D.from_pretrained(copy)


HOSTILE = {
    "a terabyte": ({"text_config": {"hidden_size": 2**20}}, "does not fit its configuration"),
    "ten million layers": ({"text_config": {"num_hidden_layers": 10**7}}, "declares num_hidden_layers=10000000"),
    "more words than numbers": ({"text_config": {"vocab_size": 2**40}}, "declares vocab_size"),
    "a wide connector": ({"channels": 2**28, "whiten": True}, "does not fit its configuration"),
    "a large grid": ({"grid": [2**14, 2**14]}, "another way than config.json"),
    "an unknown kind": ({"text_config": {"model_type": "nope"}}, "is damaged"),
    "a base elsewhere": ({"llm_reference": {"name": "attacker/llm", "sha256": None}}, "not fetched unasked"),
    "adapters of another rank": ({"lora": {"r": 2**20, "alpha": 1, "dropout": 0, "targets": "all-linear"}}, "declares adapters of rank"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_configuration_is_refused_at_once_and_without_a_network(copy, no_network, fault):
    changes, reason = HOSTILE[fault]
    values = json.loads((copy/"config.json").read_text())
    for key, change in changes.items(): values[key] = {**values[key], **change} if key == "text_config" else change
    write_json(copy/"config.json", values)
    seal(copy)
    begun = time.perf_counter()
    with pytest.raises(MedVLM3DError, match=reason): MedVLM3D.from_pretrained(copy)
    assert time.perf_counter() - begun < 20 and not no_network


def test_reading_a_folder_asks_no_network(copy, no_network):
    assert MedVLM3D.from_pretrained(copy).processor and not no_network


def test_weights_that_are_none_are_named(copy):
    for name in ("SHA256SUMS", "model.safetensors.sha256"): (copy/name).unlink()
    for content in (b"", b"\x80\x04K\x01.", (copy/"model.safetensors").read_bytes()[:500]):
        (copy/"model.safetensors").write_bytes(content)
        with pytest.raises(MedVLM3DError, match="model.safetensors: is damaged"): MedVLM3D.from_pretrained(copy)


# --- writing never destroys ------------------------------------------------------------------------------------------

def test_outputs_are_plain_files_with_the_users_permissions(tmp_path):
    from safetensors.torch import save_file
    from medvlm3d.base.core import atomic_path
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path/"a.safetensors") as part: save_file({"x": torch.zeros(1)}, part)
    finally: os.umask(before)
    assert (tmp_path/"a.safetensors").stat().st_mode & 0o777 == 0o640
    os.mkfifo(tmp_path/"pipe")
    (tmp_path/"link").symlink_to(tmp_path/"a.safetensors")
    for name in ("pipe", "link"):
        with pytest.raises(MedVLM3DError, match=f"{name}: is "): write_json(tmp_path/name, 1)
    with pytest.raises(MedVLM3DError, match="null: is there and is no plain file"): write_json("/dev/null", 1)


def test_a_second_writer_touches_nothing(tmp_path, monkeypatch):
    from medvlm3d.data import split
    from medvlm3d.front.runners import run_plan
    from medvlm3d.training import launch
    from medvlm3d.training.plan import Plan
    monkeypatch.setattr(launch, "only_writer", lambda folder, patience: only_writer(folder))
    run = tmp_path/"run"
    with only_writer(run), only_writer(run/"notebooks"), only_writer(run/"model"):
        (run/"plan.yaml").write_text("of the other")
        (run/"m.jsonl").write_text(json.dumps({"id": "1", "case": "c", "image": "a.nii", "task": "report", "split": "", "answer": "x."}) + "\n")
        (run/"a.nii").write_bytes(nifti_bytes(np.zeros((4, 4, 4), np.int16)))
        plan = object.__new__(Plan)
        for act in (lambda: launch.launch(run, plan), lambda: split.split_corpus(run/"m.jsonl"), lambda: run_plan({}, run),
                    lambda: tiny().save_pretrained(run/"model")):
            with pytest.raises(MedVLM3DError, match="is being written by another process"): act()
        assert (run/"plan.yaml").read_text() == "of the other" and not [*(run/"model").iterdir()]


def test_a_training_ends_with_what_launched_it(tmp_path):
    program = ("import os, subprocess, sys, time\n"
               "child = 'from medvlm3d.training.launch import end_with_launcher; import time; end_with_launcher(); print(1, flush=True); time.sleep(120)'\n"
               "os.environ['MEDVLM3D_LAUNCHER'] = str(os.getpid())\n"
               "p = subprocess.Popen([sys.executable, '-c', child], start_new_session=True, stdout=subprocess.PIPE)\n"
               "p.stdout.read(1); print(p.pid, flush=True); time.sleep(120)")
    launcher = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    child = int(launcher.stdout.readline())
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    until = time.monotonic() + 30
    from medvlm3d.base.core import alive
    while alive(child) and time.monotonic() < until: time.sleep(.2)
    assert not alive(child)


# --- outside errors, threads, privacy --------------------------------------------------------------------------------

def test_damaged_files_of_every_kind_are_read_or_refused():
    done = subprocess.run([sys.executable, "bench/fuzz.py", "--count", "5000"], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stdout[-4000:] + done.stderr[-2000:]


def test_eight_threads_get_what_one_gets(tmp_path, caplog):
    from medvlm3d.report.looking import look
    from medvlm3d.scans.readers import read_volume
    save_dicom(tmp_path/"series", np.random.default_rng(0).integers(0, 900, (8, 32, 32)).astype(np.int16), np.diag([1., 1, 3, 1]))
    model = tiny()
    pixels = model.processor.preprocess(read_volume(tmp_path/"series"))
    features, _ = model.encode(pixels[None])
    tasks = {"ask": lambda: model.ask(pixels, "Which organ is enlarged?", ["liver", "spleen"]).probabilities,
             "report": lambda: model.report(pixels),
             "look": lambda: np.asarray(look(model, features, [("Where is the lesion?", "left")])[0]).tolist(),
             "read": lambda: read_volume(tmp_path/"series").array.sum(),
             "encode": lambda: model.encode(pixels[None])[0].float().sum().item()}
    serial = {name: act() for name, act in tasks.items()}
    with ThreadPoolExecutor(8) as pool: mixed = [(name, pool.submit(tasks[name])) for _ in range(4) for name in tasks]
    for name, result in mixed: assert result.result() == serial[name], name
    assert not [secret for secret in SECRETS if secret in caplog.text]


def test_pseudonyms_need_the_secret(tmp_path, monkeypatch):
    from medvlm3d.data.corpora import pseudonym
    ids = []
    for name in ("a", "b", "a"):
        monkeypatch.setenv("MEDVLM3D_PSEUDONYMS", str(tmp_path/name/"key"))
        ids.append(pseudonym("4711001"))
    assert ids[0] == ids[2] != ids[1] and (tmp_path/"a"/"key").stat().st_mode & 0o777 == 0o600


def test_model_words_do_not_command_a_terminal(capsys):
    from types import SimpleNamespace
    from medvlm3d.front.data import say
    from medvlm3d.front.scan import readable
    from medvlm3d.method.ask import Answer
    found = SimpleNamespace(outside=[], asked=[SimpleNamespace(question="a\x1b]0;x\x07")], answers=[Answer("\x1b[2Jliver\u202e")])
    say("note: \x1b[31mred")
    text = readable(found) + capsys.readouterr().err
    assert "liver" in text and not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", text)


# --- supply chain ----------------------------------------------------------------------------------------------------

def test_the_lock_file_hashes_every_package_and_names_no_host():
    text = (ROOT/"requirements-dev.lock").read_text()
    blocks = re.split(r"\n(?=[a-z0-9])", text.split("\n", 1)[1])
    assert len(blocks) > 150 and all("--hash=sha256:" in block for block in blocks)
    assert "://" not in text and "index-url" not in text and "/tmp" not in text


def test_the_parts_list_is_cyclonedx():
    made = [subprocess.run([sys.executable, ".ci/sbom.py"], cwd=ROOT, capture_output=True, text=True).stdout for _ in range(2)]
    bill = json.loads(made[0])
    assert made[0] == made[1] and (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    refs = [part["bom-ref"] for part in bill["components"]]
    assert len({*refs}) == len(refs) > 20 and all(part["version"] and part["purl"].startswith("pkg:pypi/") for part in bill["components"])


def test_only_the_lock_room_needs_posix():
    "Windows has no fcntl: reading, prediction and the course import without it."
    wanted = re.compile(r"\bimport .*\b(?:fcntl|pwd|grp|termios|resource)$", re.M)
    assert [p.name for p in sorted((ROOT/"medvlm3d").rglob("*.py")) if wanted.search(p.read_text())] == ["lock.py"]
