"Layers and windows of an encoder are part of what is stored, trained, saved, loaded and asked; none is dropped."
import json

import pytest
import torch

from medvlm3d.base.core import MedVLM3DError
from medvlm3d.evaluation.baselines import Blank
from medvlm3d.features.encode import StoreSpec, encode_volume
from medvlm3d.features.store import FeatureStore, check_spec, encode_images
from medvlm3d.method.encoders import described_encoder, load_encoder
from medvlm3d.method.model import MedVLM3D, tiny
from medvlm3d.scans.prepare import Preprocess
from medvlm3d.training.plan import agree
from medvlm3d.training.recipe import store_fields

WINDOWS = [[-200., 400.], [-50., 130.], [50., 350.]]
CHOSEN = dict(layers=[1, 2], windows=WINDOWS)
HU = Preprocess(8, 64, 64, window=(-200, 400))


class Kept(dict):
    "A store in memory."
    def __init__(self, spec): self.spec = spec


def described(**changes):
    "The description of a store of the tiny encoder, as it is read back from JSON."
    encoder = load_encoder("tiny", 64, preprocess=HU, **changes)
    return json.loads(json.dumps(StoreSpec.of(encoder, HU, rho=50).to_dict()))


def config_of(spec):
    "The model's configuration of a store."
    values = store_fields(spec)
    return tiny(**{**values, "whiten": False}).config


def test_a_store_without_layers_and_windows_is_described_as_before():
    assert not {"layers", "windows"} & set(described())
    assert described(layers=[2]) == described()          # the last block alone is the default


@pytest.mark.parametrize("name", CHOSEN)
def test_each_is_part_of_the_key_and_of_the_configuration(name):
    spec = described(**{name: CHOSEN[name]})
    assert spec[name] == CHOSEN[name]
    config = config_of(spec)
    assert getattr(config, name) == CHOSEN[name]
    agree(spec, config)
    for other in (described(), described(**CHOSEN)):
        with pytest.raises(MedVLM3DError, match=name if other == described() else "layers|windows"):
            agree(other, config)


def test_a_store_is_not_continued_with_another_input(tmp_path):
    encode_images(tmp_path, tmp_path, images=[], encoder=load_encoder("tiny", 64), preprocess=HU, rho=50,
                  progress=False)
    for name, value in CHOSEN.items():
        encoder = load_encoder("tiny", 64, preprocess=HU, **{name: value})
        with pytest.raises(MedVLM3DError, match=name): check_spec(tmp_path, StoreSpec.of(encoder, HU, rho=50))
    assert "layers" not in FeatureStore(tmp_path).spec


@pytest.mark.parametrize("strategy", ["cosine", "uniform"])
def test_a_model_sees_what_its_store_holds_also_after_it_was_saved(tmp_path, strategy):
    spec = {**described(**CHOSEN), "strategy": strategy}
    model = tiny(**{**store_fields(spec), "whiten": False})
    model.save_pretrained(tmp_path)
    again = MedVLM3D.from_pretrained(tmp_path)
    pixels = torch.rand(8, 64, 64, generator=torch.Generator().manual_seed(0))
    stored, kept = encode_volume(pixels, described_encoder(spec), preprocess=HU, rho=50, strategy=strategy)
    for one in (model, again):
        assert one.config.encoder_channels == 64 and one.encoder.layers == (1, 2)
        features, indices = one.encode(pixels[None])
        assert torch.equal(features[0].to(torch.bfloat16), stored) and torch.equal(indices[0], kept)
    plain = described_encoder({**spec, "windows": None})
    assert not torch.equal(encode_volume(pixels, plain, preprocess=HU, rho=50, strategy=strategy)[0], stored)
    assert isinstance(again.ask(pixels, "Where?", ["liver", "lung"]).text, str)


def test_a_blank_image_is_as_wide_as_the_store():
    spec = described(**CHOSEN)
    assert Blank(Kept(spec), described_encoder(spec))["any"][0].shape == (4, 16, 64)


@pytest.mark.parametrize("windows", [[[0, 1]], [[-300, 0], [0, 1], [0, 2]], [[1, 0], [0, 1], [0, 2]]])
def test_windows_that_cannot_be_had_are_refused_by_the_configuration(windows):
    with pytest.raises(MedVLM3DError, match="windows"): tiny(preprocess=HU.to_dict(), windows=windows)


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(MedVLM3DError, match="blocks are 1 to 2"): load_encoder("tiny", layers=[3])
