"""A run that is interrupted in any way continues to the weights of the uninterrupted run, or says why not."""
import ctypes
import itertools
import json
import os
import resource
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from corpora import LORA, corpus, make_plan  # noqa: F401  (a fixture)
from processes import apart
from safetensors.torch import load_file

from medvlm3d.training import checkpoint, trainer
from medvlm3d.training import stages as training
from medvlm3d.training.checkpoint import checkpoints, newest_whole
from medvlm3d.base.core import MedVLM3DError, RunFolder, read_json
from medvlm3d.data.m3d import load_m3d
from medvlm3d.method.model import MedVLM3D
from medvlm3d.base.lock import only_writer
from medvlm3d.training.stages import train

STAGE = {
    "stage": 2,
    "tasks": ["closed"],
    "epochs": 3,
    "lr": 5e-3,
    "batch": 2,
    "accumulation": 1,
    "lora": LORA,
}


def weights(run): return load_file(Path(run)/"model"/"model.safetensors")
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
def steps(run):
    log = RunFolder(run).read_log()
    return {(e["stage"], e["step"]): (e["loss"], e["lr"], e["grad_norm"]) for e in log}


def stage_folder(run): return Path(run)/"checkpoints"/"stage-2"


def kill_at(step, monkeypatch, *how):
    "Have this process receive signals when the data of a step have been read."
    seen = []
    whole = trainer.SafeTrainer.training_step
    def stepping(self, *args, **kwargs):
        if self.state.global_step == step and not seen:
            seen.extend(os.kill(os.getpid(), number) for number in how)
        return whole(self, *args, **kwargs)
    monkeypatch.setattr(trainer.SafeTrainer, "training_step", stepping)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):  # noqa: F811
    "The run that nothing interrupts: twelve steps, a checkpoint every two."
    run = tmp_path_factory.mktemp("whole")/"run"
    train(run, make_plan(*corpus), progress=False)
    return run


