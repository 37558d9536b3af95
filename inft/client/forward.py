"""The loss of one batch under the weights that a base has at the moment.

Axes: B rows, T positions, V vocabulary, H hidden size.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from inft.client.bases import Base
from inft.client.batches import ModelBatch, model_inputs
from inft.client.errors import InvalidRequest, NotFinite
from inft.client.losses.inputs import LossOutput, evaluate_loss
from inft.client.losses.registry import Loss
from inft.training.hardware import is_out_of_memory
from params.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A forward_backward that was checked, on the CPU."""

    model_batch: ModelBatch
    loss: Loss
    loss_name: str


def compute_loss(base: Base, prepared: Prepared) -> LossOutput:
    """Return what the loss makes of the model's logits and last hidden states, in the grad mode of the caller.

    Errors: NotFinite for a loss that is NaN or infinite; UserError for a batch that the loss refuses; InvalidRequest
    for a loss that fails otherwise.
    """
    with head_inputs(base.model) as seen:
        logits_BTV = base.model(**model_inputs(base, prepared.model_batch), use_cache=False).logits
    batch = prepared.model_batch.batch.to(base.device)
    inputs = batch.loss_inputs(logits_BTV, seen[0] if seen else None)
    try:
        output = evaluate_loss(prepared.loss, inputs, name=prepared.loss_name)
    except UserError:
        raise
    except Exception as error:  # whatever a user's function does, also a built-in one with options of a wrong type
        if is_out_of_memory(error):
            raise
        raise InvalidRequest(f"loss {prepared.loss_name!r} failed: {type(error).__name__}: {error}") from error
    value = float(output.loss.detach())
    if not math.isfinite(value):
        raise NotFinite(f"the loss is {value}: lower the learning rate, or look at the batch.")
    return output


@contextmanager
def head_inputs(model: Any) -> Iterator[list[Tensor]]:
    """Within it the list is what the model's head last read: the last hidden states [B, T, H], at no cost."""
    seen: list[Tensor] = []

    def keep(head: Any, args: tuple[Tensor, ...]) -> None:
        seen[:] = args[:1]

    head = model.get_output_embeddings()
    if head is None:
        yield seen
        return
    handle = head.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
