"""Which tokens of a row are the prompt and which the response: the two sides of a self-aligned pair."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

MASK_KEYS = ("assistant_masks", "assistant_mask")  # both spellings are in use for the column that marks the response
NEEDS_SPANS = (
    "CRAFT strategy='self_align' needs either labels (with assistant tokens where labels != -100) or an assistant mask "
    "column"
)


class Spans(NamedTuple):
    """Two disjoint masks [B, T] of a batch and the rows [B] in which both have a token."""

    anchor_BT: Tensor  # the prompt
    positive_BT: Tensor  # the response
    valid_B: Tensor


def self_align_spans(
    batch: Mapping[str, Any], *, strategy: str, mask_key: str | None, label_key: str = "labels"
) -> Spans:
    """Return the prompt and the response of each row of a batch with ``input_ids`` [B, T].

    The response is what the mask column marks (``provided``), what that column or else the labels mark (``auto``), or
    every token (``none``). The prompt is every real token before the response; where there is none, as in raw text,
    the first half of the response is set against its second half (context against continuation, van den Oord 2018).
    ValueError when a column that the strategy needs is missing.
    """
    real_BT = _real_tokens(batch)
    response_BT = _response(batch, real_BT, strategy=strategy, mask_key=mask_key, label_key=label_key)
    counted_BT = response_BT.cumsum(1)
    anchor_BT = real_BT & (counted_BT == 0)
    alone_B1 = ~anchor_BT.any(1, keepdim=True)  # nothing stands before the response
    first_half_BT = response_BT & (counted_BT <= counted_BT[:, -1:] // 2) & alone_B1
    anchor_BT = anchor_BT | first_half_BT
    positive_BT = response_BT & ~first_half_BT
    return Spans(anchor_BT, positive_BT, anchor_BT.any(1) & positive_BT.any(1))


def assistant_mask_of(batch: Mapping[str, Any], mask_key: str | None) -> Tensor | None:
    """The batch's column of assistant tokens under the configured or either usual name; None without one."""
    for key in (mask_key, *MASK_KEYS):
        if key and isinstance(batch.get(key), Tensor):
            mask: Tensor = batch[key]
            return mask.bool()
    return None


def _real_tokens(batch: Mapping[str, Any]) -> Tensor:
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)
    real_BT: Tensor = mask.bool()
    return real_BT


def _response(
    batch: Mapping[str, Any], real_BT: Tensor, *, strategy: str, mask_key: str | None, label_key: str
) -> Tensor:
    if strategy == "none":
        return real_BT
    mask_BT = assistant_mask_of(batch, mask_key)
    if mask_BT is not None:
        return mask_BT.to(real_BT.device) & real_BT
    if strategy == "provided":
        raise ValueError(
            f"craft_assistant_mask_strategy='provided', but the batch has no column {mask_key!r}; it has "
            f"{', '.join(map(str, batch))}. Add the column, or use craft_assistant_mask_strategy='auto' with labels."
        )
    labels_BT = batch.get(label_key)
    if labels_BT is None:
        raise ValueError(f"{NEEDS_SPANS} (key={mask_key!r}); the batch has {', '.join(map(str, batch))}.")
    span_BT: Tensor = (labels_BT != -100) & real_BT
    return span_BT
