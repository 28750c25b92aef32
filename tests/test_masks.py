"""Taught with masks: a second loss on the visual tokens, off unless asked for, that changes nothing of what is saved."""
import json
import signal

import pytest
import torch
from corpora import corpus, make_plan  # noqa: F401  (a fixture)
from processes import apart
from safetensors.torch import load_file

from medvlm3d.base.core import MedVLM3DError
from medvlm3d.features.store import FeatureStore
from medvlm3d.method.model import MedVLM3D
from medvlm3d.phantoms.phantom import read_truth
from medvlm3d.studies.demo import blind_plan
from medvlm3d.training.masks import MaskLoss, MaskTargets
from medvlm3d.training.plan import check_conditions, conditions
from medvlm3d.training.stages import train
from test_checkpoints import kill_at, same, weights

PLAIN = {"stage": 1, "tasks": ["report"], "epochs": 6, "lr": 1e-2, "batch": 2, "accumulation": 2}
TAUGHT = {**PLAIN, "masks": 1.}


def spoken(root, folder):
    "The loss of the outlines of a corpus's training volumes under a saved model."
    model, store = MedVLM3D.from_pretrained(folder), FeatureStore(root/"store")
    targets = MaskTargets(root/"data", store, model.config)
    images = [image for image, row in read_truth(root/"data").items() if row["split"] == "train"]
    with torch.no_grad(): visual = model.visual_tokens(torch.stack([store[i][0] for i in images]).float())
    pairs = zip(*map(targets, images))
    return float(MaskLoss(model.llm, model.processor.tokenizer)(visual, *map(torch.stack, pairs)))


def test_tokens_learn_to_say_the_finding_and_the_model_keeps_its_form(corpus, tmp_path):  # noqa: F811
    "With the loss the tokens say the findings better than without, the saved tensors have the same names, and the card says it."
    plain = train(tmp_path/"plain", make_plan(*corpus, [PLAIN]), progress=False)
    taught = train(tmp_path/"taught", make_plan(*corpus, [TAUGHT]), progress=False)
    assert spoken(corpus[0], taught/"model") < .8 * spoken(corpus[0], plain/"model")
    names = [load_file(run/"model"/"model.safetensors").keys() for run in (plain, taught)]
    assert names[0] == names[1]
    cards = [(run/"model"/"README.md").read_text(encoding="utf-8") for run in (plain, taught)]
    assert ["Taught with masks" in card for card in cards] == [False, True]


def test_a_killed_run_with_masks_continues_to_the_same_weights(corpus, tmp_path, monkeypatch):  # noqa: F811
    whole = train(tmp_path/"whole", make_plan(*corpus, [TAUGHT]), progress=False)
    with monkeypatch.context() as patch:
        kill_at(5, patch, signal.SIGKILL)
        assert apart(lambda: train(tmp_path/"cut", make_plan(*corpus, [TAUGHT]), progress=False)) == -signal.SIGKILL
    assert same(weights(whole.path), weights(train(tmp_path/"cut", make_plan(*corpus, [TAUGHT]), progress=False).path))


def test_the_blind_twin_and_older_runs_know_no_masks(corpus, tmp_path):  # noqa: F811
    "The twin that sees nothing is not taught with masks. A run that began before there were any continues."
    plan = make_plan(*corpus, [TAUGHT])
    assert [stage.masks for stage in blind_plan(plan).stages] == [0.]
    old = conditions(make_plan(*corpus, [PLAIN]))
    for stage in old["plan"]["stages"]: del stage["masks"]
    (tmp_path/"conditions.json").write_text(json.dumps(old))
    check_conditions(tmp_path, make_plan(*corpus, [PLAIN]))
    with pytest.raises(MedVLM3DError, match="masks"): check_conditions(tmp_path, plan)
