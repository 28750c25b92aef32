"""Two ranks learn what one learns; when one dies all end, and can continue. DeepSpeed over gloo."""
import os
import signal
import threading
import time

import pytest
import torch
from conftest import ROOT
from corpora import LORA, corpus, make_plan  # noqa: F401  (a fixture)
from processes import processes_of, until
from safetensors.torch import load_file

from medvlm3d.training.checkpoint import checkpoints, flaw
from medvlm3d.base.core import MedVLM3DError, RunFolder, read_json
from medvlm3d.training.launch import launch, on_hosts, on_ranks
from medvlm3d.method.model import MedVLM3D
from medvlm3d.training.stages import train

COMMON = {"tasks": ["closed"], "lr": 5e-3, "batch": 2, "accumulation": 1}
STAGES = [
    {"stage": 1, "epochs": 1, **COMMON},
    {"stage": 2, "epochs": 6, "lora": {**LORA, "dropout": 0.0}, **COMMON},
]


def curve(run):
    log = sorted(RunFolder(run).read_log(), key=lambda e: (e["stage"], e["step"]))
    return torch.tensor([[e["loss"], e["lr"], e["grad_norm"]] for e in log])


def told_after(folder, plan, number):
    "Launch two ranks and send rank 1 a signal in stage 2: the launch's error, and the seconds until it came."
    told = []
    def launched():
        try: launch(folder, plan, launcher=on_ranks(2), progress=False)
        except MedVLM3DError as e: told.append(e)
    thread = threading.Thread(target=launched)
    thread.start()
    until(lambda: not thread.is_alive() or checkpoints(folder/"checkpoints"/"stage-2"))
    os.kill(processes_of(folder)[1], number)
    since = time.monotonic()
    thread.join(60)
    return told[0], time.monotonic() - since


def test_two_ranks_learn_what_one_learns_and_die_together(corpus, tmp_path, monkeypatch):  # noqa: F811
    """ZeRO-2 under torchrun: rank 1 is killed in the second stage; all end within 60 s, the message names it.
    DeepSpeed's own launcher continues from the last checkpoint, and losses, gradient norms and weights are
    those of one rank with the same global batch."""
    monkeypatch.chdir(ROOT)
    one = train(tmp_path/"one", make_plan(*corpus, [{**s, "batch": 4} for s in STAGES]), progress=False)
    two, plan = tmp_path/"two", make_plan(*corpus, STAGES, deepspeed="runs/zero2.json")
    error, seconds = told_after(two, plan, signal.SIGKILL)
    assert seconds < 60 and not processes_of(two)
    assert "rank 1 was killed by signal 9" in error.why and "start again" in error.remedy
    assert RunFolder(two).status == "failed" and "rank 1 was killed" in RunFolder(two).manifest["error"]

    (tmp_path/"hostfile").write_text("localhost slots=2\n")
    launch(
        two,
        plan,
        launcher=on_hosts(
            tmp_path/"hostfile",
            "--no_ssh",
            "--node_rank",
            "0",
            "--master_addr",
            "127.0.0.1",
            "--num_gpus",
            "2",
        ),
        progress=False,
    )
    assert RunFolder(two).status == "done" and RunFolder(two).manifest["trained"] == one.manifest["trained"]
    torch.testing.assert_close(curve(two), curve(one.path), rtol=1e-3, atol=1e-5)
    a, b = (load_file(run/"model"/"model.safetensors") for run in (two, one.path))
    assert a.keys() == b.keys()
    for name in a: torch.testing.assert_close(a[name].float(), b[name], rtol=1e-2, atol=1e-3)
    MedVLM3D.from_pretrained(two/"model")

    last = checkpoints(two/"checkpoints"/"stage-2")[0]
    card = read_json(last/"checkpoint.json")
    assert (
        flaw(last) is None
        and card["ranks"] == 2
        and card["sharded"]
        and sum("optim_states" in n for n in card["files"]) == 2
    )
    next(last.rglob("*rank_1*optim_states.pt")).unlink()
    assert "optim_states" in flaw(last)
    with pytest.raises(MedVLM3DError, match="ranks: 2 → 1"):
        train(two, plan, progress=False, allow_changes=True)


@pytest.mark.parametrize("config", ["zero3", "zero2-offload"])
def test_zero_3_and_offload_leave_one_whole_model(corpus, tmp_path, config):  # noqa: F811
    """The weights are those of one rank with the same global batch; under ZeRO-3 also after rank 1 alone was
    told to stop, both had saved together, and they had continued."""
    stages = [{**STAGES[1], "epochs": 4 if config == "zero3" else 1}]
    one = train(tmp_path/"one", make_plan(*corpus, [{**stages[0], "batch": 4}]), progress=False)
    two, plan = tmp_path/"two", make_plan(*corpus, stages, deepspeed=f"runs/{config}.json")
    if config == "zero3":
        error, _ = told_after(two, plan, signal.SIGTERM)
        last = checkpoints(two/"checkpoints"/"stage-2")[0]
        assert "stopped by signal 15, with a checkpoint" in error.why and RunFolder(two).status == "stopped"
        assert (
            flaw(last) is None
            and read_json(last/"checkpoint.json")["ranks"] == 2
            and len(curve(two)) < len(curve(one.path))
        )
    launch(two, plan, launcher=on_ranks(2), progress=False)
    torch.testing.assert_close(curve(two), curve(one.path), rtol=1e-3, atol=1e-5)
    a, b = (load_file(run/"model"/"model.safetensors") for run in (two, one.path))
    assert a.keys() == b.keys()
    for name in a: torch.testing.assert_close(a[name].float(), b[name], rtol=1e-2, atol=1e-3)


FAULTY = """
import os, sys
from medvlm3d.features import store as features
from medvlm3d.training import stages as training
from medvlm3d.base.core import MedVLM3DError
def damaged(self, image): raise MedVLM3DError("shard-0", "is damaged", "Encode again.")
if os.environ["RANK"] == "1": features.FeatureStore.__getitem__ = damaged
training.main(sys.argv[2:])
"""


def test_the_first_cause_is_what_the_first_rank_said(corpus, tmp_path, capsys):  # noqa: F811
    "Rank 1 finds a shard damaged, rank 0 only loses rank 1: the message is rank 1's."
    (tmp_path/"faulty.py").write_text(FAULTY)
    with pytest.raises(MedVLM3DError, match="rank 1: shard-0: is damaged. Encode again") as e:
        launch(tmp_path/"run", make_plan(*corpus), launcher=(*on_ranks(2)[:-1], str(tmp_path/"faulty.py")))
    assert "it continues" in e.value.remedy and RunFolder(tmp_path/"run").status == "failed"
    assert RunFolder(tmp_path/"run").manifest["error"] == "rank 1: shard-0: is damaged. Encode again."
    assert (
        "shard-0: is damaged" in capsys.readouterr().err
        and "shard-0: is damaged" in (tmp_path/"run"/"launch.log").read_text()
    )
