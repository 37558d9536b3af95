"""Figures that tell whether the contrastive term works: top-1 accuracy and drift of the representations."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def compute_contrastive_accuracy(anchor: Tensor, positives: Tensor) -> Tensor:
    """Return the share of anchors [B, D] that are more similar to their own positive than to any other of [M, D].

    Positive i belongs to anchor i; M may exceed B. A tie is not a hit: a collapsed encoder scores 0, not 1/B. A
    single pair has nothing to be told from and scores 1. Errors: ValueError without any anchor.
    """
    _require_rows(anchor, "anchors")
    with torch.autocast(anchor.device.type, enabled=False):
        similarity_BM = anchor.float() @ positives.float().T
    own_B = similarity_BM.diagonal().clone()
    similarity_BM.fill_diagonal_(-torch.inf)
    return (own_B > similarity_BM.amax(1)).float().mean()


@torch.no_grad()
def compute_representation_consistency(current: Tensor, reference: Tensor | None, *, epsilon: float = 1e-8) -> Tensor:
    """Return the mean cosine similarity of embeddings [B, D] to a reference [D] or [B, D]; never NaN.

    1 before there is a reference: nothing has moved yet. `epsilon` is the least norm that is divided by.
    Errors: ValueError without any embedding.
    """
    _require_rows(current, "embeddings")
    if reference is None:
        return torch.ones((), device=current.device)
    current_BD = F.normalize(current.float(), dim=-1, eps=epsilon)
    reference_D = F.normalize(reference.to(current.device).float(), dim=-1, eps=epsilon)
    return (current_BD * reference_D).sum(-1).mean()


@torch.no_grad()
def update_representation_reference(prev_reference: Tensor | None, current: Tensor, *, momentum: float = 0.9) -> Tensor:
    """Return the reference [D] moved towards the mean of the embeddings [B, D]: m * previous + (1 - m) * mean.

    The mean itself when there is no previous one. float32, without graph, on the device of `current`.
    Errors: ValueError without any embedding.
    """
    _require_rows(current, "embeddings")
    mean_D = current.float().mean(0)
    if prev_reference is None:
        return mean_D
    return momentum * prev_reference.to(mean_D) + (1 - momentum) * mean_D


def _require_rows(embeddings: Tensor, name: str) -> None:
    if not len(embeddings):
        raise ValueError(f"no {name}: a batch without rows has no such figure. Leave it out of the log.")
