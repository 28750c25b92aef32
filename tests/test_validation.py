"""What a training looks at beside its own volumes: the validation split, and the model that it begins with."""
import signal

import pytest
import torch
from corpora import LORA, corpus, make_plan  # noqa: F401  (a fixture)
from processes import apart
from safetensors.torch import load_file

from medvlm3d.base.core import MedVLM3DError, RunFolder, sha256_file
from medvlm3d.data.m3d import load_m3d
from medvlm3d.data.manifest import write_manifest
from medvlm3d.features.store import FeatureStore
from medvlm3d.training import trainer
from medvlm3d.training.launch import answers_of, loss_figure, validations_of
from medvlm3d.training.plan import first_model
from medvlm3d.training.reader import make_reader, reader_tokenizer
from medvlm3d.training.stages import is_over, train
from test_checkpoints import kill_at, same, weights

FIRST = {"stage": 1, "tasks": ["report"], "epochs": 3, "lr": 5e-3, "batch": 2, "accumulation": 1}


def validated(corpus, **changes):  # noqa: F811
    return make_plan(*corpus, validate_every=3, **changes)


def test_validation_takes_no_part_in_training_and_continues_bit_for_bit(corpus, tmp_path, monkeypatch):  # noqa: F811
    """The losses of the validation split leave every weight as it is. A run that is killed between two of them
    finds the best step again, measures the same losses and keeps the same weights."""
    plain = train(tmp_path/"plain", make_plan(*corpus), progress=False)
    last = train(tmp_path/"last", validated(corpus, select="last"), progress=False)
    assert same(weights(plain.path), weights(last.path))
    assert [step for step, _ in validations_of(last)[2]] == [3, 6, 9, 12]
    best = train(tmp_path/"best", validated(corpus), progress=False)
    assert validations_of(best) == validations_of(last)
    with monkeypatch.context() as patch:
        kill_at(7, patch, signal.SIGKILL)
        assert apart(lambda: train(tmp_path/"cut", validated(corpus), progress=False)) == -signal.SIGKILL
    again = train(tmp_path/"cut", validated(corpus), progress=False)
    assert same(weights(best.path), weights(again.path)) and validations_of(again) == validations_of(best)
    assert again.manifest["validation"] == best.manifest["validation"]
    assert "validation" in [text.get_text() for text in loss_figure(best).axes[0].get_legend().get_texts()]


def test_the_best_step_is_kept_and_a_stage_may_end_early(corpus, tmp_path, monkeypatch):  # noqa: F811
    "With losses 3, 1, 2, 2 and a patience of two, the stage ends at step 8 of 12 with the weights of step 4."
    losses = {2: 3., 4: 1., 6: 2., 8: 2.}
    monkeypatch.setattr(trainer, "held_out_scores", lambda t, data: (losses[t.state.global_step], {}))
    plan = make_plan(*corpus, [FIRST], validate_every=2, patience=2, save_every=50)
    run = train(tmp_path/"run", plan, progress=False)
    folder = run/"checkpoints"/"stage-1"
    facts = {"best step": 4, "best loss": 1., "last step": 8, "of": 12, "kept": "best"}
    assert run.manifest["validation"] == {"stage 1": facts}
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    saved, best = load_file(run/"stage-1"/"model.safetensors"), load_file(folder/"checkpoint-4"/"model.safetensors")
    assert all(torch.equal(saved[name], best[name]) for name in best if name.startswith("connector."))
    assert is_over(folder/"checkpoint-8", plan, 12) and not is_over(folder/"checkpoint-4", plan, 12)


def test_a_patience_without_validation_or_a_validation_without_its_split_is_refused(corpus, tmp_path):  # noqa: F811
    with pytest.raises(MedVLM3DError, match="Set validate_every"): make_plan(*corpus, patience=2)
    manifest = corpus[0]/"data"/"train.jsonl"
    write_manifest(manifest, [s for s in load_m3d(corpus[0]/"data") if s.split == "train"])
    plan = validated(corpus, data=str(manifest))
    try:
        with pytest.raises(MedVLM3DError, match="has no validation split"): train(tmp_path/"run", plan, progress=False)
    finally: manifest.unlink()


def test_a_training_begins_with_another_model_or_says_why_it_does_not_fit(corpus, tmp_path):  # noqa: F811
    root, fields = corpus
    short = [{**FIRST, "epochs": .75}, {**FIRST, "stage": 2, "tasks": ["closed"], "epochs": .75, "lora": LORA}]
    first = train(tmp_path/"first", make_plan(*corpus, short), progress=False)
    begun = make_plan(*corpus, short, init_from=str(tmp_path/"first"), seed=5)
    before, model = weights(first.path), first_model(begun, FeatureStore(root/"store"), [])
    own = {name: t for name, t in model.own_state().items() if name.startswith("connector.") or "lora_" in name}
    assert len(own) > 10 and all(torch.equal(t, before[name]) for name, t in own.items())
    second = train(tmp_path/"second", begun, progress=False)
    assert second.manifest["init_from"]["sha256"] == sha256_file(first/"model"/"model.safetensors")[:16]
    assert not same(before, weights(second.path))
    narrow = make_plan(root, {**fields, "channels": 4}, init_from=str(tmp_path/"first"))
    with pytest.raises(MedVLM3DError, match="channels=8, in the plan 4"): train(tmp_path/"other", narrow, progress=False)
    make_reader(reader_tokenizer(), hidden=16, layers=1, heads=2, seed=9).save_pretrained(tmp_path/"llm")
    reader_tokenizer().save_pretrained(tmp_path/"llm")
    exchanged = make_plan(*corpus, llm=str(tmp_path/"llm"), init_from=str(tmp_path/"first"))
    with pytest.raises(MedVLM3DError, match="another language model than llm"):
        train(tmp_path/"third", exchanged, progress=False)
    assert RunFolder(tmp_path/"third").status == "failed"


def test_right_answers_of_each_type_are_logged_and_drawn(corpus, tmp_path):  # noqa: F811
    "With one volume of the validation split each type has one closed question, right or wrong; the figure names the types."
    run = train(tmp_path/"run", validated(corpus), progress=False)
    answers = answers_of(run)[2]
    assert {*answers} == {"Plane", "Phase", "Organ", "Abnormality", "Location"}
    assert all([step for step, _ in points] == [3, 6, 9, 12] for points in answers.values())
    assert {value for points in answers.values() for _, value in points} <= {0., 100.}
    assert {text.get_text() for text in loss_figure(run).axes[-1].get_legend().get_texts()} == {*answers}


def test_an_answer_is_right_if_each_of_its_tokens_is_the_likeliest():
    labels = torch.tensor([[-100, 3, 4, -100, 5]])
    segments = torch.tensor([[0, 1, 1, 2, 2]])
    logits = torch.nn.functional.one_hot(torch.tensor([[3, 4, 0, 6, 0]]), 7).float()
    assert trainer.right_segments(logits, labels, segments) == [{1: True, 2: False}]
