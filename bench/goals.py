"""Measure what this project promises about its own cost: seven goals about time, memory and bytes.

    python bench/goals.py reports/efficiency                   # the paper's shapes: five minutes and 8 GB
    python bench/goals.py runs/out/goals --rounds 1 --small        # seconds; ratios mean nothing at these sizes
    python bench/goals.py runs/out/goals --sizes '{"depth": 32}'   # any field of `Sizes`

Writes `results.json` into the run folder (relative to the project root): a list of findings, each with its
goal, the measured value, the extremes within rounds, the target, and whether it is met. A finished run of the
same sizes is read and not measured again. The goals were set before they were measured. They are ratios
within one process, since seconds belong to a machine. What is missed is reported as missed.

    goal  what                                                                       at most
    G1    even-odd frequency path over the transform: forward; with backward; error  0.45; 0.6; 1e-5
    G2    encoder over its own matrix products; chunks of 10 over all slices at
          once: memory, time; bf16 over float32                                      1.25; 0.5; 1.1; 0.65
    G3    stored features to tokens over the 3D tower: explicit, fused; uncached     0.15; 0.25; 2.2
    G4    a training step from stored features over the 3D tower's; its peak memory  0.12; 0.2
    G5    megabytes of a stored volume; difference in loss by storing it             4.25; 0
    G6    packed over padded to the context, time a question; loss and gradient      0.35; 1e-5
    G7    prefill work without reuse of the prefix over with                         at least 2.5
"""
import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save, save_file

from medvlm3d.base.core import RunFolder, open_run, project_root, seed_everything, write_json
from medvlm3d.evaluation.answering import Prefix, score_rows
from medvlm3d.features.store import FeatureStore, encode_images
from medvlm3d.method.fusion import even_odd_path, fourier_path
from medvlm3d.method.model import tiny
from medvlm3d.method.packing import collate, pack_examples, packed_mask, padding_id
from medvlm3d.method.tokens import image_prefix, prompt_ids, target_ids, target_loss
from medvlm3d.scans.prepare import Preprocess
from medvlm3d.studies.efficiency import (Finding, Tower3D, interleave, measured, peak_memory,
                                         random_connector,
                                         random_encoder)
from medvlm3d.training.cost import count_flops


@dataclass(frozen=True)
class Sizes:
    """What is measured. The defaults are the paper's shapes and M3D's, except for the language model of the
    packing test, whose ratio does not depend on its size."""
    channels: int = 768
    heads: int = 12
    blocks: int = 12
    grid: int = 14
    depth: int = 50
    hidden: int = 4096
    scan: tuple = (32, 256, 256)
    text: tuple = (384, 1024, 4, 4096)      # of the language model: hidden, MLP, blocks, vocabulary
    questions: int = 5
    words: int = 60                         # of a question: two thirds prompt, one third answer
    context: int = 512


def small():
    "Sizes for tests."
    return Sizes(channels=32, heads=2, blocks=2, grid=4, depth=16, hidden=24, scan=(8, 32, 32),
                 text=(32, 48, 2, 50),
                 questions=3, words=12, context=40)


def as_sizes(sizes): return sizes if isinstance(sizes, Sizes) else Sizes(**sizes)


# --- G1: the frequency path -----------------------------------------------------------------------

def frequency_findings(sizes, rounds):
    "The even-odd form against the transform to the letter, float32: forward alone and with backward."
    C, n = sizes.channels, sizes.grid
    x = torch.randn(1, n, n, n, C, requires_grad=True)
    A = torch.randn(C, C).mul_(C ** -.5).requires_grad_()
    B = torch.randn(C, C).mul_(C ** -.5).requires_grad_()
    a = torch.randn(C, requires_grad=True)

    def forward(path): return lambda: path(x.detach(), A.detach(), B.detach(), a.detach())
    def both(path): return lambda: torch.autograd.grad(path(x, A, B, a).sum(), [x, A, B, a])

    times = interleave({"fast forward": forward(even_odd_path), "fast both": both(even_odd_path),
                        "fft forward": forward(fourier_path), "fft both": both(fourier_path)}, rounds)
    exact = forward(fourier_path)()
    error = (forward(even_odd_path)() - exact).abs().max() / exact.abs().max()
    return [measured("G1", "frequency path, forward, over the transform", target=.45, times=times,
                     name="fast forward", base="fft forward"),
            measured("G1", "the same with backward", target=.6, times=times, name="fast both",
                     base="fft both"),
            Finding("G1", "largest error over largest value", error.item(), 1e-5)]


# --- G2: the encoder against its own products -----------------------------------------------------

