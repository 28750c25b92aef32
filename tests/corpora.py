"""The smallest corpus on which both stages train: eight phantoms, their features, a random reader; made once for a test module."""
import numpy as np
import pytest
from conftest import ROOT

from medvlm3d.studies.crossmodal import Facts
from medvlm3d.data.m3d import load_m3d
from medvlm3d.method.encoders import load_encoder
from medvlm3d.features.store import encode_images
from medvlm3d.phantoms.phantom import make_phantom
from medvlm3d.training.plan import Plan
from medvlm3d.training.reader import make_reader, reader_tokenizer
from medvlm3d.scans.prepare import Preprocess

LORA = {"r": 2, "alpha": 4, "dropout": .1, "targets": "all-linear"}


def make_corpus(root, train=8):
    "A phantom of `train` cases below `root` with its features and a random reader; returns the fields of a model for it."
    make_phantom(root/"data", train=train, validation=1, test=1, shape=(8, 32, 32), workers=1,
                 progress=False)
    encoder, preprocess = load_encoder("tiny", size=32), Preprocess(8, 32, 32)
    encode_images(root/"store", root/"data", images=[s.image for s in load_m3d(root/"data")],
                  encoder=encoder, preprocess=preprocess, rho=50, progress=False)
    tokenizer = reader_tokenizer()
    make_reader(tokenizer, hidden=16, layers=1, heads=2).save_pretrained(root/"reader")
    tokenizer.save_pretrained(root/"reader")
    return dict(encoder="tiny", encoder_channels=encoder.channels, grid=list(encoder.grid),
                preprocess=preprocess.to_dict(), rho=50, whiten=True, channels=8, answer_style="text")


def make_plan(root, fields, stages=None, **changes):
    "A plan on the corpus below `root`: stage 2 alone unless `stages` are given (its connector is a random one)."
    stages = stages or [{
        "stage": 2, "tasks": ["closed"], "epochs": 3, "lr": 5e-3, "batch": 2, "accumulation": 1, "lora": LORA
    }]
    return Plan.of({
        "data": str(root/"data"), "store": str(root/"store"), "llm": str(root/"reader"),
        "stages": stages, "model": fields, "precision": "fp32", "save_every": 2, "log_every": 1, **changes
    })


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    return root, make_corpus(root)


def invented(n, modalities=("MR", "PT")):
    "Facts of volumes that need not exist, two of each patient."
    rng = np.random.default_rng(0)
    made = []
    for i in range(n):
        side, level = rng.choice(["right", "left"]), rng.choice(["upper", "lower"])
        shares = (1., 0.) if side == "right" else (0., 1.)
        made.append(
            Facts(f"c{i}", f"p{i // 2}", source="invented", modality=modalities[i // 2 % len(modalities)],
                  kind="x", image=ROOT/f"volume-{i}.nii.gz", mask=ROOT/f"mask-{i}.nii.gz", side=str(side),
                  level=str(level), shares=shares))
    return made
