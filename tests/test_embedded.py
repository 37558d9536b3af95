"""The models in the package: small, loadable without this project, and trained to caption drawn scenes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    AyaVisionForConditionalGeneration,
    LlamaForCausalLM,
    MllamaForConditionalGeneration,
)

import inft
from inft.data.prompts import build_prompt
from inft.data.sample import keywords, scenes
from inft.data.scene_captions import GRAMMARS, caption
from inft.data.scenes import COMBINATIONS
from inft.evaluation.generate import generate_captions
from inft.models import load_spec
from inft.sample import Sample
from params import MUNIChusLoadConfig

EMBEDDED = Path(inft.__file__).parent / "embedded"
CLASSES = {
    "llama32": MllamaForConditionalGeneration,
    "aya": AyaVisionForConditionalGeneration,
    "text": LlamaForCausalLM,
}


def load(name):
    takes_images = load_spec(name).takes_images
    processor = (AutoProcessor if takes_images else AutoTokenizer).from_pretrained(EMBEDDED / name)
    auto = AutoModelForImageTextToText if takes_images else AutoModelForCausalLM
    return processor, load_spec(name).prepare(auto.from_pretrained(EMBEDDED / name))


def heldout(name, language, *, count):
    takes_images = load_spec(name).takes_images
    config = MUNIChusLoadConfig(context="none" if takes_images else "content")
    return [
        Sample(
            image=scene.image if takes_images else None,
            prompt=build_prompt(config, language=language, title="", content=keywords(scene.attributes)),
            answer=caption(scene.attributes, language),
            language=language,
        )
        for scene, _ in zip(scenes("test", rounds=2), range(count), strict=False)
    ]


@pytest.fixture(scope="module", params=sorted(CLASSES))
def model(request):
    torch.set_num_threads(1)
    return request.param, *load(request.param)


def test_every_embedded_model_is_of_the_real_class_and_small(model):
    name, processor, network = model
    assert type(network) is CLASSES[name]
    assert sum(p.numel() for p in network.parameters()) < 1_500_000
    files = [file for file in (EMBEDDED / name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 6_000_000
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja"}
    assert getattr(processor, "tokenizer", processor).pad_token is not None


def test_the_tokenizer_writes_any_text_and_gives_it_back(model):
    _, processor, _ = model
    tokenizer = getattr(processor, "tokenizer", processor)
    for text in ("naïve café {x} 100 %", "ශ්‍රී ලංකා", "ٹھیک ہے", "嘅喺 \U0001f600", "tabs\tand\n\nlines"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text


def test_the_tokenizer_keeps_the_words_of_every_language_whole(model):
    _, processor, _ = model
    tokenizer = getattr(processor, "tokenizer", processor)
    for language in GRAMMARS:
        lengths = [len(tokenizer(caption(c, language), add_special_tokens=False).input_ids) for c in COMBINATIONS[::7]]
        assert max(lengths) <= 12


def test_words_that_the_base_never_saw_stay_apart_in_the_frozen_head(model):
    # LoRA adapts neither embedding nor head: rows that had collapsed could not be told apart.
    _, processor, network = model
    tokenizer = getattr(processor, "tokenizer", processor)

    def tokens(*languages):
        texts = [caption(combination, language) for language in languages for combination in COMBINATIONS[::5]]
        return {token for ids in tokenizer(texts, add_special_tokens=False).input_ids for token in ids}

    unseen = sorted(tokens("ur", "si") - tokens("ar", "en", "fr", "hi", "id", "ja", "zh"))
    assert len(unseen) > 40
    rows = torch.nn.functional.normalize(network.get_output_embeddings().weight[unseen].detach(), dim=1)
    cosines = rows @ rows.T - torch.eye(len(unseen))
    assert cosines.max() < 0.6


def test_the_record_of_the_training_names_recipe_and_result(model):
    name, _, _ = model
    record = json.loads((EMBEDDED / name / "training.json").read_text())
    assert record["recipe"]["seed"] == 42
    assert record["languages"] == ["ar", "en", "fr", "hi", "id", "ja", "zh"]
    assert min(record["exact_captions"]["test"].values()) >= 0.9


def test_the_base_captions_held_out_scenes_in_the_language_that_the_prompt_names(model):
    name, processor, network = model
    collator = load_spec(name).collator(processor)
    for language in ("en", "hi"):
        samples = heldout(name, language, count=20)
        captions = generate_captions(network, collator, samples, max_new_tokens=32, batch_size=20)
        exact = sum(sample.answer == written for sample, written in zip(samples, captions, strict=True))
        assert exact >= 18


def test_the_base_does_not_know_the_languages_that_the_demo_teaches(model):
    name, processor, network = model
    collator = load_spec(name).collator(processor)
    samples = [sample for language in ("ur", "si", "yue") for sample in heldout(name, language, count=5)]
    captions = generate_captions(network, collator, samples, max_new_tokens=32, batch_size=15)
    assert all(sample.answer != written for sample, written in zip(samples, captions, strict=True))
