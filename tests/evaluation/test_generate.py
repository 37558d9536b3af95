"""generate_captions: batches, ends, modes and random state."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import inft
from inft.data.prompts import build_prompt
from inft.data.sample import scenes
from inft.data.scene_captions import caption
from inft.evaluation.generate import Search, decode_captions, generate_captions
from inft.models import load_spec
from inft.sample import Sample
from params import MUNIChusLoadConfig

LANGUAGES = ("en", "ar", "zh", "ja")  # prompts and captions of different lengths


@pytest.fixture(scope="module", params=["llama32", "aya"])
def captioner(request):
    torch.set_num_threads(1)
    directory = Path(inft.__file__).parent / "embedded" / request.param
    spec = load_spec(request.param)
    model = spec.prepare(AutoModelForImageTextToText.from_pretrained(directory))
    return model, spec.collator(AutoProcessor.from_pretrained(directory))


@pytest.fixture(scope="module")
def samples():
    config = MUNIChusLoadConfig(context="none")
    return [
        Sample(
            image=scene.image,
            prompt=build_prompt(config, language=language, title="", content=""),
            answer=caption(scene.attributes, language),
            language=language,
        )
        for scene, language in zip(scenes("test", rounds=1), LANGUAGES * 3, strict=False)
    ]


def test_a_batch_gives_the_captions_of_one_by_one(captioner, samples):
    alone = generate_captions(*captioner, samples, max_new_tokens=24, batch_size=1)
    assert generate_captions(*captioner, samples, max_new_tokens=24, batch_size=5) == alone
    assert len(alone) == len(samples)
    assert len(set(alone)) > 1


def test_captions_end_at_the_end_token_and_hold_no_special_tokens(captioner, samples):
    short = generate_captions(*captioner, samples[:4], max_new_tokens=24, batch_size=4)
    assert generate_captions(*captioner, samples[:4], max_new_tokens=60, batch_size=4) == short
    assert not any(captioner[1].control.search(text) for text in short)


def test_max_new_tokens_bounds_the_caption(captioner, samples):
    [whole] = generate_captions(*captioner, samples[:1], max_new_tokens=24, batch_size=1)
    [cut] = generate_captions(*captioner, samples[:1], max_new_tokens=3, batch_size=1)
    assert whole.startswith(cut)
    assert len(cut) < len(whole)


def test_no_sample_gives_no_caption(captioner):
    assert generate_captions(*captioner, [], max_new_tokens=4, batch_size=2) == []


def test_generation_leaves_modes_settings_and_random_state_as_they_were(captioner, samples):
    model, collator = captioner
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.LayerNorm))
    frozen.eval()  # a module that was put in evaluation mode on purpose stays there
    model.config.use_cache = False
    modes = [module.training for module in model.modules()]
    settings = copy.deepcopy(model.generation_config).to_dict()
    state = torch.get_rng_state()
    generate_captions(model, collator, samples[:2], max_new_tokens=4, batch_size=2, search=Search(do_sample=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config.to_dict() == settings
    assert model.config.use_cache is False
    model.eval()


def test_markers_that_a_release_declares_as_ordinary_tokens_are_left_out(captioner):
    _, collator = captioner
    ids = collator.tokenizer(
        f"A red star.{collator.tokenizer.eos_token}", add_special_tokens=False, return_tensors="pt"
    )
    assert decode_captions(collator, ids.input_ids) == ["A red star."]


@pytest.mark.parametrize("others", [None, 0, [0, 1]], ids=["none", "another", "several"])
def test_captions_end_where_training_taught_to_stop_whatever_the_config_says(captioner, samples, others):
    model, collator = captioner
    expected = generate_captions(model, collator, samples[:2], max_new_tokens=60, batch_size=2)
    settings = model.generation_config
    model.generation_config = copy.deepcopy(settings)
    model.generation_config.eos_token_id = others
    try:
        assert generate_captions(model, collator, samples[:2], max_new_tokens=60, batch_size=2) == expected
    finally:
        model.generation_config = settings


def test_captions_still_end_at_the_models_own_end_token(captioner, samples):
    model, collator = captioner
    [whole] = generate_captions(model, collator, samples[:1], max_new_tokens=24, batch_size=1)
    settings = model.generation_config
    model.generation_config = copy.deepcopy(settings)
    model.generation_config.eos_token_id = collator.tokenizer(whole, add_special_tokens=False).input_ids[2]
    try:
        [cut] = generate_captions(model, collator, samples[:1], max_new_tokens=24, batch_size=1)
    finally:
        model.generation_config = settings
    assert whole.startswith(cut)
    assert len(cut) < len(whole)
