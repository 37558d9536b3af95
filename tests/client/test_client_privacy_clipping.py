"""Per-example gradients against a loop over single examples, in float64, on a tiny Llama with LoRA."""

from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from inft.client.losses.inputs import LossInputs, next_token_labels
from inft.client.losses.token_ce import token_ce
from inft.client.privacy.clipping import NonFiniteGradient, PerExample
from params.errors import UserError

torch.set_num_threads(1)
VOCABULARY, ROWS = 31, 4


def make_model(*, dtype: torch.dtype = torch.float64, targets=("q_proj", "v_proj", "down_proj"), **lora) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=False,
    )
    options = {"r": 8, "lora_dropout": 0.0, "init_lora_weights": False, **lora}
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=list(targets), **options))
    return model.to(dtype).train()


def make_batch(tokens: int, rows: int = ROWS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(1, VOCABULARY, (rows, tokens), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(rows):  # ragged: padding on the right, and a prompt that is not learnt
        mask[row, tokens - row % (tokens - 2) :] = 0
        labels[row, : row % 2] = -100
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def losses(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    inputs = LossInputs(
        logits_BTV=logits,
        labels_BT=next_token_labels(batch["labels"]),
        attention_mask_BT=batch["attention_mask"],
    )
    return token_ce(inputs).per_example_B


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def one_by_one(model: nn.Module, batch: dict[str, torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    for row in range(len(batch["input_ids"])):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        yield list(torch.autograd.grad(losses(model, alone)[0], trainable(model)))


def clipped_sum(gradients: list[list[torch.Tensor]], clip_norm: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    norms = torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in gradients])
    factors = (clip_norm / norms).clamp(max=1)
    return norms, [sum(f * g for f, g in zip(factors, column, strict=True)) for column in zip(*gradients, strict=True)]


def assert_equal(found: list[torch.Tensor | None], expected: list[torch.Tensor], tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [4, 40])  # norms from pairs (x, g), and from gradients
@pytest.mark.parametrize("clipped", [1, 2, 4])
def test_clipped_sums_equal_a_loop_over_examples(tokens, clipped):
    model, batch = make_model(), make_batch(tokens)
    gradients = list(one_by_one(model, batch))
    norms, _ = clipped_sum(gradients, 1.0)
    clip_norm = float(norms.sort(descending=True).values[clipped - 1]) * 0.999  # so many rows are above it
    expected_norms, expected = clipped_sum(gradients, clip_norm)
    with PerExample(model, trainable(model), clip_norm=clip_norm) as per_example:
        found_norms = per_example.backward(losses(model, batch))
    assert int((found_norms > clip_norm).sum()) == clipped
    assert torch.allclose(found_norms, expected_norms, rtol=1e-12)
    assert_equal([p.grad for p in trainable(model)], expected)


def test_both_ways_to_the_norm_are_taken():
    model, kinds = make_model(), {}
    for tokens in (4, 40):
        with PerExample(model, clip_norm=1.0) as per_example:
            losses(model, make_batch(tokens)).sum().backward()
            kinds[tokens] = {kept.gradients_BOI is None for kept in per_example._kept.values()}
    assert kinds == {4: {True}, 40: {False}}


def test_without_clipping_the_sum_is_the_plain_gradient():
    model, batch = make_model(), make_batch(9)
    expected = torch.autograd.grad(losses(model, batch).sum(), trainable(model))
    with PerExample(model, clip_norm=1e9) as per_example:
        found = losses(model, batch)
        per_example.backward(found)
    assert torch.equal(found, losses(model, batch))
    assert_equal([p.grad for p in trainable(model)], list(expected))


def test_no_row_adds_more_than_the_clipping_norm():
    model = make_model()
    for tokens in (4, 40):
        with PerExample(model, clip_norm=0.01) as per_example:
            per_example.backward(1e6 * losses(model, make_batch(tokens, rows=1)))
        total = torch.cat([p.grad.flatten() for p in trainable(model)]).norm()
        assert float(total) == pytest.approx(0.01, rel=1e-9)
        model.zero_grad()


def test_micro_batches_add_up_to_the_logical_batch():
    model, batch = make_model(), make_batch(12)
    with PerExample(model, clip_norm=0.5) as per_example:
        per_example.backward(losses(model, batch))
    whole = [p.grad for p in trainable(model)]
    model.zero_grad()
    with PerExample(model, clip_norm=0.5) as per_example:
        for part in (slice(0, 1), slice(1, ROWS)):
            per_example.backward(losses(model, {name: value[part] for name, value in batch.items()}))
    assert_equal([p.grad for p in trainable(model)], whole)


def test_dropout_is_part_of_what_is_clipped():
    model, batch = make_model(lora_dropout=0.4), make_batch(9)
    torch.manual_seed(7)
    expected = torch.autograd.grad(losses(model, batch).sum(), trainable(model))
    torch.manual_seed(7)
    with PerExample(model, clip_norm=1e9) as per_example:
        per_example.backward(losses(model, batch))
    assert_equal([p.grad for p in trainable(model)], list(expected))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model, batch = make_model(), make_batch(9)
    _, expected = clipped_sum(list(one_by_one(model, batch)), 0.5)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with PerExample(model, clip_norm=0.5) as per_example:
        per_example.backward(losses(model, batch))
    assert_equal([p.grad for p in trainable(model)], expected)


def test_autocast_equals_a_loop_within_bfloat16():
    model, batch = make_model(dtype=torch.float32), make_batch(40)
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = clipped_sum(list(one_by_one(model, batch)), 0.5)
    with PerExample(model, clip_norm=0.5) as per_example:
        with torch.autocast("cpu", torch.bfloat16):
            losses_B = losses(model, batch)
        norms_B = per_example.backward(losses_B)
    assert norms_B.dtype == torch.float32
    assert_equal([p.grad for p in trainable(model)], expected, 0.02)


class TiedTwice(nn.Module):
    """One weight in two layers, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x_BTI))))).square().mean((1, 2))


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_uses_of_one_weight_are_one_gradient(tokens):
    model = TiedTwice().double()
    x_BTI = torch.randn(3, tokens, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = [list(torch.autograd.grad(model(x[None])[0], [model.first.weight])) for x in x_BTI]
    norms, expected = clipped_sum(gradients, 0.05)
    with PerExample(model, clip_norm=0.05) as per_example:
        found = per_example.backward(model(x_BTI))
    assert torch.allclose(found, norms, rtol=1e-12)
    assert_equal([model.first.weight.grad], expected)


def test_the_model_is_afterwards_what_it_was():
    model, batch = make_model(), make_batch(5)
    with pytest.raises(UserError), PerExample(model, clip_norm=1.0) as per_example:
        per_example.backward(losses(model, batch).mean())
    assert not any("forward" in module.__dict__ for module in model.modules() if type(module) is nn.Linear)
    losses(model, batch).sum().backward()
    assert all(p.grad is not None for p in trainable(model))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"targets": ("q_proj", "embed_tokens")}, "lora_embedding"),
        ({"modules_to_save": ["norm"]}, "norm"),
    ],
)
def test_parameters_that_cannot_be_clipped_are_refused_by_name(options, named):
    with pytest.raises(UserError, match=named):
        PerExample(make_model(**options), clip_norm=1.0)


def test_wrong_lists_of_parameters_are_refused():
    model = make_model()
    for listed in ([], trainable(model)[1:], [*trainable(model), nn.Parameter(torch.zeros(1))]):
        with pytest.raises(UserError):
            PerExample(model, listed, clip_norm=1.0)
    first = next(m for m in model.modules() if type(m) is nn.Linear and not m.weight.requires_grad)
    with pytest.raises(UserError, match="requires_grad"):
        PerExample(model, [*trainable(model), first.weight], clip_norm=1.0)
    with pytest.raises(UserError, match="max_grad_norm"):
        PerExample(model, clip_norm=0.0)
    with pytest.raises(UserError, match="batch norm"):
        PerExample(nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)), clip_norm=1.0)


def test_rows_that_are_not_the_examples_are_refused_and_no_gradient_is_changed():
    model, batch = make_model(), make_batch(6)
    with PerExample(model, clip_norm=1.0) as per_example:
        with pytest.raises(UserError, match="sees \\[4\\] rows for 2 examples"):
            per_example.backward(losses(model, batch).view(2, 2).sum(1))
        with pytest.raises(UserError, match="one loss per example"):
            per_example.backward(losses(model, batch).mean())
    assert all(p.grad is None for p in trainable(model))
    flat = nn.Sequential(nn.Linear(2, 2, bias=False))
    with PerExample(flat, clip_norm=1.0), pytest.raises(UserError, match="not \\[examples, tokens, features\\]"):
        flat(torch.ones(3, 2))


def test_a_row_that_is_not_finite_is_named_and_no_gradient_is_changed():
    model, batch = make_model(), make_batch(6)
    factors = torch.tensor([1.0, 1.0, float("inf"), 1.0], dtype=torch.float64)
    with PerExample(model, clip_norm=1.0) as per_example, pytest.raises(NonFiniteGradient, match="rows \\[2\\]"):
        per_example.backward(losses(model, batch) * factors)
    assert all(p.grad is None for p in trainable(model))
