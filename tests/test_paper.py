"""The paper's preset: published formats, real widths, and a plan that names what is missing."""
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from processes import command

from medvlm3d.front.cli import app
from medvlm3d.base.core import MedVLM3DError, read_json, seed_everything
from medvlm3d.method.encoders import load_encoder
from medvlm3d.method.weights import quietly
from medvlm3d.method.language import base_hash, load_llm, load_tokenizer
from medvlm3d.method.model import MedVLM3D, assemble, paper
from medvlm3d.phantoms.phantom import make_phantom
from medvlm3d.training.parts import cut_short, llm_parts
from medvlm3d.training.plan import Plan
from medvlm3d.training.paper import Corpus, dry_run, load_of
from medvlm3d.training.paper import paper_plan, start
from medvlm3d.front.runners import run_plan
from medvlm3d.method.tokens import build_prompt, image_prefix, prompt_ids, target_ids
from medvlm3d.method.packing import collate, pack_examples, padding_id
from medvlm3d.training.plan import paper_stages
from medvlm3d.scans.prepare import Preprocess

MEAN, STD = [.48145466, .4578275, .40821073], [.26862954, .26130258, .27577711]
TEXTS = ["The liver is normal.", "Which organ is enlarged? Choices: A. liver B. spleen",
         "Where is the lesion? In the left lung, segment 4.", "This provides an overview of the picture."]


# --- the encoders' folders ---

