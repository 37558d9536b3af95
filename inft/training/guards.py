"""Checks before the first step, each of one thing that would make training useless; they leave no trace in it."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from inft.models.collate import where
from inft.models.spec import ModelSpec
from inft.sample import Sample
from params.errors import UserError

Batch = Mapping[str, Tensor]
Looked = tuple[Sequence[Sample], Batch]  # some rows and what the collator made of them


@dataclass(frozen=True, kw_only=True)
class GuardResult:
    """What one guard found."""

    name: str
    ok: bool
    detail: str  # a sentence with the figures; the remedy when not ok


def run_guards(
    model: PeftModel,
    spec: ModelSpec,
    processor: Any,
    batches: Sequence[Looked],
    *,
    forward: Callable[[Batch], Any],
    report: Callable[[GuardResult], None],
) -> None:
    """Run every guard on some collated batches, report each, and raise one UserError when any of them failed.

    ``forward`` runs the model as training does and returns TRL's FusedCausalLMOutput. Weights, gradients, the
    model's mode and all random states are afterwards as they were.
    """
    results: list[GuardResult] = []

    def check(result: GuardResult) -> None:
        results.append(result)
        report(result)

    with _left_untouched(model):
        check(trainable_parameters(model))
        check(supervised_tokens(batches))
        check(labels_in_vocabulary(model, batches))
        if spec.image_token_count is not None:
            check(image_tokens_match_features(spec, processor, batches))
        if all(result.ok for result in results):  # the model cannot run on what failed above
            if spec.takes_images:
                check(image_changes_logits(model, batches, forward))
            check(adapters_get_gradients(model, batches, forward))
    failed = [f"{result.name}: {result.detail}" for result in results if not result.ok]
    if failed:
        raise UserError("the run is not started:\n  " + "\n  ".join(failed))


def trainable_parameters(model: PeftModel) -> GuardResult:
    """Something is trained."""
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    detail = f"{count:,} parameters are trained"
    return GuardResult(
        name="trainable parameters",
        ok=count > 0,
        detail=f"{detail}." if count else "no parameter is trained. Check lora.target_modules with inft list-modules.",
    )


def supervised_tokens(batches: Sequence[Looked]) -> GuardResult:
    """Every row looked at has a token to learn, after the shift by one that the loss makes."""
    empty, supervised, total = [], 0, 0
    for samples, batch in batches:
        counts_B = (batch["labels"][:, 1:] != -100).sum(1)
        supervised += int(counts_B.sum())
        total += int(batch["attention_mask"].sum())
        empty += [where(samples[row]) for row in (counts_B == 0).nonzero()[:, 0].tolist()]
    detail = f"{supervised:,} of {total:,} tokens are supervised"
    if empty:
        detail += f", but none in {', '.join(empty)}: give the row an answer, or drop it"
    return GuardResult(name="supervised tokens", ok=not empty, detail=f"{detail}.")


def labels_in_vocabulary(model: PeftModel, batches: Sequence[Looked]) -> GuardResult:
    """Every label is a row of the head, every input token a row of the embeddings."""
    base = model.get_base_model()
    head = base.get_output_embeddings().weight.shape[0]
    embeddings = base.get_input_embeddings().weight.shape[0]
    labels = torch.cat([batch["labels"][batch["labels"] != -100] for _, batch in batches])
    tokens = torch.cat([batch["input_ids"].flatten() for _, batch in batches])
    ok = bool(((labels >= 0) & (labels < head)).all() and ((tokens >= 0) & (tokens < embeddings)).all())
    detail = f"labels reach {labels.max():,} of {head:,}, input tokens {tokens.max():,} of {embeddings:,}."
    if not ok:
        detail += " The tokenizer does not belong to this model: name the model's own processor."
    return GuardResult(name="labels in the vocabulary", ok=ok, detail=detail)


def image_tokens_match_features(spec: ModelSpec, processor: Any, batches: Sequence[Looked]) -> GuardResult:
    """The text has as many places for the image as the image has features."""
    assert spec.image_token_count is not None
    counts = [spec.image_token_count(processor, batch) for _, batch in batches]
    wrong = [index for index, (tokens, features) in enumerate(counts) if tokens != features]
    detail = f"{sum(tokens for tokens, _ in counts):,} image tokens, {sum(f for _, f in counts):,} image features."
    if wrong:
        rows = [where(sample) for index in wrong for sample in batches[index][0]]
        detail += f" They differ in the batch of {', '.join(rows[:8])}: does the processor belong to this model?"
    return GuardResult(name="image tokens match features", ok=not wrong, detail=detail)


def image_changes_logits(model: PeftModel, batches: Sequence[Looked], forward: Callable[[Batch], Any]) -> GuardResult:
    """Another image (the same one with every pixel negated) gives the answer another probability."""
    name = "the image changes the logits"
    batch = next((batch for _, batch in batches if batch.get("pixel_values") is not None), None)
    if batch is None:
        return GuardResult(name=name, ok=True, detail="no row looked at has an image.")
    model.eval()
    with torch.no_grad():
        seen = forward(batch).log_probs
        negated = forward({**batch, "pixel_values": -batch["pixel_values"]}).log_probs
    change = float((seen - negated).abs().max())
    detail = f"log-probabilities of the answer change by up to {change:.3g} when the image is negated."
    if change <= 1e-6:
        detail += " The model does not look at its image: are its vision weights loaded, its cross-attention gates 0?"
    return GuardResult(name=name, ok=change > 1e-6, detail=detail)


def adapters_get_gradients(model: PeftModel, batches: Sequence[Looked], forward: Callable[[Batch], Any]) -> GuardResult:
    """A backward pass reaches every adapter: finite gradients, not all of them zero.

    At step 0 the gradient of LoRA's A is zero because B is; so each adapter, not each matrix, must have one.
    """
    model.train()
    for _, batch in batches:
        forward(batch).loss.backward()
    adapters: dict[str, list[Tensor | None]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" in name:  # a trained bias may stand where nothing passes
            adapters.setdefault(name.split(".lora_")[0], []).append(parameter.grad)
    known = {name: [grad for grad in grads if grad is not None] for name, grads in adapters.items()}
    infinite = [name for name, grads in known.items() if not all(grad.isfinite().all() for grad in grads)]
    dead = [name for name, grads in known.items() if not any(grad.any() for grad in grads)]
    detail = f"{len(adapters) - len(dead)} of {len(adapters)} adapters get a gradient"
    if infinite:
        detail += f"; it is not finite in {_some(infinite)}: use bfloat16 or float32"
    if dead:
        detail += f"; none reaches {_some(dead)}: take them out of lora.target_modules, or add rows that use them"
    return GuardResult(name="every adapter gets a gradient", ok=not infinite and not dead, detail=f"{detail}.")


@contextmanager
def _left_untouched(model: torch.nn.Module) -> Iterator[None]:
    """Restore random states, each module's mode and the absence of gradients."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            model.zero_grad(set_to_none=True)
            for module, training in modes:
                module.training = training


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(name.removeprefix("base_model.model.") for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