def encode(sizes, slices=10, *, blocks=None, chunk=10, dtype=torch.float32):
    "A case for `peak_memory`: builds an encoder and slices; returns the function that encodes them."
    sizes = as_sizes(sizes)
    encoder = random_encoder(sizes.channels, heads=sizes.heads, blocks=blocks or sizes.blocks,
                             grid=sizes.grid,
                             chunk=chunk, dtype=dtype)
    x = torch.rand(1, slices, encoder.size, encoder.size)
    return lambda: encoder(x)


def products(sizes, slices, blocks):
    "A function that does the matrix products of a ViT over `slices`, and nothing else."
    C, n, heads = sizes.channels, sizes.grid ** 2 + 1, sizes.heads
    rows, wide = torch.randn(slices * n, C), torch.randn(slices * n, 4 * C)
    qkv, out = torch.randn(3 * C, C), torch.randn(C, C)
    up, down = torch.randn(4 * C, C), torch.randn(C, 4 * C)
    q, attention = torch.randn(slices * heads, n, C // heads), torch.randn(slices * heads, n, n)

    def run():
        for _ in range(blocks):
            rows @ qkv.T
            q @ q.mT
            attention @ q
            rows @ out.T
            rows @ up.T
            wide @ down.T
        rows[:slices * (n - 1)] @ out.T      # patches to vectors: as many inputs as channels
    return run


def encoder_findings(sizes, rounds, blocks=2):
    "Over the products alone, in chunks, and in bf16. A few blocks stand for all, since they are alike."
    D = sizes.depth
    times = interleave({"encoder": encode(sizes, blocks=blocks),
                        "floor": products(sizes, 10, blocks),
                        "bf16": encode(sizes, blocks=blocks, dtype=torch.bfloat16),
                        "chunks": encode(sizes, D, blocks=1),
                        "at once": encode(sizes, D, blocks=1, chunk=D)}, rounds)
    def peak(chunk):
        return peak_memory("bench.goals", "encode", after_building=True, sizes=asdict(sizes), slices=D,
                           blocks=1,
                           chunk=chunk)
    return [measured("G2", "encoder over its own matrix products", target=1.25, times=times, name="encoder",
                     base="floor"),
            Finding("G2", "peak memory, chunks of 10 over all slices at once", peak(10) / peak(D), .5),
            measured("G2", "time of the same", target=1.1, times=times, name="chunks", base="at once"),
            measured("G2", "bf16 over float32", target=.65, times=times, name="bf16", base="encoder")]


# --- G3, G4: from stored features to tokens, against the 3D tower ---------------------------------

def stored_reader(features):
    "A function that reads these features from a safetensors file, as training does: (1, D̂, N, C)."
    path = Path(tempfile.mkdtemp())/"features.safetensors"
    save_file({"features": features}, path)
    return lambda: load_file(path)["features"][None]


def contestant(sizes, name):
    "(module, function that gives its input): `cached` (stored features), `explicit` or `fused` (3D towers)."
    if name == "cached":
        connector, features = random_connector(sizes.channels, grid=sizes.grid, depth=sizes.depth,
                                               hidden=sizes.hidden)
        return connector, stored_reader(features)
    patch = (4, 16, 16) if sizes.scan[1] > 64 else (2, 8, 8)
    tower = Tower3D(sizes.scan, patch, width=sizes.channels, depth=sizes.blocks, heads=sizes.heads,
                    hidden=sizes.hidden, explicit=name == "explicit")
    volume = torch.rand(1, 1, *sizes.scan)
    return tower, lambda: volume


def forward_of(sizes, name):
    "A function that computes the tokens of a contestant."
    module, read = contestant(sizes, name)
    return torch.no_grad()(lambda: module(read()))


def step_of(sizes, name):
    "A case for `peak_memory`: a contestant and AdamW; returns the function that takes one training step."
    module, read = contestant(as_sizes(sizes), name)
    optimiser = torch.optim.AdamW(module.parameters(), fused=True)   # as Trainer steps
    def run():
        module(read()).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    return run


def vision_findings(sizes, rounds):
    "Forward: from stored features, and with all slices encoded, timed ten at a time: none sees another."
    contestants = {name: forward_of(sizes, name) for name in ("cached", "explicit", "fused")}
    times = interleave({**contestants, "ten slices": encode(sizes)}, rounds)
    seconds = zip(times["cached"], times["ten slices"])
    times["uncached"] = [connector + ten * sizes.depth / 10 for connector, ten in seconds]
    return [measured("G3", "stored features to tokens over the 3D tower, explicit attention", target=.15,
                     times=times,
                     name="cached", base="explicit"),
            measured("G3", "the same, fused attention", target=.25, times=times, name="cached", base="fused"),
            measured("G3", "uncached over the 3D tower, explicit attention", target=2.2, times=times,
                     name="uncached", base="explicit")]


def step_findings(sizes, rounds):
    "A training step: time, and peak memory in processes of their own."
    times = interleave({name: step_of(sizes, name) for name in ("cached", "explicit")}, rounds)
    peak = {name: peak_memory("bench.goals", "step_of", sizes=asdict(sizes), name=name)
            for name in ("cached", "explicit", "fused")}
    return [measured("G4", "training step from stored features over the trained 3D tower", target=.12,
                     times=times,
                     name="cached", base="explicit"),
            Finding("G4", "its peak memory, explicit attention", peak["cached"] / peak["explicit"], .2),
            Finding("G4", "its peak memory, fused attention (no goal was set: the same)",
                    peak["cached"] / peak["fused"], .2)]


# --- G5: bytes of a stored volume, and what they lose ---------------------------------------------

def store_gap():
    "Difference in a tiny model's loss on one volume: with features from a store, and from the file."
    model = tiny()
    tokenizer = model.processor.tokenizer
    question = prompt_ids(tokenizer, "Which organ is enlarged?"), target_ids(tokenizer, "spleen")
    row = pack_examples(image_prefix(tokenizer, model.config.visual_tokens), [question])
    batch = collate([row], padding_id(tokenizer))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        root = Path(folder)
        np.save(root/"scan.npy", np.random.default_rng(0).random((1, 8, 64, 64), np.float32))
        encode_images(root/"store", root, images=["scan.npy"], encoder=model.encoder, rho=model.config.rho,
                      preprocess=Preprocess.from_dict(model.config.preprocess), progress=False)
        features = FeatureStore(root/"store")["scan.npy"][0][None]
        pixels = model.processor.pixels(root/"scan.npy")[None]
        stored = model(**batch, features=features).loss
        direct = model(**batch, pixel_values=pixels).loss
    return abs(stored - direct).item()


def store_findings(sizes):
    "Megabytes of one volume's kept features and indices as they are written, and the difference in loss."
    _, features = random_connector(sizes.channels, grid=sizes.grid, depth=sizes.depth, hidden=sizes.hidden)
    written = save({"features": features, "indices": torch.arange(len(features))})
    return [Finding("G5", "a stored volume, MB", len(written) / 1e6, 4.25),
            Finding("G5", "difference in loss, stored features over the volume itself", store_gap(), 0.)]


# --- G6: packed questions -------------------------------------------------------------------------
# Several questions of one volume, with gradients through a frozen language model to the visual tokens: once
# in one packed sequence, once in a batch of sequences padded to the context. The connector, which padding
# would run once for each question, is left out, so the saving is understated.

FAMILIES = {"LLaMA": dict(kind="llama"),
            "SmolLM": dict(kind="llama", num_key_value_heads=1, tie_word_embeddings=True),
            "Qwen": dict(kind="qwen3", num_key_value_heads=2)}


def language_model(sizes, kind, **options):
    "A frozen random language model of a family, with fused attention."
    from transformers import AutoConfig, AutoModelForCausalLM
    hidden, mlp, blocks, words = sizes.text
    shape = dict(vocab_size=words, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=blocks,
                 num_attention_heads=4, num_key_value_heads=4, head_dim=hidden // 4,
                 max_position_embeddings=2048,
                 initializer_range=.1)
    config = AutoConfig.for_model(kind, **(shape | options))
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False)


