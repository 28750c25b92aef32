"""A training process that is killed continues to the same weights; a real language model takes real steps."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
import yaml
from processes import ended, forked, processes_of, until
from safetensors.torch import load_file

from medvlm3d.training.checkpoint import newest_whole, step_of
from medvlm3d.base.core import MedVLM3DError, RunFolder, read_json, write_text
from medvlm3d.data.m3d import load_m3d
from medvlm3d.data.manifest import write_manifest
from medvlm3d.method.encoders import load_encoder
from medvlm3d.features.store import FeatureStore, encode_images
from medvlm3d.method.language import base_hash, load_llm
from medvlm3d.method.model import MedVLM3D
from medvlm3d.phantoms.phantom import make_phantom
from medvlm3d.evaluation.prediction import predict_items
from medvlm3d.training.reader import make_reader, reader_tokenizer
from medvlm3d.method.tokens import image_prefix, prompt_ids, target_ids
from medvlm3d.training.bases import base_fields
from medvlm3d.training.own import piece_tokenizer
from medvlm3d.training.stages import PackedVolumes, train, train_stage
from medvlm3d.training.words import measure_targets
from medvlm3d.training.plan import Plan, initial_model
from medvlm3d.training.launch import launch
from medvlm3d.scans.prepare import Preprocess

# after medvlm3d, which lets torchvision stand beside a CPU torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen2Config

STAGES = [
    {"stage": 1, "tasks": ["report"], "epochs": 2, "lr": 5e-3, "batch": 4, "accumulation": 1},
    {
        "stage": 2,
        "tasks": ["report", "closed", "open"],
        "epochs": 12,
        "lr": 5e-3,
        "batch": 4,
        "accumulation": 2,
        "lora": {"r": 2, "alpha": 4, "dropout": 0.1, "targets": "all-linear"},
    },
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "A phantom of 24 training cases with its features, and a random reader."
    root = tmp_path_factory.mktemp("corpus")
    make_phantom(root/"data", train=24, validation=2, test=2, shape=(8, 32, 32), workers=1, progress=False)
    encoder, preprocess = load_encoder("tiny", size=32), Preprocess(8, 32, 32)
    encode_images(
        root/"store",
        root/"data",
        images=[s.image for s in load_m3d(root/"data")],
        encoder=encoder,
        preprocess=preprocess,
        rho=50,
        progress=False,
    )
    tokenizer = reader_tokenizer()
    make_reader(tokenizer, hidden=48, layers=2, heads=4).save_pretrained(root/"reader")
    tokenizer.save_pretrained(root/"reader")
    fields = dict(
        encoder="tiny",
        encoder_channels=encoder.channels,
        grid=list(encoder.grid),
        preprocess=preprocess.to_dict(),
        rho=50,
    )
    return root, fields


def plan(corpus, **changes):
    root, fields = corpus
    return Plan.of(
        {
            "data": str(root/"data"),
            "store": str(root/"store"),
            "llm": str(root/"reader"),
            "stages": STAGES,
            "save_every": 10,
            "precision": "fp32",
            "model": {**fields, "whiten": True, "channels": 16, "answer_style": "text"},
            **changes,
        }
    )


def test_a_process_that_is_stopped_and_then_killed_continues_to_the_same_weights(corpus, tmp_path):
    """Two Ctrl-C reach the launching process and its group: the training saves and stops. Started again it is
    killed: the folder says so. Started a third time it reaches the weights of the uninterrupted run."""
    whole, cut = train(tmp_path/"whole", plan(corpus), progress=False), tmp_path/"cut"
    def reached(step):
        folder = cut/"checkpoints"/"stage-2"
        return lambda: any(step_of(c.parent) >= step for c in folder.glob("checkpoint-*/COMPLETE"))
    child = forked(lambda: launch(cut, plan(corpus), progress=False))
    until(reached(10))
    for _ in range(2):
        os.killpg(child, signal.SIGINT)
        time.sleep(.1)
    assert ended(child) == 1
    until(lambda: not processes_of(cut))
    assert RunFolder(cut).status == "stopped" and step_of(newest_whole(cut/"checkpoints"/"stage-2")) < 20

    told = []
    def launched():
        try: launch(cut, plan(corpus), progress=False)
        except MedVLM3DError as e: told.append(e)
    thread = threading.Thread(target=launched)
    thread.start()
    until(reached(20))
    os.kill(processes_of(cut)[0], signal.SIGKILL)
    thread.join()
    assert (
        "killed by signal 9" in told[0].why
        and RunFolder(cut).status == "failed"
        and "killed by signal 9" in RunFolder(cut).manifest["error"]
    )
    assert not (cut/"model").exists()
    again = launch(cut, plan(corpus))
    a, b = (MedVLM3D.from_pretrained(run/"model").state_dict() for run in (whole, again))
    assert again.status == "done" and all(torch.equal(a[name], b[name]) for name in a)


def test_plans_choices_arrive(corpus, tmp_path, monkeypatch, capsys):
    "Recomputed activations give the same weights; TensorBoard is written; long targets are counted."
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path/"events"))
    short = [{**STAGES[0], "epochs": 1}, {**STAGES[1], "epochs": 1}]
    once = train(tmp_path/"once", plan(corpus, stages=short), progress=False)
    again = train(
        tmp_path/"again",
        plan(corpus, stages=short, checkpointing=True, report_to="tensorboard", log_every=1),
        progress=False,
    )
    a, b = (MedVLM3D.from_pretrained(run/"model").state_dict() for run in (once, again))
    for name in a: torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
    assert list((tmp_path/"events").rglob("events.out.tfevents*")) and all(
        e["tokens_per_second"] > 0 and e["grad_norm"] > 0 for e in again.read_log()
    )
    card = (again/"model"/"README.md").read_text()
    assert (
        "Research use only" in card
        and "24 volumes, 0 targets cut" in card
        and "| 2 | report, closed, open | 0.005 | 4 × 2 × 1 | 3 |" in card
    )
    tight = {**plan(corpus).model, "context": 60}
    with pytest.raises(MedVLM3DError, match="tokens, room is for") as e:
        train(tmp_path/"tight", plan(corpus, stages=short, model=tight), progress=False)
    assert "truncate" in str(e.value)
    cut = train(
        tmp_path/"cut", plan(corpus, stages=short[:1], model=tight, policy="truncate"), progress=False
    )
    assert (
        0 < cut.manifest["truncated"] < cut.manifest["truncated_tokens"]
        and "targets are longer than the context leaves room for" in capsys.readouterr().out
    )
    assert f"({cut.manifest['truncated_tokens']} tokens)" in (cut/"model"/"README.md").read_text()


def packed(corpus, **how):
    "The corpus' training questions, packed for a reader with a context of 40."
    from medvlm3d.method.connector import MedVLM3DConfig
    from medvlm3d.features.store import FeatureStore
    from medvlm3d.method.language import load_tokenizer
    from medvlm3d.method.model import assemble
    reader = str(corpus[0]/"reader")
    model = assemble(
        MedVLM3DConfig(**{**plan(corpus).model, "context": 40}), load_llm(reader), load_tokenizer(reader)
    )
    samples = [s for s in load_m3d(corpus[0]/"data") if s.split == "train" and s.task != "report"]
    return (
        samples,
        model,
        PackedVolumes(
            samples,
            FeatureStore(corpus[0]/"store"),
            processor=model.processor,
            config=model.config,
            tasks=("closed", "open"),
            **how,
        ),
    )


def test_tokens_that_are_cut_are_counted_as_they_are_packed(corpus):
    samples, model, data = packed(corpus, policy="truncate")
    assert (
        measure_targets(samples, model.config, model.processor.tokenizer, "truncate")[1]
        == sum(data[i][2].truncated for i in range(len(data)))
        > 0
    )


def test_remembered_words_keep_their_ids(corpus):
    "Packing and truncating leave what is remembered as it was, and a second pass packs the same."
    _, model, data = packed(corpus, policy="truncate")
    first, tokenizer = [data[i][2] for i in range(len(data))], model.processor.tokenizer
    assert [data[i][2] for i in range(len(data))] == first
    assert data.segments.known and all(
        ids == (prompt_ids(tokenizer, p), target_ids(tokenizer, t))
        for (p, t), ids in data.segments.known.items()
    )


def test_features_made_otherwise_neither_train_nor_answer(corpus, tmp_path):
    "A store of the same shape, selected uniformly; and a volume that was exchanged after it was encoded."
    root, fields = corpus
    images = [s.image for s in load_m3d(root/"data")]
    uniform = encode_images(
        tmp_path/"uniform",
        root/"data",
        images=images,
        encoder=load_encoder("tiny", size=32),
        preprocess=Preprocess(8, 32, 32),
        rho=50,
        strategy="uniform",
        progress=False,
    )
    with pytest.raises(MedVLM3DError, match=r"strategy \(uniform → cosine\)"):
        train(tmp_path/"run", plan(corpus, store=str(tmp_path/"uniform")), progress=False)
    assert not (tmp_path/"run"/"conditions.json").exists()
    model = initial_model(plan(corpus), uniform, images[:4])
    with pytest.raises(MedVLM3DError, match="strategy"):
        predict_items(
            model,
            model.processor,
            samples=[],
            features=uniform,
            batch_size=4,
            out_path=tmp_path/"said.jsonl",
        )
    shutil.copytree(root/"data", tmp_path/"data")
    touched = tmp_path/"data"/images[0]
    touched.write_bytes(touched.read_bytes() + b"\0")
    with pytest.raises(MedVLM3DError, match="has changed since it was encoded") as e:
        train(tmp_path/"other", plan(corpus, data=str(tmp_path/"data")), progress=False)
    assert (
        "has 1 problem:" in str(e.value)
        and "M3D_Cap.json:train[0]" in str(e.value)
        and images[0] not in str(e.value)
    )


def test_a_store_or_a_base_exchanged_in_the_middle_is_noticed(corpus, tmp_path):
    "Both are conditions of a run; a run that began before they were is continued, and held to what it finds."
    root, fields = corpus
    for name in ("store", "reader"): shutil.copytree(root/name, tmp_path/name)
    given = plan(
        corpus,
        store=str(tmp_path/"store"),
        llm=str(tmp_path/"reader"),
        stages=[{**STAGES[0], "epochs": 1}],
    )
    train(tmp_path/"run", given, progress=False)
    file = tmp_path/"run"/"conditions.json"
    known = read_json(file)
    assert known["store"]["strategy"] == "cosine" and len(known["base"]) == 16
    write_text(file, json.dumps({k: known[k] for k in ("plan", "ranks")}))
    train(tmp_path/"run", given, progress=False)
    assert read_json(file) == known
    spec = read_json(tmp_path/"store"/"store.json")
    write_text(tmp_path/"store"/"store.json", json.dumps({**spec, "precision": "bfloat16"}))
    with pytest.raises(MedVLM3DError, match="store.precision: float32 → bfloat16"):
        train(tmp_path/"run", given, progress=False)
    write_text(tmp_path/"store"/"store.json", json.dumps(spec))
    torch.manual_seed(1)
    make_reader(reader_tokenizer(), hidden=48, layers=2, heads=4, seed=1).save_pretrained(tmp_path/"reader")
    with pytest.raises(MedVLM3DError, match=f"base: {known['base']} → "):
        train(tmp_path/"run", given, progress=False)


def test_adapters_named_twice_must_be_the_same(corpus, tmp_path):
    named = {**plan(corpus).model, "lora": {"r": 8, "alpha": 4, "dropout": .1, "targets": "all-linear"}}
    with pytest.raises(MedVLM3DError, match="r: 8 → 2"):
        train(tmp_path/"run", plan(corpus, model=named), progress=False)
    assert not (tmp_path/"run").exists()


def test_a_base_in_bfloat16_learns_in_float32_and_is_kept(corpus, tmp_path):
    "As in the paper's preset: the base is saved as it was loaded, what learned is in float32."
    given = plan(
        corpus,
        precision="bf16",
        model={**plan(corpus).model, "dtype": "bfloat16"},
        stages=[{**s, "epochs": 1} for s in STAGES],
    )
    run = train(tmp_path/"run", given, progress=False)
    kinds = {"learned": set(), "base": set()}
    for name, t in load_file(run/"model"/"model.safetensors").items():
        kinds["learned" if "connector" in name or "lora_" in name else "base"].add(t.dtype)
    assert kinds == {"learned": {torch.float32}, "base": {torch.bfloat16}}
    assert read_json(run/"conditions.json")["base"] == base_hash(load_llm(str(corpus[0]/"reader")))[:16]


def test_what_stands_in_two_splits_is_refused_or_recorded(corpus, tmp_path):
    "A report of the training split that is also one of the test split."
    shutil.copytree(corpus[0]/"data", tmp_path/"data")
    lists = json.loads((tmp_path/"data"/"M3D_Cap.json").read_text())
    texts = [tmp_path/"data"/lists[side][0]["text"] for side in ("train", "test")]
    texts[1].write_text(texts[0].read_text())
    (tmp_path/"data"/"phantom.json").unlink()   # it allows reports to coincide
    given = plan(corpus, data=str(tmp_path/"data"), stages=[{**STAGES[0], "epochs": .2}])
    with pytest.raises(MedVLM3DError, match="report"): train(tmp_path/"run", given, progress=False)
    run = launch(tmp_path/"run", given, allow_shared=True, progress=False)
    shared = run.manifest["shared"]
    assert (
        shared["allowed"]
        and shared["cases"] == 0
        and shared["reports"] >= 1
        and f"{shared['reports']} reports also in another split (allowed)"
        in (run/"model"/"README.md").read_text()
    )


def test_frozen_weights_and_the_table_of_what_learns(corpus, tmp_path):
    run = train(tmp_path/"run", plan(corpus, stages=[{**s, "epochs": 1} for s in STAGES]), progress=False)
    first, second = (MedVLM3D.from_pretrained(run/f"stage-{n}") for n in (1, 2))
    assert base_hash(first.llm) == base_hash(second.llm) == base_hash(load_llm(str(corpus[0]/"reader")))
    sizes = {part: n for part, n, _ in second.trainable_table()}
    table = {
        stage: {row["part"]: row["trained"] for row in rows}
        for stage, rows in run.manifest["trained"].items()
    }
    assert table == {
        "stage 1": {"connector": sizes["connector"], "adapters": 0, "language model": 0},
        "stage 2": {"connector": sizes["connector"], "adapters": sizes["adapters"], "language model": 0},
    }
    assert not torch.equal(first.connector.projector[0].weight, second.connector.projector[0].weight)


def test_offline_with_an_empty_cache_says_at_once_what_to_place_where(corpus, tmp_path):
    "Everything that is missing in one message, before anything is loaded."
    root = corpus[0]
    given = plan(corpus, llm="meta-llama/Llama-2-7b-hf", store=str(root/"nothing"), data=str(root/"nowhere"))
    write_text(tmp_path/"run"/"plan.yaml", yaml.safe_dump(given.to_dict()))
    ended = subprocess.run(
        [sys.executable, "-m", "medvlm3d.training.stages", str(tmp_path/"run")],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path/"empty")},
    )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    for word in ("needs 3 things", "meta-llama/Llama-2-7b-hf", "*.safetensors", "the features of its volumes",
                 "nowhere", "Nothing was begun"):
        assert word in ended.stderr, ended.stderr


def test_a_language_model_that_is_not_whole_or_not_in_reach_is_missed_at_once(corpus, tmp_path, monkeypatch):
    "A shard or the tokenizer left behind in a folder; a name on a hub that does not answer."
    import huggingface_hub
    from medvlm3d.method.language import load_tokenizer
    for lost in ("model.safetensors", "tokenizer.json"):
        folder = shutil.copytree(corpus[0]/"reader", tmp_path/lost)
        (folder/lost).unlink()
        with pytest.raises(MedVLM3DError, match=f"{lost}.* is missing in"):
            train(tmp_path/"run", plan(corpus, llm=str(folder)), progress=False)
    with pytest.raises(MedVLM3DError, match="has no tokenizer that can be read"):
        load_tokenizer(str(tmp_path/"tokenizer.json"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path/"hub"))
    def no_network(*_, **__): raise ConnectionError("no network")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", no_network)
    why = r"\((the hub does not give it \(ConnectionError\)|HF_HUB_OFFLINE is set)\)"
    with pytest.raises(MedVLM3DError, match="meta-llama/Llama-2-7b-hf: the language model " + why):
        train(tmp_path/"run", plan(corpus, llm="meta-llama/Llama-2-7b-hf"), progress=False)
    assert not (tmp_path/"run").exists()


def test_smollm2_learns_speaks_and_is_saved_as_a_reference(corpus, tmp_path):
    "SmolLM2-135M: the loss falls within a few steps, it generates, and only what was trained is saved."
    root, fields = corpus
    stages = [
        {**STAGES[0], "epochs": 3, "lr": 2e-3, "batch": 2},
        {**STAGES[1], "tasks": ["closed"], "epochs": 3, "lr": 1e-3, "batch": 2, "accumulation": 1},
    ]
    given = plan(
        corpus,
        llm=None,
        stages=stages,
        save_every=1000,
        model={**fields, "llm_reference": {"name": "smollm2", "sha256": None}},
    )
    from medvlm3d.features.store import FeatureStore
    store = FeatureStore(root/"store")
    samples = [s for s in load_m3d(root/"data") if s.split == "train"]
    samples = [s for s in samples if s.image in {t.image for t in samples[:4]}]
    model, run = initial_model(given, store, [s.image for s in samples[:4]]), RunFolder(tmp_path/"run")
    run.path.mkdir()
    for stage in given.stages:
        train_stage(
            run,
            given,
            stage=stage,
            model=model,
            data=PackedVolumes(
                samples, store, processor=model.processor, config=model.config, tasks=stage.tasks
            ),
        )
        losses = [e["loss"] for e in run.read_log() if e["stage"] == stage.stage]
        assert losses[-1] < losses[0], losses
    model.eval().save_pretrained(tmp_path/"saved")
    assert sum(f.stat().st_size for f in (tmp_path/"saved").glob("*.safetensors")) < 60e6
    loaded = MedVLM3D.from_pretrained(tmp_path/"saved")
    features = store[samples[0].image][0][None].float()
    said = [
        m.say(features, "Describe what can be seen in this volume.", max_new_tokens=12)
        for m in (model, loaded)
    ]
    assert said[0] == said[1] and said[0].strip()


TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def base_of(folder, kind, template, texts, positions=512):
    "A random language model of a family, with a byte-level tokenizer learned from `texts`."
    tokenizer = piece_tokenizer(texts, 400)
    tokenizer.chat_template = template
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    config = kind(vocab_size=len(tokenizer) + 3, max_position_embeddings=positions, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family, template", [(LlamaConfig, None), (Qwen2Config, TURNS), (GPTNeoXConfig, TURNS)])
def test_any_causal_language_model_learns_and_is_saved_with_its_template(corpus, tmp_path, family, template):
    root, fields = corpus
    texts = [s.answer for s in load_m3d(root/"data")]
    llm = base_of(tmp_path/"base", family, template, texts)
    name, own = base_fields(llm, reader="")
    stages = [{**stage, "epochs": 1, "lora": stage.get("lora") and {**stage["lora"], "targets": "all-linear"}} for stage in STAGES]
    model = {**fields, "whiten": True, "channels": 16, **own}
    run = train(tmp_path/"run", plan(corpus, llm=name, model=model, stages=stages), progress=False)
    saved = MedVLM3D.from_pretrained(run/"model")
    assert type(saved.llm.config) is family and saved.config.llm_reference is None
    tokenizer = saved.processor.tokenizer
    head = "<|user|>" if template else ""
    assert tokenizer.decode(image_prefix(tokenizer, 1)).startswith(f"{head}<image>")
    assert tokenizer.decode(prompt_ids(tokenizer, "Where is the lesion?")).endswith("lesion?" + ("<eos><|assistant|>" if template else ""))
    sample = next(s for s in load_m3d(root/"data") if s.task == "report")
    options = dict(features=FeatureStore(root/"store"), batch_size=1, out_path=tmp_path/"answers.jsonl", max_new_tokens=4)
    line, = predict_items(saved, saved.processor, samples=[sample], **options)
    assert line["error"] is None and run.manifest["unknown"]["train"]["unknown"] == 0


def test_reports_that_the_small_reader_cannot_read_are_refused_with_the_ways_out(corpus, tmp_path, capsys):
    root, _ = corpus
    samples = [replace(s, answer=f"Hepatic steatosis with {n} cm hypodense lesion in segment VI, no ascites.", where="")
               if s.task == "report" else s for n, s in enumerate(load_m3d(root/"data"))]
    shutil.copytree(root/"data", tmp_path/"data")
    write_manifest(tmp_path/"data"/"own.jsonl", samples)
    own = plan(corpus, data=str(tmp_path/"data"/"own.jsonl"))
    with pytest.raises(MedVLM3DError, match="llm=own.*smollm2.*folder or hub id"): train(tmp_path/"run", own, progress=False)
    shown = capsys.readouterr().out
    assert "train: " in shown and "test: " in shown and "are unknown (" in shown
    assert RunFolder(tmp_path/"run").manifest["unknown"]["train"]["share"] > .1
