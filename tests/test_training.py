"""A training process that is killed continues to the same weights; a real language model takes real steps."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from medvlm3d.core import MedVLM3DError, RunFolder, write_text
from medvlm3d.datasets import load_m3d
from medvlm3d.encoder import load_encoder
from medvlm3d.features import encode_images
from medvlm3d.language import base_hash, load_llm
from medvlm3d.model import MedVLM3D
from medvlm3d.phantom import make_phantom
from medvlm3d.reader import make_reader, reader_tokenizer
from medvlm3d.training import PackedVolumes, Plan, begin, launch, train, train_stage
from medvlm3d.volume import Preprocess

STAGES = [{"stage": 1, "tasks": ["report"], "epochs": 2, "lr": 5e-3, "batch": 4, "accumulation": 1},
          {"stage": 2, "tasks": ["report", "closed", "open"], "epochs": 12, "lr": 5e-3, "batch": 4, "accumulation": 2,
           "lora": {"r": 2, "alpha": 4, "dropout": .1, "targets": "all-linear"}}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "A phantom of 24 training cases with its features, and a random reader."
    root = tmp_path_factory.mktemp("corpus")
    make_phantom(root/"data", train=24, validation=2, test=2, shape=(8, 32, 32), workers=1, progress=False)
    encoder, preprocess = load_encoder("tiny", size=32), Preprocess(8, 32, 32)
    encode_images(root/"store", root/"data", [s.image for s in load_m3d(root/"data")], encoder, preprocess, rho=50, progress=False)
    tokenizer = reader_tokenizer()
    make_reader(tokenizer, hidden=48, layers=2, heads=4).save_pretrained(root/"reader")
    tokenizer.save_pretrained(root/"reader")
    fields = dict(encoder="tiny", encoder_channels=encoder.channels, grid=list(encoder.grid), preprocess=preprocess.to_dict(), rho=50)
    return root, fields


def plan(corpus, **changes):
    root, fields = corpus
    return Plan.of({"data": str(root/"data"), "store": str(root/"store"), "llm": str(root/"reader"), "stages": STAGES, "save_every": 10,
                    "precision": "fp32", "model": {**fields, "whiten": True, "channels": 16, "answer_style": "text"}, **changes})


def test_a_killed_process_continues_to_the_same_weights(corpus, tmp_path):
    whole = launch(tmp_path/"whole", plan(corpus))
    write_text(tmp_path/"cut"/"plan.yaml", (tmp_path/"whole"/"plan.yaml").read_text())
    process = subprocess.Popen([sys.executable, "-m", "medvlm3d.training", str(tmp_path/"cut")], stderr=subprocess.DEVNULL)
    checkpoints = tmp_path/"cut"/"checkpoints"/"stage-2"
    while process.poll() is None and not list(checkpoints.glob("checkpoint-*/COMPLETE")): time.sleep(.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and RunFolder(tmp_path/"cut").status == "running"
    assert not (tmp_path/"cut"/"model").exists()
    again = launch(tmp_path/"cut", plan(corpus))
    a, b = (MedVLM3D.from_pretrained(run/"model").state_dict() for run in (whole, again))
    assert again.status == "done" and all(torch.equal(a[name], b[name]) for name in a)


def test_plans_choices_arrive(corpus, tmp_path, monkeypatch):
    "Recomputed activations give the same weights; report_to writes for TensorBoard; targets that are too long are counted; the card says what was done."
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path/"events"))
    short = [{**STAGES[0], "epochs": 1}, {**STAGES[1], "epochs": 1}]
    once = train(tmp_path/"once", plan(corpus, stages=short), progress=False)
    again = train(tmp_path/"again", plan(corpus, stages=short, checkpointing=True, report_to="tensorboard", log_every=1), progress=False)
    a, b = (MedVLM3D.from_pretrained(run/"model").state_dict() for run in (once, again))
    for name in a: torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
    assert list((tmp_path/"events").rglob("events.out.tfevents*")) and all(e["tokens_per_second"] > 0 and e["grad_norm"] > 0 for e in again.read_log())
    card = (again/"model"/"README.md").read_text()
    assert "Research use only" in card and "24 volumes, 0 targets cut" in card and "| 2 | report, closed, open | 0.005 | 4 × 2 × 1 | 3 |" in card
    tight = {**plan(corpus).model, "context": 60}
    with pytest.raises(MedVLM3DError, match="tokens, room is for") as e: train(tmp_path/"tight", plan(corpus, stages=short, model=tight), progress=False)
    assert "truncate" in str(e.value)
    assert train(tmp_path/"cut", plan(corpus, stages=short[:1], model=tight, policy="truncate"), progress=False).manifest["truncated"] > 0


def test_frozen_weights_and_the_table_of_what_learns(corpus, tmp_path):
    run = train(tmp_path/"run", plan(corpus, stages=[{**s, "epochs": 1} for s in STAGES]), progress=False)
    first, second = (MedVLM3D.from_pretrained(run/f"stage-{n}") for n in (1, 2))
    assert base_hash(first.llm) == base_hash(second.llm) == base_hash(load_llm(str(corpus[0]/"reader")))
    sizes = {part: n for part, n, _ in second.trainable_table()}
    table = {stage: {row["part"]: row["trained"] for row in rows} for stage, rows in run.manifest["trained"].items()}
    assert table == {"stage 1": {"connector": sizes["connector"], "adapters": 0, "language model": 0},
                     "stage 2": {"connector": sizes["connector"], "adapters": sizes["adapters"], "language model": 0}}
    assert not torch.equal(first.connector.projector[0].weight, second.connector.projector[0].weight)


def test_offline_with_an_empty_cache_says_at_once_what_to_place_where(corpus, tmp_path):
    "Everything that is missing in one message, before anything is loaded."
    root = corpus[0]
    given = plan(corpus, llm="meta-llama/Llama-2-7b-hf", store=str(root/"nothing"), data=str(root/"nowhere"))
    write_text(tmp_path/"run"/"plan.yaml", yaml.safe_dump(given.to_dict()))
    ended = subprocess.run([sys.executable, "-m", "medvlm3d.training", str(tmp_path/"run")], capture_output=True, text=True, timeout=60,
                           env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path/"empty")})
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    for word in ("needs 3 things", "meta-llama/Llama-2-7b-hf", "*.safetensors", "the features of its volumes", "nowhere", "Nothing was begun"): assert word in ended.stderr, ended.stderr


def test_smollm2_learns_speaks_and_is_saved_as_a_reference(corpus, tmp_path):
    "SmolLM2-135M: the loss falls within a few steps of both stages, it generates, and only what was trained is saved."
    root, fields = corpus
    stages = [{**STAGES[0], "epochs": 3, "lr": 2e-3, "batch": 2}, {**STAGES[1], "tasks": ["closed"], "epochs": 3, "lr": 1e-3, "batch": 2, "accumulation": 1}]
    given = plan(corpus, llm=None, stages=stages, save_every=1000, model={**fields, "llm_reference": {"name": "smollm2", "sha256": None}})
    from medvlm3d.features import FeatureStore
    store = FeatureStore(root/"store")
    samples = [s for s in load_m3d(root/"data") if s.split == "train"]
    samples = [s for s in samples if s.image in {t.image for t in samples[:4]}]
    model, run = begin(given, store, [s.image for s in samples[:4]]), RunFolder(tmp_path/"run")
    run.path.mkdir()
    for stage in given.stages:
        train_stage(run, given, stage, model, PackedVolumes(samples, store, model.processor, model.config, stage.tasks))
        losses = [e["loss"] for e in run.read_log() if e["stage"] == stage.stage]
        assert losses[-1] < losses[0], losses
    model.eval().save_pretrained(tmp_path/"saved")
    assert sum(f.stat().st_size for f in (tmp_path/"saved").glob("*.safetensors")) < 60e6
    loaded = MedVLM3D.from_pretrained(tmp_path/"saved")
    features = store[samples[0].image][0][None].float()
    said = [m.say(features, "Describe what can be seen in this volume.", max_new_tokens=12) for m in (model, loaded)]
    assert said[0] == said[1] and said[0].strip()
