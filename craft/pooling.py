"""One vector per sequence from its hidden states and a mask, on either padding side and for masks with holes.

Axes: B sequences, T positions, H hidden size.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

PoolingStrategy = Literal["last_token", "mean", "cls", "weighted_mean"]


def pool_hidden_states(
    hidden_states: Tensor, attention_mask: Tensor, strategy: PoolingStrategy, weights: Tensor | None = None
) -> Tensor:
    """Pool hidden states [B, T, H] over the positions where the mask [B, T] is not 0; returns [B, H], dtype kept.

    `last_token` and `cls` take the last and the first such position, `mean` their average. `weighted_mean` weighs the
    n real tokens 1..n (Muennighoff 2022, SGPT, eq. 3) or by `weights` [T] or [B, T], which are per position. Sums are
    made in float32 (float64 stays), and what stands at masked positions has no influence, NaN included.
    Errors: ValueError for an unknown strategy, shapes that do not fit, and a row without any position to pool.
    """
    check_strategy(strategy)
    if hidden_states.ndim != 3 or attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"hidden states {list(hidden_states.shape)} and mask {list(attention_mask.shape)} do not fit: give "
            "[batch, tokens, hidden] and [batch, tokens] of the same batch."
        )
    if weights is not None and strategy != "weighted_mean":
        raise ValueError(f"weights are for pooling 'weighted_mean', not {strategy!r}: leave them out.")
    real_BT = attention_mask != 0
    _require(real_BT.any(1), "no position where its mask is 1, so there is nothing to pool")
    if strategy in ("last_token", "cls"):
        return _take(hidden_states, real_BT, last=strategy == "last_token")
    return _weighted_mean(hidden_states, real_BT, _position_weights(hidden_states, real_BT, strategy, weights))


def check_strategy(strategy: str) -> None:
    """Raise the ValueError that lists what is allowed unless `strategy` is a pooling strategy."""
    if strategy not in get_args(PoolingStrategy):
        raise ValueError(f"pooling {strategy!r} is unknown: choose one of {', '.join(get_args(PoolingStrategy))}.")


def _take(hidden_BTH: Tensor, real_BT: Tensor, *, last: bool) -> Tensor:
    length = real_BT.shape[1]
    positions_T = torch.arange(length, device=real_BT.device)
    # The mask's sum would be wrong under left padding and for masks with holes.
    if last:
        chosen_B = positions_T.masked_fill(~real_BT, -1).amax(1)
    else:
        chosen_B = positions_T.masked_fill(~real_BT, length).amin(1)
    return hidden_BTH[torch.arange(len(chosen_B), device=real_BT.device), chosen_B]


def _position_weights(hidden_BTH: Tensor, real_BT: Tensor, strategy: str, weights: Tensor | None) -> Tensor:
    """Weights [B, T] in the dtype of the sums, 0 at masked positions."""
    dtype = torch.promote_types(hidden_BTH.dtype, torch.float32)
    if strategy == "mean":
        return real_BT.to(dtype)
    if weights is None:
        return (real_BT.cumsum(1) * real_BT).to(dtype)
    if weights.shape not in (real_BT.shape, real_BT.shape[1:]):
        raise ValueError(
            f"weights {list(weights.shape)} do not fit hidden states of {list(real_BT.shape)} positions: give "
            "[tokens] or [batch, tokens]."
        )
    weights_BT = weights.to(real_BT.device, dtype).expand(real_BT.shape).masked_fill(~real_BT, 0)
    _require(weights_BT.sum(1) > 0, "weights that do not add up to more than 0 where its mask is 1")
    return weights_BT


def _weighted_mean(hidden_BTH: Tensor, real_BT: Tensor, weights_BT: Tensor) -> Tensor:
    # No matmul: autocast would round its inputs. Masked, not multiplied by zero: padding may hold NaN.
    sum_BH = (hidden_BTH.masked_fill(~real_BT.unsqueeze(-1), 0) * weights_BT.unsqueeze(-1)).sum(1)
    return (sum_BH / weights_BT.sum(1, keepdim=True)).to(hidden_BTH.dtype)


def _require(holds_B: Tensor, otherwise: str) -> None:
    if not bool(holds_B.all()):
        row = int((~holds_B).nonzero()[0])
        raise ValueError(f"row {row} of the batch has {otherwise}. Drop the row or correct its mask.")