def biomedclip(folder, state, revision, name="vit_base_patch16_224"):
    "BiomedCLIP as on the hub: both towers in one file, and either revision of its configuration."
    text = {"hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract", "context_length": 256}
    text |= ({"hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler"} if revision == "new"
             else {"proj": "mlp", "pooler_type": "cls_last_hidden_state_pooler"})
    config = {
        "embed_dim": 512,
        "vision_cfg": {
            "timm_model_name": name,
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": text,
    }
    if revision == "new": config = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    folder.mkdir()
    (folder/"open_clip_config.json").write_text(json.dumps(config))
    tensors = {f"visual.trunk.{n}": t for n, t in state.items()}
    tensors |= {
        "visual.head.proj.weight": torch.zeros(512, 8),
        "text.transformer.embeddings.word_embeddings.weight": torch.zeros(9, 4),
        "logit_scale": torch.ones(()),
    }
    if revision == "new": save_file(tensors, folder/"open_clip_model.safetensors")
    else: torch.save(tensors, folder/"open_clip_pytorch_model.bin")
    return folder


@pytest.mark.parametrize("revision", ["old", "new"])
def test_biomedclip_at_full_width_by_its_name(tmp_path, monkeypatch, revision):
    import timm
    seed_everything(0)
    trunk, image = timm.create_model("vit_base_patch16_224", num_classes=0).eval(), torch.rand(1, 1, 224, 224)
    monkeypatch.setenv(
        "MEDVLM3D_BIOMEDCLIP", str(biomedclip(tmp_path/"biomedclip", trunk.state_dict(), revision))
    )
    encoder = load_encoder("biomedclip")
    pixels = (image - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    with torch.no_grad(): expected = trunk.forward_features(pixels)[:, 1:]
    assert encoder(image).shape == (1, 1, 196, 768) and torch.allclose(encoder(image)[0], expected, atol=1e-5)


def openai_state(width, depth, patch):
    "A CLIP image tower under OpenAI's names, in float16 as published."
    seed_everything(0)
    draw = lambda *shape: (.02 * torch.randn(*shape)).half()
    state = {"class_embedding": draw(width), "positional_embedding": draw((224 // patch) ** 2 + 1, width),
             "proj": draw(width, 768), "conv1.weight": draw(width, 3, patch, patch)}
    blocks = [f"transformer.resblocks.{i}" for i in range(depth)]
    for norm in ("ln_pre", "ln_post", *(f"{block}.ln_{k}" for block in blocks for k in (1, 2))):
        state |= {f"{norm}.weight": torch.ones(width).half(), f"{norm}.bias": draw(width)}
    for i in range(depth):
        at = f"transformer.resblocks.{i}."
        state |= {
            at + "attn.in_proj_weight": draw(3 * width, width),
            at + "attn.in_proj_bias": draw(3 * width),
            at + "attn.out_proj.weight": draw(width, width),
            at + "attn.out_proj.bias": draw(width),
            at + "mlp.c_fc.weight": draw(4 * width, width),
            at + "mlp.c_fc.bias": draw(4 * width),
            at + "mlp.c_proj.weight": draw(width, 4 * width),
            at + "mlp.c_proj.bias": draw(width),
        }
    return {f"visual.{n}": t for n, t in state.items()} | {
        "logit_scale": torch.ones(()).half(),
        "token_embedding.weight": draw(9, 8),
    }


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.pt"])
def test_clip_vit_l_14_as_openai_named_it(tmp_path, monkeypatch, file):
    "Width 1024 on a grid of 16 × 16, two layers; from safetensors, and from a pickle with a `state_dict`."
    state = openai_state(1024, 2, 14)
    (tmp_path/"open_clip_config.json").write_text(
        json.dumps(
            {
                "model_cfg": {
                    "embed_dim": 768,
                    "quick_gelu": True,
                    "text_cfg": {},
                    "vision_cfg": {"image_size": 224, "layers": 2, "width": 1024, "patch_size": 14},
                },
                "preprocess_cfg": {"mean": MEAN, "std": STD},
            }
        )
    )
    if file.endswith("pt"): torch.save({"epoch": 32, "state_dict": state}, tmp_path/file)
    else: save_file(state, tmp_path/file)
    monkeypatch.setenv("MEDVLM3D_CLIP_VIT_L_14", str(tmp_path))
    found = load_encoder("clip-vit-l-14")(torch.rand(1, 2, 224, 224))
    assert found.shape == (1, 2, 256, 1024) and found.dtype == torch.float32 and found.isfinite().all()


@pytest.mark.parametrize("name, width, patch, file", [("pubmedclip", 768, 32, "pytorch_model.bin"),
                                                      ("clip-vit-l-14", 1024, 14, "model.safetensors")])
def test_clip_as_transformers_stores_it(tmp_path, monkeypatch, name, width, patch, file):
    from transformers import CLIPConfig, CLIPModel
    config = CLIPConfig(
        vision_config=dict(
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=width // 64,
            patch_size=patch,
            image_size=224,
        ),
        text_config=dict(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=50,
            bos_token_id=0,
            eos_token_id=1,
        ),
        projection_dim=64,
    )
    state = CLIPModel(config).state_dict() | {"vision_model.embeddings.position_ids": torch.arange(10)[None]}
    (tmp_path/"config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["CLIPModel"]}))
    if file.endswith("bin"): torch.save(state, tmp_path/file)
    else: save_file(state, tmp_path/file, {"format": "pt"})
    monkeypatch.setenv("MEDVLM3D_" + name.upper().replace("-", "_"), str(tmp_path))
    assert load_encoder(name)(torch.rand(1, 1, 224, 224)).shape == (1, 1, (224 // patch) ** 2, width)


def test_a_torchscript_archive_is_a_program_and_is_not_run(tmp_path):
    torch.jit.save(
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path/"open_clip_pytorch_model.pt"
    )
    (tmp_path/"open_clip_config.json").write_text(
        json.dumps(
            {"vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "patch_size": 32}, "embed_dim": 8}
        )
    )
    with pytest.raises(
        MedVLM3DError,
        match=r"open_clip_pytorch_model.pt: is not a plain file of weights.*Convert it to safetensors",
    ):
        load_encoder(tmp_path)


# --- LLaMA-2's folder ---

@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    "LLaMA-2 as on the hub, shrunk: float16 shards, an index, rotary tables, both forms of the tokenizer."
    import sentencepiece
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer
    folder, words = tmp_path_factory.mktemp("llama")/"Llama-2-7b-hf", tmp_path_factory.mktemp("words")/"text"
    words.write_text("\n".join(TEXTS * 30))
    sentencepiece.SentencePieceTrainer.train(
        input=str(words),
        model_prefix=str(words),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    seed_everything(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=340,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=4,
            rms_norm_eps=1e-5,
        )
    )
    model.half().save_pretrained(folder, max_shard_size="100KB")
    index = json.loads((folder/"model.safetensors.index.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[0]
    save_file(
        {**load_file(folder / shard), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
        folder / shard,
        {"format": "pt"},
    )
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = shard
    (folder/"model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(words.with_suffix(".model"), folder/"tokenizer.model")
    (folder/"tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "add_bos_token": True,
                "add_eos_token": False,
                "legacy": False,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "pad_token": None,
                "model_max_length": 10**30,
                "clean_up_tokenization_spaces": False,
            }
        )
    )
    LlamaTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder/"tokenizer.json"))
    return folder


def test_llama_loads_whole_from_its_shards(llama):
    assert len(list(llama.glob("model-*.safetensors"))) > 1 and all(p.found for p in llm_parts(llama))
    model = load_llm(llama)
    assert next(model.parameters()).dtype == torch.float32
    assert (
        base_hash(model) == base_hash(load_llm(llama))
        and model(torch.arange(9)[None]).logits.isfinite().all()
    )


@pytest.mark.parametrize("keep", ["both", "tokenizer.json", "tokenizer.model"])
def test_llamas_tokenizer_in_each_of_its_forms(llama, tmp_path, keep):
    kept = ("tokenizer.json", "tokenizer.model") if keep == "both" else (keep,)
    for file in ("config.json", "tokenizer_config.json", *kept):
        shutil.copy(llama/file, tmp_path/file)
    tok = load_tokenizer(tmp_path)
    tok.add_tokens(["<image>"], special_tokens=True)
    ids = build_prompt(tok, TEXTS[1], 5) + target_ids(tok, "B. spleen")
    assert (
        ids.count(tok.bos_token_id) == 1
        and ids[0] == tok.bos_token_id == 1
        and ids[-1] == tok.eos_token_id == 2
    )
    assert ids.count(tok.convert_tokens_to_ids("<image>")) == 5 and padding_id(tok) == tok.eos_token_id
    assert (
        tok.decode(ids, skip_special_tokens=True).split()
        == f"This provides an overview of the picture. {TEXTS[1]} B. spleen".split()
    )


@pytest.mark.parametrize("fault", ["cut", "missing"])
def test_a_broken_shard_is_named(llama, tmp_path, fault):
    folder = shutil.copytree(llama, tmp_path/"llama")
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    if fault == "cut": shard.write_bytes(shard.read_bytes()[:-100])
    else: shard.unlink()
    bad, = [p for p in llm_parts(folder) if not p.found]
    assert bad.file == shard.name and ("cut short" if fault == "cut" else "missing") in bad.where
    assert fault == "missing" or cut_short(shard)


# --- from folders to a step ---

def shrunk(llama, encoder, **changes):
    "The paper's preset over shrunk parts: a ViT of 192 channels on a grid of 14 × 14, eight slices."
    return paper(
        **{
            **dict(
                encoder=str(encoder),
                encoder_channels=192,
                preprocess=Preprocess(8, 224, 224).to_dict(),
                rho=25,
                dtype="float32",
                llm_reference={"name": str(llama), "sha256": None},
            ),
            **changes,
        }
    )


def test_the_preset_runs_from_the_published_formats(llama, tmp_path):
    "Scan → BiomedCLIP's folder → connector → LLaMA's folder → words; saved without the bases."
    import timm
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    model = assemble(
        shrunk(llama, biomedclip(tmp_path/"encoder", state, "new", "vit_tiny_patch16_224"))
    ).eval()
    answer = model.ask(torch.rand(8, 224, 224), "Which organ is enlarged?", ["liver", "spleen"])
    assert model.config.visual_tokens == 49 and answer.text in ("liver", "spleen")
    model.save_pretrained(tmp_path/"saved")
    assert not any(
        "embed_tokens" in name or "trunk" in name
        for name in load_file(tmp_path/"saved"/"model.safetensors")
    )
    assert MedVLM3D.from_pretrained(tmp_path/"saved").ask(
        torch.zeros(8, 224, 224), "Which organ?", ["liver", "lung"]
    ).text in ("liver", "lung")


def test_one_step_of_both_stages_at_full_connector_width(llama):
    "14 of 50 slices, 14 × 14 × 768 → 343 tokens of 4096, before a shallow LLaMA: only what learns changes."
    tok = load_tokenizer(llama)
    text = dict(model_type="llama", vocab_size=len(tok), hidden_size=4096, intermediate_size=512,
                num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=32)
    with quietly():
        model = assemble(
            paper(text_config=text, llm_reference=None, lora=None, dtype="float32"), tokenizer=tok
        )
    assert model.config.visual_tokens == 343
    questions = [
        (prompt_ids(tok, TEXTS[1]), target_ids(tok, "B. spleen")),
        (prompt_ids(tok, "Where is the lesion?"), target_ids(tok, "In the left lung.")),
    ]
    batch = collate(
        [pack_examples(image_prefix(tok, 343), questions, context=model.config.context)], padding_id(tok)
    )
    features = torch.randn(1, 14, 196, 768).bfloat16()
    for stage in paper_stages():
        if stage.lora: model.add_lora(**stage.lora)
        model.set_stage(stage.stage).train()
        frozen, learn = (
            base_hash(model.llm),
            {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad},
        )
        optimiser = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=stage.lr,
            weight_decay=stage.weight_decay,
            foreach=False,
        )
        loss = model(**batch, features=features).loss
        loss.backward()
        assert loss.isfinite() and all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimiser.step()
        still = [n for n, p in model.named_parameters() if n in learn and torch.equal(p, learn[n])]
        assert base_hash(model.llm) == frozen and all("lora_A" in n for n in still), (
            still
        )  # B starts at zero: no gradient for A
        assert {n.split(".")[0] for n in learn} == (
            {"connector"} if stage.stage == 1 else {"connector", "llm"}
        )
        optimiser.zero_grad()


# --- the plan ---

@pytest.fixture()
def nothing(tmp_path, monkeypatch):
    "A machine without weights, data, cache and network."
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path/"hub"))
    monkeypatch.setenv("MEDVLM3D_HOME", str(tmp_path/"home"))
    for name in ("BIOMEDCLIP", "PUBMEDCLIP", "CLIP_VIT_L_14"):
        monkeypatch.delenv(f"MEDVLM3D_{name}", raising=False)
    import socket
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the dry run asked the network"))
    return tmp_path


def test_on_a_bare_machine_it_plans_everything_and_lists_everything_missing(nothing):
    plan = dry_run("paper")
    told, tables = str(plan), plan.to_dict()["tables"]
    assert not plan.ready and told.endswith("Not ready: see what is missing. Research use only.")
    assert [r["learn in stage 2"] for r in tables["Parameters"]] == [
        "0",
        "44,709,888",
        "39,976,960",
        "0",
        "84,686,848",
    ]
    assert [r["steps"] for r in tables["Work"][:2]] == ["3,594", "4,792"] and "343 visual" in told
    assert (
        14
        < float(tables["Memory on each GPU, GB"][-1]["stage 1"])
        < float(tables["Memory on each GPU, GB"][-1]["stage 2"])
        < 80
    )
    assert "Each rank first fills 13.8 GB of the machine's own memory" in told
    assert {r["there"] for r in tables["Files"]} == {"NO"}
    for word in ("MEDVLM3D_BIOMEDCLIP", "hf download meta-llama/Llama-2-7b-hf",
                 "model-00002-of-00002.safetensors",
                 "tokenizer.json", "M3D_Cap.json", "M3D_VQA_train.csv", "home/m3d/"):
        assert word in told, word


def test_hours_follow_the_rate_and_the_gpus(nothing):
    hours = lambda **k: float(dry_run(**k).to_dict()["tables"]["Time"][-1]["hours, floor"])
    assert hours(rate=10., gpus=4) == pytest.approx(2 * hours(rate=20., gpus=4), rel=.01)
    with pytest.raises(MedVLM3DError, match="at least one GPU"): dry_run(rate=0.)
    with pytest.raises(MedVLM3DError, match="Choose one of paper"): dry_run("papre")


def test_with_everything_in_place_it_is_ready_and_measures_the_words(nothing, llama, monkeypatch):
    make_phantom(nothing/"m3d", train=6, validation=2, test=2, shape=(8, 32, 32), workers=1, progress=False)
    monkeypatch.setenv(
        "MEDVLM3D_BIOMEDCLIP", str(biomedclip(nothing/"encoder", {"norm.weight": torch.ones(768)}, "new"))
    )
    plan = dry_run("paper", data=nothing/"m3d", llm=llama)
    assert plan.ready and str(plan).endswith("Ready."), str(plan)
    assert "6 volumes" in str(plan) and "lengths measured" in str(plan)
    (nothing/"m3d"/"M3D_VQA_val.csv").unlink()
    assert [
        r["file"]
        for r in dry_run("paper", data=nothing/"m3d", llm=llama).to_dict()["tables"]["Files"]
        if r["there"] == "NO"
    ] == ["M3D_VQA_val.csv"]


def typed(*words):
    "The command line in this process: its result."
    return CliRunner().invoke(app, [str(w) for w in words], env={"COLUMNS": "200"})


def test_the_dry_run_as_a_command(nothing):
    "Text, JSON, and the share of the rate."
    shown = typed("train", "--preset", "paper", "--dry-run", "--gpus", 8, "--share", .3)
    assert (
        shown.exit_code == 0
        and "hours at 30%" in shown.output
        and shown.output.rstrip().endswith("Not ready: see what is missing. Research use only.")
    )
    found = json.loads(typed("train", "--preset", "paper", "--dry-run", "--json").output)
    assert (
        found == dry_run("paper").to_dict()
        and not found["ready"]
        and [r["steps"] for r in found["tables"]["Work"][:2]] == ["3,594", "4,792"]
    )


def test_changes_of_the_preset_are_in_its_plan_and_in_its_estimate(nothing, llama):
    import yaml
    changes = ("-p", "stage1_lr=1e-3", "-p", "batch=3", "-p", "stage2_epochs=1")
    shown = typed("train", "--preset", "paper", "--out", nothing/"run", "--llm", llama, "--gpus", 2, *changes)
    assert shown.exit_code == 0 and "3 × 2 × 2 volumes a step" in shown.output
    first, second = Plan.of(yaml.safe_load((nothing/"run"/"plan.yaml").read_text())).stages
    assert (first.lr, second.lr, first.batch, second.batch, second.epochs) == (1e-3, 2e-5, 3, 3, 1)
    work = json.loads(typed("train", "--preset", "paper", "--dry-run", "--json", *changes).output)["tables"]["Work"]
    assert [row["steps"] for row in work[:2]] == ["14,376", "4,792"]


def test_the_plan_as_a_command(nothing, llama, monkeypatch):
    "It is written to any folder, with what is missing and what to type; nothing begins incomplete."
    import yaml
    assert "Add --out FOLDER" in str(typed("train", "--preset", "paper").exception)
    shown = typed("train", "--preset", "paper", "--out", nothing/"run", "--llm", llama, "--gpus", 2)
    assert shown.exit_code == 0 and "12 × 2 × 2 volumes a step" in shown.output
    for line in (f"torchrun --standalone --nproc-per-node 2 -m medvlm3d.training.stages {nothing/'run'}",
                 f"--module medvlm3d.training.stages {nothing/'run'}", f"runs/slurm.sbatch {nothing/'run'}",
                 "-m medvlm3d features",
                 "--encoder biomedclip --depth 50 --size 224 --rho 28 --strategy cosine --grid 14 14",
                 "Missing:", "M3D_Cap.json", "store.json"):
        assert line in shown.output, line
    plan = Plan.of(yaml.safe_load((nothing/"run"/"plan.yaml").read_text()))
    assert (plan == paper_plan(llm=llama) and plan.llm == str(llama)
            and (plan.precision, plan.checkpointing, plan.deepspeed) == ("bf16", True, "runs/zero2.json"))
    asked = typed("train", "--preset", "paper", "--out", nothing/"run", "--llm", llama, "--start")
    assert (
        isinstance(asked.exception, MedVLM3DError)
        and "needs 2 things that are not there" in str(asked.exception)
        and not (nothing/"run"/"manifest.json").exists()
    )


def test_the_plan_runs_shrunk_from_data_to_model(nothing, llama, monkeypatch):
    """The preset's own function with smaller sizes: a phantom → BiomedCLIP's folder → features → a step of
    both stages under ZeRO-2 in bf16, activations recomputed, before LLaMA's folder → a model that answers."""
    import timm
    make_phantom(nothing/"m3d", train=2, validation=1, test=1, shape=(8, 32, 32), workers=1, progress=False)
    tower = biomedclip(
        nothing/"encoder",
        timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(),
        "new",
        "vit_tiny_patch16_224",
    )
    sizes = dict(
        encoder=str(tower),
        encoder_channels=192,
        preprocess=Preprocess(8, 224, 224).to_dict(),
        rho=25,
        context=1024,
    )
    plan = paper_plan(
        nothing/"m3d",
        nothing/"store",
        llama,
        [replace(s, epochs=1, batch=2, accumulation=1) for s in paper_stages()],
        **sizes,
    )
    command("features", plan.data, plan.store, "--encoder", tower, "--depth", 8, "--rho", 25, "--quiet", "--float32")
    run = start(nothing/"run", replace(plan, workers=0), progress=False)
    trained, conditions = run.manifest["trained"], read_json(run/"conditions.json")
    assert (
        run.status == "done"
        and [(e["stage"], e["step"]) for e in run.read_log()] == [(1, 1), (2, 1)]
        and conditions["store"]["rho"] == 25
    )
    assert {s: [r["trained"] > 0 for r in rows] for s, rows in trained.items()} == {
        "stage 1": [True, False, False],
        "stage 2": [True, True, False],
    }
    assert run.manifest["truncated"] == 0 and not any(
        "embed_tokens" in n for n in load_file(run/"model"/"model.safetensors")
    )
    model = MedVLM3D.from_pretrained(run/"model", llm=str(llama), dtype=torch.float32)
    assert model.ask(torch.rand(8, 224, 224), "Which organ is enlarged?", ["liver", "spleen"]).text in (
        "liver",
        "spleen",
    )


def test_steps_of_a_given_size_are_measured_by_a_runner(tmp_path):
    "Through papermill: what is passed arrives, and both stages are measured."
    (record,) = run_plan(
        {"98_paper_step": {"out": str(tmp_path/"out"), "steps": 1, "hidden": 16, "rate": 0.5}},
        tmp_path/"out",
        show=False,
        tell=lambda _: None,
    )
    found, config = read_json(tmp_path/"out"/"results.json"), (tmp_path/"out"/"config.yaml").read_text()
    assert record.exists() and [
        (s["stage"], s["steps"], s["volumes a second"] > 0, 0 < s["share of the rate"] < 1)
        for s in found["stages"]
    ] == [(1, 1, True, True), (2, 1, True, True)]
    assert (
        found["rate"] == 0.5
        and "hidden_size: 16" in config
        and (tmp_path/"out"/"tables"/"paper-step.md").exists()
    )


def test_packing_shortens_the_work():
    packed, apart = (
        load_of(paper_stages()[1], Corpus("", 960, 4.0), config=paper(), gpus=4, packed=p)
        for p in (True, False)
    )
    assert (packed.batch, packed.sequences, apart.sequences, packed.steps, apart.steps) == (
        96,
        960,
        4800,
        40,
        200,
    )
    assert packed.tokens == 343 + 13 + 130 + 240
