"""One file of answers from two ranks of which one was killed is that of one rank, even with near-ties."""
import random
import signal

import pytest
import torch
from processes import command, torchrun, two_ranks

from medvlm3d.base.core import MedVLM3DError
from medvlm3d.data.m3d import load_m3d
from medvlm3d.features.store import FeatureStore, encode_images
from medvlm3d.method.model import MedVLM3D, tiny
from medvlm3d.phantoms.phantom import make_phantom
from medvlm3d.evaluation.prediction import parts_of, predict_items, read_predictions

KILLED = """
import os, signal, sys
import medvlm3d.evaluation.prediction as prediction
from medvlm3d.base.ranks import or_one_line
count, answer_batch = 0, prediction.answer_batch
def dies(*args, **how):
    global count
    count += 1
    if count > 2 and os.environ["RANK"] == "1": os.kill(os.getpid(), signal.SIGKILL)
    return answer_batch(*args, **how)
prediction.answer_batch = dies
from typer.main import get_command
from medvlm3d.front.cli import app
or_one_line(lambda: get_command(app).main(["answer", *sys.argv[1:]], standalone_mode=False))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "A phantom with its features, and a model whose output rows differ in their last bits: all near-ties."
    root, model = tmp_path_factory.mktemp("asked"), tiny()
    make_phantom(root/"data", train=1, validation=1, test=6, shape=(8, 64, 64), workers=1, progress=False)
    samples = [s for s in load_m3d(root/"data") if s.split == "test"]
    encode_images(root/"store", root/"data", images=[s.image for s in samples], encoder=model.encoder,
                  preprocess=model.processor.preprocess, rho=model.config.rho, progress=False)
    weight = model.get_output_embeddings().weight
    with torch.no_grad(): weight.copy_(weight[0] + 1e-7 * weight)
    model.save_pretrained(root/"model")
    return root, samples


def answers_of(lines):
    return {line["id"]: (line["prediction"], line["tokens"], line["error"]) for line in lines}


def test_neither_ranks_nor_batches_nor_order_change_an_answer(corpus, tmp_path):
    root, samples = corpus
    folders = [root/name for name in ("model", "data", "store")]
    typed = [*folders, tmp_path/"two.jsonl", "--max-new-tokens", "4", "--quiet"]
    codes, errors, _ = two_ranks(KILLED, *typed, "--batch-size", "3")
    assert codes == [1, -signal.SIGKILL] and "lost another rank" in errors[0]
    parts = parts_of(tmp_path/"two.jsonl")
    left = [line for part in parts.glob("*-of-2.jsonl") for line in read_predictions(part)]
    assert 0 < len(left) < len(samples) and not (tmp_path/"two.jsonl").exists()
    done = torchrun("medvlm3d", "answer", *typed, "--batch-size", "7")
    assert done.returncode == 0, done.stderr
    lines = read_predictions(tmp_path/"two.jsonl")
    assert [line["id"] for line in lines] == [s.id for s in samples] and not parts.exists()
    times = {line["id"]: line["ms"] for line in lines}
    assert all(times[line["id"]] == line["ms"] for line in left), "what was left is not answered again"
    model, store = MedVLM3D.from_pretrained(root/"model"), FeatureStore(root/"store")
    for batch_size in (1, 32):
        shuffled = random.Random(batch_size).sample(samples, len(samples))
        alone = predict_items(model, model.processor, samples=shuffled, features=store, batch_size=batch_size,
                              out_path=tmp_path/f"{batch_size}.jsonl", max_new_tokens=4, progress=False)
        assert answers_of(alone) == answers_of(lines)
        scores = {line["id"]: line["option_logprobs"] or [] for line in alone}
        for line in lines:
            assert scores[line["id"]] == pytest.approx(line["option_logprobs"] or [], abs=1e-4)


def test_answers_of_another_model_or_split_are_refused(corpus, tmp_path):
    root, samples = corpus
    folders = [str(root/name) for name in ("model", "data", "store")]
    typed = [*folders, str(tmp_path/"a.jsonl"), "--quiet", "--max-new-tokens", "2", "--by"]
    first = command("answer", *typed, "options")
    assert len(first) == len(samples)
    assert all(line["option_logprobs"] for line in first if line["task"] == "closed")
    other = r"a.jsonl: was answered by another model or with other settings \(\w{16} → \w{16}\). Delete"
    with pytest.raises(MedVLM3DError, match=other): command("answer", *typed, "words")
    with pytest.raises(MedVLM3DError, match="a.jsonl: holds an answer to another question"):
        command("answer", *typed, "options", "--split", "train")
    with pytest.raises(MedVLM3DError, match="nowhere: has no samples. Choose a split"):
        command("answer", *typed, "options", "--split", "nowhere")
    assert not parts_of(tmp_path/"a.jsonl").exists()


def test_the_cache_goes_by_the_name_that_the_installed_transformers_knows(corpus, tmp_path, recwarn):
    root, samples = corpus
    model = MedVLM3D.from_pretrained(root/"model")
    predict_items(model, model.processor, samples=samples[:2], features=FeatureStore(root/"store"),
                  batch_size=2, out_path=tmp_path/"few.jsonl", max_new_tokens=2, progress=False)
    model.generate(input_ids=torch.tensor([[1, 2]]), max_new_tokens=2)
    assert not [str(w.message) for w in recwarn if "past_key_values" in str(w.message)]
