"""What a loss is given and what it gives back, and how labels are aligned with logits.

A batch follows transformers: labels[b, t] is about the token input_ids[b, t]. A loss never shifts: in LossInputs,
labels_BT[b, t] is the token that logits_BTV[b, t] predicts. `next_token` goes from the first to the second.

Axes: B rows, T positions, V vocabulary, H hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

from inft.client.losses.registry import Loss
from params.errors import UserError

Unit = Literal["tokens", "rows", "pairs"]
IGNORED = -100  # the label of a position that is not supervised, as in torch and transformers


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """What one forward pass of a language model gave, and what the user sent with the batch.

    Errors: UserError for shapes that do not fit, with the field.
    """

    logits_BTV: Tensor
    labels_BT: Tensor  # the token that each position predicts, already shifted; IGNORED where nothing is supervised
    attention_mask_BT: Tensor  # of the model's inputs, not shifted: 1 real, 0 padding
    hidden_BTH: Tensor | None = None  # last hidden states, for losses on embeddings
    extras: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))  # [B], or [B, T] as labels_BT

    def __post_init__(self) -> None:
        if self.logits_BTV.ndim != 3:
            raise UserError(f"logits have the shape {list(self.logits_BTV.shape)}: give [rows, tokens, vocabulary].")
        grid = self.logits_BTV.shape[:2]
        _require_shape("labels", self.labels_BT, grid)
        _require_shape("attention_mask", self.attention_mask_BT, grid)
        if self.labels_BT.is_floating_point():
            raise UserError(f"labels are {self.labels_BT.dtype}: give token ids, which are whole numbers.")
        if self.hidden_BTH is not None:
            _require_shape("hidden states", self.hidden_BTH[..., 0], grid)

    @property
    def rows(self) -> int:
        """B, the number of rows."""
        return len(self.labels_BT)


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """A loss to minimise, and what it is made of.

    Errors: UserError for a loss that is not one number, and for per-example losses that are no vector.
    """

    loss: Tensor  # scalar
    per_example_B: Tensor | None = None  # each row's own loss, for clipping; None: the loss cannot be used with privacy
    metrics: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    denominator: int | None = None  # what `loss` was divided by; None: a sum, which adds up
    unit: Unit = "tokens"  # what `denominator` counts: a mean over tokens and one over rows have no common scale
    separable: bool = True  # a row's loss depends on that row alone: without this, clipping rows bounds nothing

    def __post_init__(self) -> None:
        if not isinstance(self.loss, Tensor) or self.loss.ndim != 0:
            shape = list(self.loss.shape) if isinstance(self.loss, Tensor) else type(self.loss).__name__
            raise UserError(f"a loss is one number, and this is {shape}: return its mean or its sum.")
        if self.per_example_B is not None and self.per_example_B.ndim != 1:
            raise UserError(f"per_example_B has the shape {list(self.per_example_B.shape)}: give one number per row.")


def evaluate_loss(loss: Loss, inputs: LossInputs, *, name: str = "loss") -> LossOutput:
    """Return what `loss` makes of `inputs`, checked as a user's own function needs it.

    Errors: UserError when it returns no LossOutput, other than B per-example losses, losses without a gradient although
    the logits or hidden states have one, a denominator that is no count, another unit, or a metric that is no number.
    """
    output = loss(inputs)
    if not isinstance(output, LossOutput):
        raise UserError(f"loss {name!r} returned {type(output).__name__}: return LossOutput(loss=...).")
    if output.per_example_B is not None and len(output.per_example_B) != inputs.rows:
        given = len(output.per_example_B)
        raise UserError(f"loss {name!r} gave {given} per-example losses for {inputs.rows} rows: give one for each.")
    _require_plain(output, name)
    hidden = inputs.hidden_BTH
    tracked = inputs.logits_BTV.requires_grad or (hidden is not None and hidden.requires_grad)
    if tracked and torch.is_grad_enabled():
        found = {"loss": output.loss, "per_example_B": output.per_example_B}
        for part, values in found.items():
            if values is not None and not values.requires_grad:
                raise UserError(f"loss {name!r}: {part} has no gradient: compute it from the logits, undetached.")
    return output


def _require_plain(output: LossOutput, name: str) -> None:
    """Refuse what no later step could use: results are written as JSON, and steps are divided by denominators."""
    denominator = output.denominator
    if denominator is not None and (type(denominator) is not int or denominator < 1):
        raise UserError(f"loss {name!r}: denominator is {denominator!r:.60}: give a whole number above 0, or None.")
    if output.unit not in get_args(Unit):
        raise UserError(f"loss {name!r}: unit is {output.unit!r:.60}: give one of {', '.join(get_args(Unit))}.")
    for key, value in output.metrics.items():
        if not isinstance(key, str) or type(value) not in (int, float):
            raise UserError(f"loss {name!r}: metric {key!r} is {type(value).__name__}: give float(...) under a name.")


def next_token(values_BT: Tensor, fill: float) -> Tensor:
    """Return per-token values [B, T] moved one position to the left, so that position t holds those of token t + 1.

    The last position, after which nothing is known, gets `fill`; the values of token 0, which nothing predicts, go.
    """
    last_B1 = torch.full_like(values_BT[:, :1], fill)
    return torch.cat([values_BT[:, 1:], last_B1], dim=1)


def next_token_labels(labels_BT: Tensor) -> Tensor:
    """Return the labels of a batch [B, T] as LossInputs wants them: position t holds the label of token t + 1."""
    return next_token(labels_BT, IGNORED)


def _require_shape(field_name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        given, wanted = list(tensor.shape), list(shape)
        raise UserError(f"{field_name} have the rows and tokens {given}, and the logits have {wanted}: give the same.")
