"""InfoNCE as its equation reads, in loops over Python numbers of torch float64: what the fast one is compared with."""

import torch
from torch import Tensor


def info_nce_by_loops(
    anchors: Tensor,
    positives: Tensor,
    *,
    temperature: float | Tensor,
    offset: int = 0,
    excluded: Tensor | None = None,
    queue: Tensor | None = None,
    excluded_queue: Tensor | None = None,
    negatives: Tensor | None = None,
    excluded_negatives: Tensor | None = None,
    negative_weight: float = 1.0,
    all_anchors: Tensor | None = None,
    excluded_back: Tensor | None = None,
) -> Tensor:
    """The loss of each anchor; the positive of anchor i is column offset + i."""
    excluded_back = excluded if excluded_back is None else excluded_back
    losses = []
    for i in range(len(anchors)):
        own = offset + i
        exponentials = [torch.exp(anchors[i] @ positives[own] / temperature)]
        for columns, mask, skipped, weight in (
            (positives, excluded, own, 1.0),
            (queue, excluded_queue, None, 1.0),
            (negatives, excluded_negatives, None, negative_weight),
        ):
            for j in range(0 if columns is None else len(columns)):
                if j != skipped and (mask is None or not mask[i, j]):
                    exponentials.append(weight * torch.exp(anchors[i] @ columns[j] / temperature))
        loss = torch.log(torch.stack(exponentials).sum()) - anchors[i] @ positives[own] / temperature
        if all_anchors is not None:
            exponentials = [
                torch.exp(positives[own] @ all_anchors[j] / temperature)
                for j in range(len(all_anchors))
                if j == own or excluded_back is None or not excluded_back[i, j]
            ]
            back = torch.log(torch.stack(exponentials).sum()) - positives[own] @ all_anchors[own] / temperature
            loss = (loss + back) / 2
        losses.append(loss)
    return torch.stack(losses)
