"""InfoNCE as a pure function: in-batch negatives of all processes, a queue, hard negatives, exclusions.

Axes: B anchors of this process, M positives of all processes, K queued and N hard negatives, D embedding size.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUEUE_BLOCK = 2**20  # similarities to the queue that exist at the same time: 4 MB in float32


@dataclass(frozen=True, kw_only=True)
class InfoNCEOutput:
    """What info_nce finds for each anchor; the last two follow anchor → positive in the symmetric form too."""

    losses_B: Tensor  # float32, or float64 for float64 embeddings
    correct_B: Tensor  # bool: the positive is more similar than every negative; true without any negative
    contrasted_B: Tensor  # bool: the anchor has at least one negative


def info_nce(
    anchors_BD: Tensor,
    positives_MD: Tensor,
    *,
    temperature: float | Tensor,
    offset: int = 0,
    excluded_BM: Tensor | None = None,
    queue_KD: Tensor | None = None,
    excluded_BK: Tensor | None = None,
    negatives_ND: Tensor | None = None,
    excluded_BN: Tensor | None = None,
    negative_weight: float = 1.0,
    all_anchors_MD: Tensor | None = None,
    excluded_back_BM: Tensor | None = None,
) -> InfoNCEOutput:
    """Return each anchor's InfoNCE loss: log Σ_j exp(a_i·p_j/τ) - a_i·p_i/τ (van den Oord et al. 2018, eq. 4).

    Anchor i's positive is column `offset` + i, which is never excluded; the sum runs over it, the other positives,
    the queue (no gradient) and the hard negatives, each of which counts `negative_weight` times (its logarithm is added
    to their logits), less the excluded columns. With `all_anchors_MD` it is the mean of this and of positive → anchors
    of all processes (Radford et al. 2021, CLIP); queue and hard negatives enter the first only. `excluded_back_BM` says
    which anchors j are no negatives of positive i; without it that is `excluded_BM`, whose [i, j] is about anchor i and
    positive j: leave it out only where both mean the same, as with rows that share a text.
    Embeddings are unit vectors; everything is computed in float32 (float64 stays), autocast off.
    Errors: ValueError when there is no column for an anchor, and for a weight that is not above 0.
    """
    if not negative_weight > 0:
        raise ValueError(f"negative_weight is {negative_weight}: give a number above 0, or no hard negatives.")
    rows, columns = len(anchors_BD), len(positives_MD)
    if not 0 <= offset <= columns - rows:
        raise ValueError(f"{rows} anchors from column {offset} on need as many positives: there are {columns}.")
    dtype = torch.promote_types(anchors_BD.dtype, torch.float32)
    if columns == 0:  # batches of which no row has two sides
        nothing_B = torch.zeros(0, dtype=torch.bool, device=anchors_BD.device)
        losses_B = (anchors_BD + positives_MD).to(dtype).sum(1)
        return InfoNCEOutput(losses_B=losses_B, correct_B=nothing_B, contrasted_B=nothing_B)
    with torch.autocast(anchors_BD.device.type, enabled=False):
        positives_MD = positives_MD.to(dtype)
        scaled_BD = anchors_BD.to(dtype) / temperature
        own_B, negative_B, best_B = _in_batch(scaled_BD, positives_MD, offset, excluded_BM)
        if negatives_ND is not None and len(negatives_ND):
            logits_BN = _masked(scaled_BD @ negatives_ND.to(dtype).T, excluded_BN)
            negative_B = torch.logaddexp(negative_B, logits_BN.logsumexp(1) + math.log(negative_weight))
            best_B = torch.maximum(best_B, logits_BN.detach().amax(1))
        if queue_KD is not None and len(queue_KD):
            sum_B, top_B = _QueueLogSumExp.apply(scaled_BD, queue_KD, excluded_BK)
            negative_B = torch.logaddexp(negative_B, sum_B)
            best_B = torch.maximum(best_B, top_B)
        losses_B = _softplus(negative_B - own_B)
        if all_anchors_MD is not None:
            scaled_BD = positives_MD[offset : offset + rows] / temperature
            blocked_BM = excluded_BM if excluded_back_BM is None else excluded_back_BM
            back_B, negative_B, _ = _in_batch(scaled_BD, all_anchors_MD.to(dtype), offset, blocked_BM)
            losses_B = (losses_B + _softplus(negative_B - back_B)) / 2
    return InfoNCEOutput(
        losses_B=losses_B, correct_B=own_B.detach() > best_B, contrasted_B=best_B > torch.finfo(dtype).min
    )


def _in_batch(
    scaled_BD: Tensor, columns_MD: Tensor, offset: int, excluded_BM: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's own logit, log Σ exp of its other logits, and the highest of those without gradient."""
    logits_BM = scaled_BD @ columns_MD.T
    own_B = logits_BM.diagonal(offset)
    blocked_BM = torch.zeros_like(logits_BM, dtype=torch.bool) if excluded_BM is None else excluded_BM.clone()
    blocked_BM.diagonal(offset).fill_(True)
    others_BM = _masked(logits_BM, blocked_BM)
    return own_B, others_BM.logsumexp(1), others_BM.detach().amax(1)


def _masked(logits: Tensor, excluded: Tensor | None) -> Tensor:
    # The lowest number, not -inf: a row without any negative has then a loss and a gradient of 0 instead of NaN.
    return logits if excluded is None else logits.masked_fill(excluded, torch.finfo(logits.dtype).min)


def _softplus(x_B: Tensor) -> Tensor:
    """log(1 + e^x), exact where the loss is tiny: -log softmax would lose the digits below the logits' own rounding."""
    return torch.logaddexp(x_B, torch.zeros_like(x_B))


class _QueueLogSumExp(torch.autograd.Function):
    """log Σ_k exp(a_i·q_k) over constant q, and the highest a_i·q_k, without ever holding all B x K logits.

    A running maximum keeps the sum exact block by block (Milakov and Gimelshein 2018). The gradient, softmax(a·q) q,
    is summed alongside, so that the backward pass costs nothing and nothing of size K waits for it.
    """

    @staticmethod
    def forward(ctx: Any, a_BD: Tensor, queue_KD: Tensor, excluded_BK: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, wants_gradient = len(a_BD), ctx.needs_input_grad[0]
        top_B = a_BD.new_full((rows,), torch.finfo(a_BD.dtype).min)
        sum_B, pull_BD = torch.zeros_like(top_B), torch.zeros_like(a_BD)
        step = max(1, QUEUE_BLOCK // max(rows, 1))
        for start in range(0, len(queue_KD), step):
            block_KD = queue_KD[start : start + step].to(a_BD.dtype)
            logits_BK = a_BD @ block_KD.T
            if excluded_BK is not None:
                logits_BK.masked_fill_(excluded_BK[:, start : start + step], -torch.inf)
            before_B, top_B = top_B, torch.maximum(top_B, logits_BK.amax(1))
            weights_BK = logits_BK.sub_(top_B.unsqueeze(1)).exp_()
            shrink_B = (before_B - top_B).exp_()
            sum_B = sum_B * shrink_B + weights_BK.sum(1)
            if wants_gradient:
                pull_BD = torch.addmm(pull_BD * shrink_B.unsqueeze(1), weights_BK, block_KD)
        ctx.save_for_backward(pull_BD / sum_B.clamp(min=1).unsqueeze(1))  # below 1 only when all is excluded
        ctx.mark_non_differentiable(top_B)
        return top_B + sum_B.log(), top_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor, _top: Tensor) -> tuple[Tensor, None, None]:
        (pull_BD,) = ctx.saved_tensors
        return grad_B.unsqueeze(1) * pull_BD, None, None
