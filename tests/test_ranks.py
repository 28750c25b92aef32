"""Two ranks learn what one learns; when one dies all end, and what they had done is continued. Real processes, DeepSpeed on the CPU over gloo."""
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from corpora import LORA, corpus, make_plan  # noqa: F401  (a fixture)
from safetensors.torch import load_file

from medvlm3d.checkpoint import checkpoints, flaw
from medvlm3d.core import MedVLM3DError, RunFolder, read_json
from medvlm3d.launch import launch, on_hosts, on_ranks
from medvlm3d.model import MedVLM3D
from medvlm3d.training import train

COMMON = {"tasks": ["closed"], "lr": 5e-3, "batch": 2, "accumulation": 1}
STAGES = [{"stage": 1, "epochs": 1, **COMMON}, {"stage": 2, "epochs": 6, "lora": {**LORA, "dropout": 0.}, **COMMON}]


def processes_of(folder):
    "{rank: process id} of the ranks that train in `folder`."
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try: words, settings = (place/"cmdline").read_bytes().split(b"\0"), (place/"environ").read_bytes().split(b"\0")
        except OSError: continue   # it ended while we looked
        rank = next((int(s[5:]) for s in settings if s.startswith(b"RANK=")), None)
        if str(folder).encode() in words and rank is not None: found[rank] = int(place.name)
    return found


def curve(run): return torch.tensor([[e["loss"], e["lr"], e["grad_norm"]] for e in sorted(RunFolder(run).read_log(), key=lambda e: (e["stage"], e["step"]))])


def test_two_ranks_learn_what_one_learns_die_together_and_continue(corpus, tmp_path, monkeypatch):  # noqa: F811
    """ZeRO-2 under torchrun: rank 1 is killed in the second stage; all end within 60 s and the message names it. DeepSpeed's own launcher continues
    from the last checkpoint, and losses, gradient norms and weights are those of one rank with the same global batch."""
    monkeypatch.chdir(ROOT)
    one = train(tmp_path/"one", make_plan(*corpus, [{**s, "batch": 4} for s in STAGES]), progress=False)
    two, plan, told = tmp_path/"two", make_plan(*corpus, STAGES, deepspeed="runs/zero2.json"), []

    def launched():
        try: launch(two, plan, launcher=on_ranks(2), progress=False)
        except MedVLM3DError as e: told.append((e, time.monotonic()))
    thread = threading.Thread(target=launched)
    thread.start()
    while thread.is_alive() and not checkpoints(two/"checkpoints"/"stage-2"): time.sleep(.05)
    ranks = processes_of(two)
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    thread.join(60)
    assert told and told[0][1] - killed < 60 and not processes_of(two)
    assert "rank 1 was killed by signal 9" in told[0][0].why and "start again" in told[0][0].remedy

    (tmp_path/"hostfile").write_text("localhost slots=2\n")
    launch(two, plan, launcher=on_hosts(tmp_path/"hostfile", "--no_ssh", "--node_rank", "0", "--master_addr", "127.0.0.1", "--num_gpus", "2"), progress=False)
    assert RunFolder(two).status == "done" and RunFolder(two).manifest["trained"] == one.manifest["trained"]
    torch.testing.assert_close(curve(two), curve(one.path), rtol=1e-3, atol=1e-5)
    a, b = (load_file(run/"model"/"model.safetensors") for run in (two, one.path))
    assert a.keys() == b.keys()
    for name in a: torch.testing.assert_close(a[name].float(), b[name], rtol=1e-2, atol=1e-3)
    MedVLM3D.from_pretrained(two/"model")

    last = checkpoints(two/"checkpoints"/"stage-2")[0]
    card = read_json(last/"checkpoint.json")
    assert flaw(last) is None and card["ranks"] == 2 and card["sharded"] and sum("optim_states" in n for n in card["files"]) == 2
    next(last.rglob("*rank_1*optim_states.pt")).unlink()
    assert "optim_states" in flaw(last)
    with pytest.raises(MedVLM3DError, match="ranks: 2 → 1"): train(two, plan, progress=False, allow_changes=True)


@pytest.mark.parametrize("config", ["zero3", "zero2-offload"])
def test_zero_3_and_offload_leave_one_whole_model(corpus, tmp_path, config):  # noqa: F811
    stages = [{**STAGES[1], "epochs": 1}]
    one = train(tmp_path/"one", make_plan(*corpus, [{**stages[0], "batch": 4}]), progress=False)
    two = launch(tmp_path/"two", make_plan(*corpus, stages, deepspeed=f"runs/{config}.json"), launcher=on_ranks(2), progress=False)
    torch.testing.assert_close(curve(two.path), curve(one.path), rtol=1e-3, atol=1e-5)
    a, b = (load_file(run.path/"model"/"model.safetensors") for run in (two, one))
    assert {n: t.shape for n, t in a.items()} == {n: t.shape for n, t in b.items()}
