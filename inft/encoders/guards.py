"""Checks of the first micro-batch, before the first step; they leave no trace in training.

Axes: T tokens of the stream, H hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from inft.encoders.data.flat import FlatBatch
from inft.encoders.data.masking import IGNORED
from inft.encoders.loop import Loss
from inft.training.guards import GuardResult
from params.encoder import EncoderParams
from params.encoder_lowprecision import enabled_sections

B = TypeVar("B")
MANY_UNKNOWN = 0.5  # share of the tokens
SURELY_MASKED = 50  # expected number of masked tokens, of which it is no chance that none is
LEAK = 1e-6  # largest change of a hidden state, as a share of the largest, when another document changes


def masked_token_guards(
    model: nn.Module,
    batch: FlatBatch,
    loss: Callable[[nn.Module, FlatBatch], Loss],
    params: EncoderParams,
    unk_token_id: int | None,
) -> Iterator[GuardResult]:
    """Yield what each check finds of a plain model and a batch on its device."""
    yield words_are_known(batch, unk_token_id)
    yield tokens_are_masked(batch, params.datacollator.mlm_probability)
    if not enabled_sections(params):  # with scales for a whole batch, every number depends a little on every other
        yield documents_are_apart(model, batch)
    if batch.masked:
        yield weights_get_gradients(model, batch, loss)


def words_are_known(batch: FlatBatch, unk_token_id: int | None) -> GuardResult:
    """The tokenizer knows the script: most tokens are not the unknown one."""
    real_T = torch.where(batch.labels_T == IGNORED, batch.input_ids_T, batch.labels_T)[: batch.tokens]
    unknown = None if unk_token_id is None else int((real_T == unk_token_id).sum())
    return tokens_are_known(unknown, batch.tokens)


def tokens_are_known(unknown: int | None, tokens: int) -> GuardResult:
    """Most tokens are not the unknown one; None where the tokenizer has none."""
    if unknown is None:
        return GuardResult(name="known words", ok=True, detail="the tokenizer has no unknown token.")
    share = unknown / max(tokens, 1)
    detail = f"{share:.1%} of the tokens are unknown to the tokenizer."
    if share > MANY_UNKNOWN:
        detail += " Nothing can be learned of those: set tokenizer.name to one that was made for these languages."
    return GuardResult(name="known words", ok=share <= MANY_UNKNOWN, detail=detail)


def tokens_are_masked(batch: FlatBatch, wanted: float) -> GuardResult:
    """Something is predicted, where there are enough tokens to expect it."""
    share = batch.masked / max(batch.tokens, 1)
    detail = f"{batch.masked:,} of {batch.tokens:,} tokens are predicted ({share:.1%}; {wanted:.0%} are asked for)."
    ok = batch.masked > 0 or batch.tokens * wanted < SURELY_MASKED
    return GuardResult(name="masked tokens", ok=ok, detail=detail if ok else f"{detail} Look at the documents.")


@torch.no_grad()
def documents_are_apart(model: nn.Module, batch: FlatBatch) -> GuardResult:
    """When one document changes, no hidden state of another one does."""
    name, end = "documents apart", int(batch.cu_seqlens[1]) if len(batch.cu_seqlens) > 1 else 0
    if end == 0 or end >= batch.tokens:
        return GuardResult(name=name, ok=True, detail="the batch has one document.")
    changed_T = batch.input_ids_T.clone()
    changed_T[:end] = changed_T[:end].roll(1) if changed_T[:end].unique().numel() > 1 else changed_T[end]
    changed = replace(batch, input_ids_T=changed_T)
    with _left_untouched(model):
        model.eval()
        before_TH, after_TH = _hidden(model, batch), _hidden(model, changed)
    own = float((before_TH[:end] - after_TH[:end]).abs().max())
    others = float((before_TH[end:] - after_TH[end:]).abs().max())
    limit = LEAK * float(before_TH.abs().max())
    if others > limit:
        remedy = "the attention backend mixes documents: set model.attn_backend: sdpa, or update torch or flash-attn."
        return GuardResult(
            name=name, ok=False, detail=f"another document changes hidden states by {others:.2g}; {remedy}"
        )
    return GuardResult(
        name=name,
        ok=True,
        detail=f"a changed document moves its own hidden states by {own:.2g}, others by {others:.2g}.",
    )


def rows_are_contrasted(contrasted: int, rows: int) -> GuardResult:
    """Some row of the first batch has a negative: the loss of the others is 0, and so is its gradient."""
    name = "contrasted rows"
    if contrasted:
        return GuardResult(name=name, ok=True, detail=f"{contrasted:,} of {rows:,} rows have a negative.")
    return GuardResult(
        name=name,
        ok=False,
        detail="no row of the first batch has a negative: raise trainer.per_device_train_batch_size, add rows or neg.",
    )


def weights_get_gradients(model: nn.Module, batch: B, loss: Callable[[nn.Module, B], Loss]) -> GuardResult:
    """Every trained weight gets a finite gradient that is not zero; random states and mode stay."""
    with _left_untouched(model):
        model.train()
        loss(model, batch).sum.backward()
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    without = [name for name, weight in named if weight.grad is None or not bool(weight.grad.any())]
    infinite = [name for name, weight in named if weight.grad is not None and not bool(weight.grad.isfinite().all())]
    for _, weight in named:
        weight.grad = None
    if without or infinite:
        what = f"no gradient reaches {without[0]}" if without else f"the gradient of {infinite[0]} is not finite"
        half = torch.is_autocast_enabled(next(model.parameters()).device.type)
        remedy = "Set trainer.mixed_precision: no to see why." if half else "Look at the model's stored weights."
        return GuardResult(name="gradients", ok=False, detail=f"{what}. {remedy}")
    count = sum(weight.numel() for _, weight in named)
    return GuardResult(name="gradients", ok=True, detail=f"all {len(named)} weights ({count:,} numbers) get one.")


def _hidden(model: nn.Module, batch: FlatBatch) -> Tensor:
    encoder = model.get_submodule("model")
    hidden_TH: Tensor = encoder(
        batch.input_ids_T,
        position_ids=batch.position_ids_T,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
    ).last_hidden_state
    return hidden_TH.float()


@contextmanager
def _left_untouched(model: nn.Module) -> Iterator[None]:
    """Put the random states and the mode back."""
    training = model.training
    with torch.random.fork_rng():
        yield
    model.train(training)