FILL = {"input_ids": 0, "labels": -100, "loss_weights": 0., "position_ids": 0, "segments": -1}


def padded_batch(rows, length):
    "Packed examples as tensors (B, length), each filled up on the right."
    batch = {}
    for key, fill in FILL.items():
        values = [list(getattr(row, key)) for row in rows]
        batch[key] = torch.tensor([v + [fill] * (length - len(v)) for v in values])
    batch["attention_mask"] = (batch["segments"] >= 0).long()
    return batch


def question_batches(sizes):
    "The same random questions about one volume: (packed batch, batch padded to the context, visual tokens)."
    def words(n): return torch.randint(3, sizes.text[3], (n,)).tolist()
    kept = sizes.depth * 28 // 100
    visual = (kept // 2) * (sizes.grid // 2) ** 2
    prefix = [1] + [2] * visual + words(12)
    prompt = 2 * sizes.words // 3
    segments = [(words(prompt), words(sizes.words - prompt)) for _ in range(sizes.questions)]
    rows = [pack_examples(prefix, [segment], context=sizes.context) for segment in segments]
    together = pack_examples(prefix, segments, context=sizes.context)
    return padded_batch([together], len(together.input_ids)), padded_batch(rows, sizes.context), visual


def question_step(llm, batch, visual, packed):
    "A function that computes the loss of a batch and its gradient at the visual tokens (visual, hidden)."
    def run():
        x = visual.clone().requires_grad_()
        words = llm.get_input_embeddings()(batch["input_ids"])
        inputs = torch.cat([words[:, :1], x.expand(len(words), -1, -1), words[:, 1 + len(x):]], 1)
        mask = packed_mask(batch["segments"]) if packed else batch["attention_mask"]
        logits = llm(inputs_embeds=inputs, attention_mask=mask, position_ids=batch["position_ids"],
                     use_cache=False).logits
        loss = target_loss(logits, batch["labels"], batch["loss_weights"])
        return loss.detach(), *torch.autograd.grad(loss, x)
    return run


def packing_findings(sizes, rounds):
    "For each family the time a question, and the difference of loss and of gradient over its largest value."
    packed, padded, tokens = question_batches(sizes)
    findings = []
    for name, options in FAMILIES.items():
        llm = language_model(sizes, **options)
        visual = torch.randn(tokens, sizes.text[0])
        runs = {"packed": question_step(llm, packed, visual, True),
                "padded": question_step(llm, padded, visual, False)}
        loss, gradient = runs["packed"]()
        padded_loss, padded_gradient = runs["padded"]()
        loss_gap = (loss - padded_loss).abs()
        gradient_gap = (gradient - padded_gradient).abs().max() / padded_gradient.abs().max()
        findings += [
            measured("G6", f"packed over padded, time a question, {name}", target=.35,
                     times=interleave(runs, rounds), name="packed", base="padded"),
            Finding("G6", f"difference in loss, {name}", loss_gap.item(), 1e-5),
            Finding("G6", f"difference in gradient over its largest value, {name}", gradient_gap.item(),
                    1e-5)]
    return findings


# --- G7: one prefix, many questions ---------------------------------------------------------------

def reuse_findings(sizes):
    """Operations to read the questions of a volume: each behind a prefix of its own, over all behind one
    prefix whose keys and values are kept. The answers must agree."""
    side = 16 * sizes.grid
    model = tiny(encoder_channels=8, grid=(sizes.grid, sizes.grid), rho=28,
                 preprocess=Preprocess(sizes.depth, side, side).to_dict())
    features = torch.randn(model.config.kept, sizes.grid ** 2, 8)
    prompt = 2 * sizes.words // 3
    rows = [(torch.randint(3, 20, (prompt,)).tolist(), [k]) for k in range(3, 3 + sizes.questions)]
    prefix = image_prefix(model.processor.tokenizer, model.config.visual_tokens)

    def once(): return score_rows(Prefix(model, model.processor, [features]), rows, [0] * len(rows))

    @torch.no_grad()
    def anew():
        scores = []
        for question, (target,) in rows:
            ids = torch.tensor([prefix + question + [target]])
            logits = model(input_ids=ids, features=features[None], use_cache=True).logits[0, -2]
            scores.append(logits.log_softmax(-1)[target].item())
        return scores

    gap = max(abs(a - b) for a, b in zip(once(), anew()))
    return [Finding("G7", "prefill work without reuse over with", count_flops(anew) / count_flops(once), 2.5,
                    least=True),
            Finding("G7", "largest difference in a log-likelihood", gap, 1e-4)]


# --- together -------------------------------------------------------------------------------------

def measure_all(sizes, rounds, tell=print):
    "All findings, in order; `tell` is called with a name as each part begins."
    seed_everything(0)
    torch.set_num_threads(1)
    timed = {"frequency path": frequency_findings, "encoder": encoder_findings, "towers": vision_findings,
             "training steps": step_findings, "packing": packing_findings}
    findings = []
    for name, part in timed.items():
        tell(name)
        findings += part(sizes, rounds)
    return findings + store_findings(sizes) + reuse_findings(sizes)


def run(out, sizes, rounds=3, tell=print):
    "Measure into the run folder `out`, relative to the project root; a finished run is read."
    folder = RunFolder(project_root()/out)
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(sizes).items()}
    config = {"rounds": rounds, "sizes": plain}
    if not folder.is_done(config):
        with open_run(folder.path, config, threads=1):
            findings = measure_all(sizes, rounds, tell)
            write_json(folder/"results.json", {"findings": [{**asdict(f), "met": f.met} for f in findings]})
    return folder.results["findings"]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="run folder, relative to the project root")
    parser.add_argument("--rounds", type=int, default=3,
                        help="rounds that count, after one that does not (3)")
    parser.add_argument("--small", action="store_true", help="sizes for a test instead of the paper's")
    parser.add_argument("--sizes", type=json.loads, default={}, help="JSON object with fields of `Sizes`")
    given = parser.parse_args(arguments)
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in given.sizes.items()}
    sizes = Sizes(**{**(asdict(small()) if given.small else {}), **changes})
    for f in run(given.out, sizes, given.rounds):
        print(f"{f['goal']}  {'met   ' if f['met'] else 'MISSED'}  {f['value']:.3g}  {f['what']}")


if __name__ == "__main__": main()
