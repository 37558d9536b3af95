"""Which documents come first for a query, and how good that is: recall@k, nDCG@k, MRR.

Axes: Q queries, N documents, K ranks, D embedding size.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

SIMILARITIES = 2**24  # that exist at the same time: 64 MB in float32
DEPTH = 100  # ranks that MRR looks at


def top_documents(queries_QD: Tensor, blocks: Iterable[Tensor], depth: int) -> tuple[Tensor, Tensor]:
    """Return the scores [Q, K] and places [Q, K] of the `depth` documents most similar to each query, best first.

    `blocks` are the documents' vectors [n, D] in order; one block is held at a time. K is smaller where there are fewer
    documents. Of equally similar documents the first one comes first.
    """
    best = queries_QD.new_empty(len(queries_QD), 0), torch.empty(len(queries_QD), 0, dtype=torch.int64)
    first = 0
    for block_ND in blocks:
        step = max(1, SIMILARITIES // max(len(block_ND), 1))
        parts = [_top(part_QD @ block_ND.T, depth) for part_QD in queries_QD.split(step)]
        scores_QK, places_QK = (torch.cat(column) for column in zip(*parts, strict=True))
        scores = torch.cat([best[0], scores_QK], dim=1)
        places = torch.cat([best[1], places_QK.cpu() + first], dim=1)
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, :depth]  # earlier blocks stand first
        best = scores.gather(1, order), places.gather(1, order.cpu())
        first += len(block_ND)
    return best


def _top(scores_QN: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The highest scores of each row and their places; torch.topk leaves open which of equal scores it takes."""
    depth = min(depth, scores_QN.shape[1])
    places_QK = scores_QN.topk(depth, dim=1).indices.sort(dim=1).values
    last_Q = scores_QN.gather(1, places_QK).amin(1, keepdim=True)
    open_Q = (scores_QN >= last_Q).sum(1) > depth
    if bool(open_Q.any()):
        whole = scores_QN[open_Q].sort(dim=1, descending=True, stable=True).indices[:, :depth]
        places_QK[open_Q] = whole.sort(dim=1).values
    scores_QK = scores_QN.gather(1, places_QK)
    scores_QK, order = scores_QK.sort(dim=1, descending=True, stable=True)
    return scores_QK, places_QK.gather(1, order)


def ranking_figures(
    ranked: Sequence[Sequence[int]], grades: Sequence[Mapping[int, float]], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Return recall_at_k, ndcg_at_k and mrr, each the mean over the queries that have a relevant document.

    `ranked` holds each query's documents, best first; `grades` its relevant ones (grade above 0). recall@k is the share
    of the relevant documents among the first k. nDCG@k discounts grades by log2(rank + 1) over the best order's sum
    (Järvelin and Kekäläinen 2002, with linear gains, as in trec_eval). MRR is the mean of 1 / rank of the first
    relevant document, 0 beyond rank DEPTH.
    """
    found: dict[str, list[float]] = {}
    for places, judged in zip(ranked, grades, strict=True):
        ideal = sorted((grade for grade in judged.values() if grade > 0), reverse=True)
        if not ideal:
            continue
        gains = [max(judged.get(place, 0.0), 0.0) for place in places[: max(DEPTH, *ks)]]
        for k in ks:
            hits = sum(gain > 0 for gain in gains[:k])
            found.setdefault(f"recall_at_{k}", []).append(hits / len(ideal))
            found.setdefault(f"ndcg_at_{k}", []).append(_discounted(gains[:k]) / _discounted(ideal[:k]))
        first = next((rank for rank, gain in enumerate(gains[:DEPTH], start=1) if gain > 0), math.inf)
        found.setdefault("mrr", []).append(1 / first)
    return {name: float(np.mean(values)) for name, values in found.items()}


def _discounted(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))
