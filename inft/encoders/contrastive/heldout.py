"""The figures of held-out rows during training: the loss, and how well queries find their positives.

Axes: Q queries, N documents, D embedding size.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from craft.distributed import gather_rows, sum_over_ranks
from inft.encoders.contrastive.batches import ContrastiveBatch, Texts, evaluation_batches
from inft.encoders.contrastive.encode import TextEncoder
from inft.encoders.contrastive.objective import contrastive_loss
from inft.encoders.contrastive.sources import PairRows
from inft.encoders.evaluation.ranking import DEPTH, ranking_figures, top_documents
from params.encoder import EncoderParams


class HeldOut:
    """Fixed batches of held-out rows, and the queries and documents in them, each text once.

    The corpus is every positive and hard negative of these rows, all of them and not the drawn ones alone; rows that
    share a query share their positives.
    """

    def __init__(
        self, sources: Sequence[PairRows], params: EncoderParams, *, rank: int = 0, world_size: int = 1
    ) -> None:
        self.batch_size = params.trainer.per_device_eval_batch_size
        self.rank, self.world_size = rank, world_size
        # Each process has batches of its own: what one contrasts must not depend on how many there are.
        self.objective = replace(params.contrastive, gather_negatives=False, gradcache_chunk_size=None)
        self.batches = list(islice(evaluation_batches(sources, params), params.trainer.eval_max_batches))
        self.queries: Texts = []
        self.documents: Texts = []
        self.relevant: list[dict[int, float]] = []  # of each query: place of the document -> grade
        self.own: list[set[int]] = []  # of each query: documents that are the query itself, and do not answer it
        self._collect(sources, sum(len(batch) for batch in self.batches))

    def figures(self, encoder: TextEncoder) -> dict[str, Any]:
        """Return loss, in-batch accuracy (positive above all negatives), tokens, loss by source, recall, nDCG and MRR.

        Loss and accuracy are means over the rows that have a negative; nan where none has. Every process calls it and
        gets the same. The encoder's model is plain, in eval mode.
        """
        names = sorted({batch.source for batch in self.batches})
        device = next(encoder.model.parameters()).device
        sums_S4 = torch.zeros(len(names), 4, dtype=torch.float64, device=device)
        for batch in self.batches[self.rank :: self.world_size]:
            sums_S4[names.index(batch.source)] += _sums(encoder, batch, self.objective)
        sums_S4 = sum_over_ranks(sums_S4)
        loss, correct, rows, tokens = sums_S4.sum(0).tolist()
        return {
            "loss": loss / rows if rows else math.nan,
            "in_batch_accuracy": correct / rows if rows else math.nan,
            "tokens": int(tokens),
            "languages": {},
            "sources": {name: float(s[0] / s[2]) for name, s in zip(names, sums_S4, strict=True)},  # 0 / 0 is nan
            **self._retrieval(encoder),
        }

    def _retrieval(self, encoder: TextEncoder) -> dict[str, float]:
        queries_QD, documents_ND = (self._embed(encoder, texts) for texts in (self.queries, self.documents))
        spare = max(map(len, self.own), default=0)
        _, places_QK = top_documents(queries_QD, documents_ND.split(2**16), DEPTH + spare)
        ranked = [
            [place for place in places if place not in own]
            for places, own in zip(places_QK.tolist(), self.own, strict=True)
        ]
        return ranking_figures(ranked, self.relevant)

    def _embed(self, encoder: TextEncoder, texts: Texts) -> Tensor:
        """The vectors of texts, shared out over the processes in pieces of similar length, in the texts' order."""
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        mine = order[self.rank :: self.world_size]
        parts = [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]
        size = encoder.model.config.hidden_size
        own_BD = torch.cat(
            [torch.empty(0, size, device=next(encoder.model.parameters()).device)]
            + [encoder([texts[place] for place in part]).float() for part in parts]
        )
        all_ND = gather_rows(own_BD)[0]
        gathered = [place for rank in range(self.world_size) for place in order[rank :: self.world_size]]
        return all_ND[torch.tensor(gathered).argsort().to(all_ND.device)]

    def _collect(self, sources: Sequence[PairRows], rows: int) -> None:
        queries: dict[int, int] = {}
        documents: dict[int, int] = {}
        everything = ((source, number) for source in sources for number in range(source.rows))
        for source, number in islice(everything, rows):
            row = source.pairs.row(source.first + number)
            query = _place(row.query_key, row.query, queries, self.queries)
            if query == len(self.relevant):
                self.relevant.append({})
            for key, text in zip(row.positive_keys, row.positives, strict=True):
                self.relevant[query][_place(key, text, documents, self.documents)] = 1.0
            for key, text in zip(row.negative_keys, row.negatives, strict=True):
                _place(key, text, documents, self.documents)
        same: dict[bytes, set[int]] = {}
        for place, text in enumerate(self.documents):
            same.setdefault(text.tobytes(), set()).add(place)
        for (key, query), text in zip(queries.items(), self.queries, strict=True):
            equal = same.get(text.tobytes(), set()) | ({documents[key]} if key in documents else set())
            self.own.append(equal - self.relevant[query].keys())


def _place(key: int, text: Any, places: dict[int, int], texts: Texts) -> int:
    if key not in places:
        places[key] = len(texts)
        texts.append(text)
    return places[key]


def _sums(encoder: TextEncoder, batch: ContrastiveBatch, objective: Any) -> Tensor:
    """Loss, correct and rows of those that have a negative; tokens of all."""
    found = contrastive_loss(encoder, batch, objective)
    rows_B = found.contrasted_B
    values = [found.losses_B.double()[rows_B].sum(), found.correct_B[rows_B].sum(), rows_B.sum()]
    return torch.stack([value.double() for value in [*values, values[2].new_tensor(batch.tokens)]])
