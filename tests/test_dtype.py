"""A model on a CPU computes in bfloat16 only where the processor multiplies it, or where somebody asked for it."""
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from medvlm3d.method import language
from medvlm3d.method.language import load_llm, widen_emulated
from medvlm3d.method.model import MedVLM3D, assemble, demo, tiny

QUESTION, CHOICES = "Which organ is enlarged?", ["liver", "spleen", "kidney"]


@pytest.fixture(params=["emulated", "multiplied"])
def processor(request, monkeypatch):
    "A processor with and one without bfloat16, whatever this machine has: the type that is quick on it."
    quick = torch.float32 if request.param == "emulated" else torch.bfloat16
    monkeypatch.setattr(language, "quick_dtype", lambda device: torch.bfloat16 if "cuda" in str(device) else quick)
    return quick


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    "A model that was saved in bfloat16."
    folder = tmp_path_factory.mktemp("dtype")/"model"
    tiny().to(torch.bfloat16).save_pretrained(folder)
    assert {t.dtype for t in load_file(folder/"model.safetensors").values()} == {torch.bfloat16}
    return folder


def types(model):
    "The float types of all parameters and buffers, rotary frequencies left out: those are always float32."
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {t.dtype for name, t in tensors if t.is_floating_point() and "inv_freq" not in name}


def load(*args, by=MedVLM3D.from_pretrained, **options):
    "What a call loads, and the warnings about bfloat16 that it gives."
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        model = by(*args, **options)
    return model, [str(w.message) for w in given if "bfloat16" in str(w.message)]


@pytest.mark.parametrize("by", [MedVLM3D.from_pretrained, AutoModel.from_pretrained])
@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}])
def test_a_stored_model_is_loaded_in_what_the_processor_multiplies(processor, stored, by, options):
    model, said = load(stored, by=by, **options)
    assert types(model) == {processor}
    assert bool(said) == (processor is torch.float32)
    if said: assert "dtype=torch.float32" in said[0] and "dtype=torch.bfloat16" in said[0]   # the remedy
    logits = model.option_logprobs(QUESTION, CHOICES, features=torch.zeros(1, 4, 16, 32))[0]
    assert logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "float32", "bfloat16"])
def test_a_type_that_is_asked_for_is_kept_in_silence(processor, stored, dtype):
    model, said = load(stored, dtype=dtype)
    assert {str(t) for t in types(model)} == {f"torch.{str(dtype).removeprefix('torch.')}"} and not said


def test_widening_changes_no_number(processor, stored):
    file, model = load_file(stored/"model.safetensors"), load(stored)[0]
    for name, t in model.own_state().items(): assert torch.equal(t.float(), file[name].float()), name


def test_a_base_in_bfloat16_is_kept_where_it_is_asked_for(processor, tmp_path):
    model = tiny()
    model.llm.to(torch.bfloat16).save_pretrained(tmp_path/"base")
    model.config.llm_reference = {"name": str(tmp_path/"base"), "sha256": None}
    model.save_pretrained(tmp_path/"model")
    half, said = load(tmp_path/"model", dtype=torch.float32, llm_dtype=torch.bfloat16)
    assert (types(half.llm), types(half.connector), said) == ({torch.bfloat16}, {torch.float32}, [])
    whole, said = load(tmp_path/"model")
    assert (types(whole), said) == ({torch.float32}, [])   # a base that is referred to is read in float32


def test_a_language_model_by_itself(processor, tmp_path):
    tiny().llm.to(torch.bfloat16).save_pretrained(tmp_path)
    model, said = load(tmp_path, by=load_llm, dtype="auto")
    assert types(model) == {processor} and bool(said) == (processor is torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        model, said = load(tmp_path, by=load_llm, dtype=dtype)
        assert types(model) == {dtype} and not said


def test_a_random_language_model_is_made_in_a_type_that_is_multiplied(processor):
    config, tokenizer = tiny().config, tiny().processor.tokenizer
    config.text_config.dtype = "bfloat16"
    model, said = load(config, by=assemble, tokenizer=tokenizer)
    assert types(model.llm) == {processor} and bool(said) == (processor is torch.float32)


def test_on_a_gpu_nothing_is_widened(processor):
    model = tiny().to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert types(widen_emulated(model, "cuda")) == {torch.bfloat16}


def test_the_demo_model_says_the_same_on_every_machine(processor):
    model, said = load(by=demo)
    assert types(model) == {torch.float32} and not said
    assert all(torch.equal(t, t.bfloat16().float()) for t in model.own_state().values())   # it was stored in bfloat16