@pytest.fixture(scope="module")
def halted(corpus, tmp_path_factory, whole):  # noqa: F811
    "A run that was told to stop in its fifth step, three times, to be copied: checkpoints 4 and 5."
    run = tmp_path_factory.mktemp("halted")/"run"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(4, patch, signal.SIGTERM, signal.SIGINT, signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped: train(run, make_plan(*corpus), progress=False)
    assert stopped.value.code == 143 and RunFolder(run).status == "stopped"
    return run


def test_sigterm_leaves_a_checkpoint_and_the_run_continues(corpus, halted, whole, tmp_path):  # noqa: F811
    assert [c.name for c in checkpoints(stage_folder(halted))] == ["checkpoint-5", "checkpoint-4"]
    shutil.copytree(halted, tmp_path/"run")
    run = train(tmp_path/"run", make_plan(*corpus), progress=False)
    assert (
        run.status == "done" and same(weights(run.path), weights(whole)) and steps(run.path) == steps(whole)
    )


KILLED = {
    "mid-epoch": (5, 0, 1, "both"),
    "boundary, workers": (8, 2, 1, "both"),
    "accumulation": (5, 0, 2, "both"),
    "accumulation, workers, forms that alternate": (7, 2, 2, "alternate"),
    "last step": (11, 0, 1, "both"),
}


@pytest.mark.parametrize("step, workers, accumulation, forms", KILLED.values(), ids=KILLED.keys())
def test_a_killed_run_continues_bit_for_bit(corpus, whole, tmp_path, monkeypatch,  # noqa: F811
                                            step, workers, accumulation, forms):
    "Weights, losses, learning rates and gradient norms are those of the uninterrupted run."
    tasks = ["closed"] if forms == "both" else ["report", "closed", "open"]
    plan = make_plan(
        *corpus,
        [{**STAGE, "tasks": tasks, "batch": 2 // accumulation, "accumulation": accumulation}],
        workers=workers,
        forms=forms,
    )
    once = (
        whole if (accumulation, forms) == (1, "both") else train(tmp_path/"once", plan, progress=False).path
    )
    with monkeypatch.context() as patch:
        kill_at(step, patch, signal.SIGKILL)
        assert apart(lambda: train(tmp_path/"cut", plan, progress=False)) == -signal.SIGKILL
    assert step_of_newest(tmp_path/"cut") == step - step % 2
    again = train(tmp_path/"cut", plan, progress=False)
    assert same(weights(again.path), weights(once)) and steps(again.path) == steps(once)


def step_of_newest(run): return checkpoint.step_of(newest_whole(stage_folder(run)))


def test_killed_after_the_last_step_it_takes_no_other(corpus, whole, tmp_path, monkeypatch):  # noqa: F811
    with monkeypatch.context() as patch:
        patch.setattr(training, "finish_stage", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert (
            apart(
                lambda: train(
                    tmp_path/"run", make_plan(*corpus, [{**STAGE, "epochs": 2.75}]), progress=False
                )
            )
            == -signal.SIGKILL
        )
    assert step_of_newest(tmp_path/"run") == 11
    train(tmp_path/"run", make_plan(*corpus, [{**STAGE, "epochs": 2.75}]), progress=False)
    assert max(step for _, step in steps(tmp_path/"run")) == 11
    assert same(
        weights(tmp_path/"run"),
        load_file(newest_whole(stage_folder(tmp_path/"run"))/"model.safetensors"),
    )


UNHEARD = [(torch, "save"), (safetensors.torch, "save_file"), (os, "fsync")]   # Python hears nothing of these
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def die_at(n):
    "Kill this process before its n-th change of the disk: write, sync, rename, removal or new folder."
    times = itertools.count(1)
    def one_more():
        if next(times) == n: os.kill(os.getpid(), signal.SIGKILL)
    def hear(event, args):
        if event in CHANGES or (event == "open" and args[2] & WRITING and args[0] != os.devnull): one_more()
    def counted(function):
        def call(*args, **kwargs):
            one_more()
            return function(*args, **kwargs)
        return call
    for place, name in UNHEARD: setattr(place, name, counted(getattr(place, name)))
    sys.addaudithook(hear)


def test_kill_9_at_every_boundary_of_a_save(corpus, halted, whole, tmp_path, monkeypatch):  # noqa: F811
    """At the save after step 6 the process is copied for every n; the copy dies before its n-th change.

    It leaves a whole checkpoint of step 5 or 6, never older or none; from some of them a run continues."""
    save, run, left, kept = trainer.SafeTrainer._save_checkpoint, tmp_path/"run", [], []
    def every(self, *args):
        for n in range(1, 500):
            shutil.rmtree(stage_folder(run))
            shutil.copytree(stage_folder(halted), stage_folder(run))
            status = apart(lambda: (die_at(n), save(self, *args)))
            if status == 0: return
            assert status == -signal.SIGKILL
            left.append(step_of_newest(run))
            if n % 24 == 1: kept.append(shutil.copytree(stage_folder(run), tmp_path/f"after-{n}"))
    monkeypatch.setattr(
        trainer.SafeTrainer,
        "_save_checkpoint",
        lambda self, *args: every(self, *args) if self.state.global_step == 6 else save(self, *args),
    )
    shutil.copytree(halted, run)
    train(run, make_plan(*corpus), progress=False)
    monkeypatch.undo()
    assert len(left) > 40 and left == sorted(left) and {*left} == {5, 6} and len(kept) >= 3
    for found in kept[1:]:
        for name in ("model", "stage-2", "checkpoints"): shutil.rmtree(run/name)
        shutil.copytree(found, stage_folder(run))
        assert same(weights(train(run, make_plan(*corpus), progress=False).path), weights(whole))


PARTS = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
         "checkpoint.json", "COMPLETE"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("fault", ["missing", "cut short", "one bit"])
def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(halted, tmp_path, part, fault):
    folder, said = tmp_path/"stage-2", []
    shutil.copytree(stage_folder(halted), folder)
    file = folder/"checkpoint-5"/part
    content = file.read_bytes()
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(
            content[: len(content) // 2] if fault == "cut short" else bytes([content[0] ^ 1]) + content[1:]
        )
    assert newest_whole(folder, said.append).name == "checkpoint-4"
    assert (
        len(said) == 1
        and "checkpoint-5" in said[0]
        and (part in said[0] or part == "checkpoint.json" or fault != "missing")
    )
    (folder/"checkpoint-4"/"optimizer.pt").unlink()
    with pytest.raises(MedVLM3DError, match="no whole checkpoint.*optimizer.pt") as e:
        newest_whole(folder, said.append)
    assert e.value.what.endswith("stage-2") and "Restore the files" in e.value.remedy


def mount_small(place, size):
    "Mount a disk of `size` bytes at `place` for this process alone; False where that is refused."
    libc, (new_mounts, new_user, private) = ctypes.CDLL(None), (0x20000, 0x10000000, 0x44000)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(new_mounts):
        if libc.unshare(new_user | new_mounts): return False
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
    return not libc.mount(b"none", b"/", None, private, None) and not libc.mount(
        b"none", str(place).encode(), b"tmpfs", 0, f"size={size}".encode()
    )


def limit_files(size):
    "Refuse files of more than `size` bytes (EFBIG where a full disk would say ENOSPC)."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def pages(folder):
    sizes = [f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()]
    return sum(-(-size // 4096) * 4096 for size in sizes)


def test_a_full_disk_during_a_save_loses_nothing(corpus, halted, whole, tmp_path):  # noqa: F811
    """On a disk with room for half a checkpoint the save fails in one line and leaves nothing; the older
    checkpoint stands, and with more room the run continues."""
    small, last = tmp_path/"small", stage_folder(halted)/"checkpoint-5"
    small.mkdir()
    def cramped():
        mounted = mount_small(small, pages(halted) + pages(last) // 2)
        shutil.copytree(halted, small/"run")
        if not mounted: limit_files((last/"optimizer.pt").stat().st_size // 2)
        message = "checkpoint-6: could not be written.*(No space left|only a part|too large)"
        with pytest.raises(MedVLM3DError, match=message) as e:
            train(small/"run", make_plan(*corpus), progress=False)
        assert "Make room" in e.value.remedy and not (stage_folder(small/"run")/checkpoint.PART).exists()
        shutil.copytree(small/"run", tmp_path/"run")
    assert apart(cramped) == 0
    assert (step_of_newest(tmp_path/"run") == 5 and RunFolder(tmp_path/"run").status == "failed"
            and "could not be written" in RunFolder(tmp_path/"run").manifest["error"])
    assert same(weights(train(tmp_path/"run", make_plan(*corpus), progress=False).path), weights(whole))


def test_other_conditions_are_printed_refused_or_recorded(corpus, halted, tmp_path, capsys):  # noqa: F811
    shutil.copytree(halted, tmp_path/"run")
    plan = make_plan(*corpus)
    larger = make_plan(*corpus, [{**STAGE, "batch": 4}])
    for changed, word in ((replace(plan, seed=1), "seed: 0 → 1"), (larger, "stages.0.batch: 2 → 4"),
                          (replace(plan, forms="alternate"), "forms: both → alternate")):
        with pytest.raises(MedVLM3DError, match=word) as e: train(tmp_path/"run", changed, progress=False)
        assert "allow_changes" in e.value.remedy and e.value.what
    run = train(
        tmp_path/"run", make_plan(*corpus, [{**STAGE, "lr": 1e-3}]), progress=False, allow_changes=True
    )
    assert "lr: 0.005 → 0.001" in capsys.readouterr().out and "lr: 0.005 → 0.001" in json.dumps(
        run.manifest["changes"], ensure_ascii=False
    )


def test_changed_data_are_refused(corpus, tmp_path):  # noqa: F811
    root, fields = corpus
    shutil.copytree(root/"data", tmp_path/"data")
    plan = replace(make_plan(root, fields, [{**STAGE, "epochs": .25}]), data=str(tmp_path/"data"))
    train(tmp_path/"run", plan, progress=False)
    sample = next(s for s in load_m3d(tmp_path/"data") if s.split == "train")
    volume = tmp_path/"data"/sample.image
    volume.write_bytes(volume.read_bytes() + b"\0")
    with pytest.raises(MedVLM3DError, match="its volume has changed since this run began") as e:
        train(tmp_path/"run", plan, progress=False)
    assert e.value.what == "the data of this run" and "Restore the data" in str(e.value)


def test_a_second_run_in_a_folder_is_refused(corpus, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(training, "only_writer", lambda folder, patience: only_writer(folder))   # at once
    message = "being written by another process"
    with only_writer(tmp_path/"run"), pytest.raises(MedVLM3DError, match=message) as e:
        train(tmp_path/"run", make_plan(*corpus), progress=False)
    assert "run" in e.value.what and "another folder" in e.value.remedy


def test_a_loss_that_is_not_finite_stops_and_names_its_volumes(corpus, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(trainer, "weight_of", lambda batch: torch.tensor(float("nan")))
    with pytest.raises(MedVLM3DError, match="3 losses in a row") as e:
        train(tmp_path/"run", make_plan(*corpus, save_every=1), progress=False)
    named = read_json(tmp_path/"run"/"nonfinite-rank-0.json")
    assert (
        [n["step"] for n in named] == [1, 2, 3]
        and all(len(n["volumes"]) == 2 for n in named)
        and not checkpoints(stage_folder(tmp_path/"run"))
    )
    assert "learning rate" in e.value.remedy and RunFolder(tmp_path/"run").status == "failed"


def test_a_damaged_shard_is_named_by_the_process_that_reads_it(corpus, tmp_path):  # noqa: F811
    root, fields = corpus
    shutil.copytree(root/"store", tmp_path/"store")
    shard = next((tmp_path/"store").glob("shard-*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:len(content) // 2] + bytes(len(content) - len(content) // 2))
    with pytest.raises(MedVLM3DError, match="is damaged") as e:
        train(
            tmp_path/"run",
            make_plan(
                root,
                {k: v for k, v in fields.items() if k not in ("whiten", "channels")},
                store=str(tmp_path/"store"),
                workers=2,
            ),
            progress=False,
        )
    assert e.value.what.endswith(shard.name) and e.value.remedy and "Traceback" not in str(e.value)


def test_adapters_alone_or_another_base_are_refused(corpus, whole, tmp_path):  # noqa: F811
    from safetensors.torch import save_file
    shutil.copytree(whole/"model", tmp_path/"model")
    for hashes in ("model.safetensors.sha256", "SHA256SUMS"): (tmp_path/"model"/hashes).unlink(missing_ok=True)
    state = load_file(tmp_path/"model"/"model.safetensors")
    save_file({n: t for n, t in state.items() if "lora_" in n}, tmp_path/"model"/"model.safetensors")
    with pytest.raises(MedVLM3DError, match="without the connector") as e:
        MedVLM3D.from_pretrained(tmp_path/"model")
    assert e.value.what == "model" and "save_pretrained" in e.value.remedy
