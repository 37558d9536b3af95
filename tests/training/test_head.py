from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from inft.models import MODELS, load_spec
from inft.models.loading import load_model, load_processor
from inft.sample import Sample
from inft.training import head
from params import BasicParams

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Any] = {
    "plain": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "scaled": lambda: Cohere2ForCausalLM(Cohere2Config(**SIZES, logit_scale=0.25)),
    "softcapped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0)),
}
OUTPUTS = ("log_probs", "entropy", "is_top1", "mean_logits")


def both_heads(family: str, dtype: torch.dtype, temperature: float = 1.0) -> tuple[torch.nn.Module, torch.nn.Module]:
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        model = FAMILIES[family]().to(dtype)
        add_fused_lm_head(model, temperature=temperature, outputs=OUTPUTS)
        models.append(model)
    head.add_compact_head(models[1], temperature=temperature)
    return models[0], models[1]


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(1, 40, (3, 11))
    labels = ids.clone()
    labels[0, :6] = labels[1, 3:9] = labels[2, :-1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_compact_head_equals_trls(family: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "POSITIONS_AT_ONCE", 4)  # several chunks in a small batch
    theirs, ours = both_heads(family, torch.float32, temperature)
    expected, found = (model(**batch(), fused_lm_head=True, use_cache=False) for model in (theirs, ours))
    for field in ("loss", *OUTPUTS, "label_mask"):
        torch.testing.assert_close(found[field], expected[field], atol=1e-6, rtol=1e-6)
    expected.loss.backward()
    found.loss.backward()
    pairs = list(zip(gradients(theirs), gradients(ours), strict=True))
    assert pairs
    for a, b in pairs:
        torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_compact_head_equals_cross_entropy_on_the_models_own_logits_in_float64(family: str) -> None:
    _, ours = both_heads(family, torch.float64)
    torch.manual_seed(1)
    plain = FAMILIES[family]().double()
    rows = batch()
    logits = plain(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 40), rows["labels"][:, 1:].reshape(-1))
    found = ours(**rows, fused_lm_head=True).loss
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    expected.backward()
    found.backward()
    for a, b in zip(gradients(plain), gradients(ours), strict=True):
        torch.testing.assert_close(b, a, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_training_and_the_models_own_forward_agree_on_the_logits(name: str, make_sample: Callable[..., Sample]) -> None:
    spec = load_spec(name)
    model = load_model(spec, "", basic=BasicParams(dtype="float32"))
    rows = spec.collator(load_processor(spec, ""))([make_sample(), make_sample("Two blue discs.", colour="blue")])
    logits = model(**{key: value for key, value in rows.items() if key != "labels"}).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten())
    add_fused_lm_head(model, outputs=OUTPUTS)
    torch.testing.assert_close(model(**rows, fused_lm_head=True).loss, expected, atol=1e-5, rtol=1e-5)
    head.add_compact_head(model)
    torch.testing.assert_close(model(**rows, fused_lm_head=True).loss, expected, atol=1e-5, rtol=1e-5)


def test_a_batch_without_labels_has_a_zero_loss_and_a_zero_gradient() -> None:
    _, ours = both_heads("plain", torch.float32)
    rows = {**batch(), "labels": torch.full((3, 11), -100)}
    loss = ours(**rows, fused_lm_head=True).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(ours))


def test_other_calls_are_the_models_own_forward() -> None:
    theirs, ours = both_heads("scaled", torch.float32)
    rows = batch()
    torch.testing.assert_close(ours(**rows).logits, theirs(**rows).logits, atol=0, rtol=0)
