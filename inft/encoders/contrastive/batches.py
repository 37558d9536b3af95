"""Batches of pairs as lists of token arrays, with the keys that tell which texts are the same.

Axes: B rows, N hard negatives of all rows, P positives that a row has, 2 kinds of key: of the text and of its tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from craft.negatives import hash_tokens
from inft.encoders.contrastive.mixing import Draw, Mixture, keyed
from inft.encoders.contrastive.sources import PairRows
from inft.encoders.contrastive.tokenized import TokenizedRow
from params.encoder import EncoderParams

Texts = list[np.ndarray]  # int32 tokens of each


@dataclass(frozen=True, kw_only=True)
class ContrastiveBatch:
    """The rows of one process; keys are int64, equal for equal texts (or texts with equal tokens), 0 for none."""

    queries: Texts
    positives: Texts
    negatives: Texts
    query_keys_B2: Tensor
    positive_keys_B2: Tensor
    negative_keys_N2: Tensor
    known_keys_BP2: Tensor  # texts that answer the query, drawn or not, and the query itself
    source: str
    simcse: bool = False  # positives are the queries

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def weight(self) -> int:
        """Rows, over which a loss is summed."""
        return len(self.queries)

    @property
    def tokens(self) -> int:
        """Tokens of all texts, padding not counted."""
        return sum(len(text) for text in (*self.queries, *self.positives, *self.negatives))

    def to(self, device: torch.device) -> "ContrastiveBatch":
        """Return itself: texts go to the device chunk by chunk, as they are encoded."""
        return self


@dataclass(frozen=True, kw_only=True)
class BatchDraws:
    """What of a row goes into a batch."""

    seed: int
    max_negatives: int


class ContrastiveBatches:
    """The batches of a run by their number; iterating goes on from `start`, and `at` of it is all there is to resume.

    Errors: ValueError for a source with fewer rows than ranks.
    """

    def __init__(
        self,
        sources: Sequence[PairRows],
        params: EncoderParams,
        *,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        self.sources = list(sources)
        self.at = start
        self.draws = BatchDraws(seed=params.seed, max_negatives=hard_negatives(params))
        self.mixture = Mixture(
            [source.rows for source in sources],
            alpha=params.dataset.mixing_alpha,
            seed=params.seed,
            batch_size=params.trainer.per_device_train_batch_size,
            rank=rank,
            world_size=world_size,
            simcse_share=params.contrastive.simcse_share,
        )

    @property
    def epoch(self) -> float:
        """Passes over all rows so far."""
        return self.mixture.epochs(self.at)

    @property
    def notices(self) -> list[str]:
        """What is smaller than was asked for."""
        wanted = self.mixture.batch_rows
        return [
            f"source {source.name} has {source.rows} rows: its batches have {source.rows} rows, not {wanted}."
            for source in self.sources
            if source.rows < wanted
        ]

    def batch(self, number: int) -> ContrastiveBatch:
        """Return a batch: the same one whenever it is asked for."""
        place = self.mixture.place(number)
        source = self.sources[place.source]
        rows = [source.pairs.row(source.first + int(row)) for row in place.rows]
        if place.simcse:
            return simcse_batch(rows, source.name)
        numbers = [(place.source, place.epoch, int(row)) for row in place.rows]
        return pair_batch(rows, numbers, source.name, self.draws)

    def __iter__(self) -> Iterator[ContrastiveBatch]:
        while True:
            batch = self.batch(self.at)
            self.at += 1
            yield batch


def hard_negatives(params: EncoderParams) -> int:
    """How many hard negatives of a row are encoded: none where they would weigh nothing."""
    return params.contrastive.max_hard_negatives if params.contrastive.hard_negative_weight else 0


def evaluation_batches(sources: Sequence[PairRows], params: EncoderParams) -> Iterator[ContrastiveBatch]:
    """Yield the held-out rows in their order, each in one batch, with the same positives and negatives every time.

    The batches of a source differ by one row at most: a last one of few rows would be easier than the others.
    """
    draws = BatchDraws(seed=params.seed, max_negatives=hard_negatives(params))
    size = params.trainer.per_device_eval_batch_size
    for place, source in enumerate(sources):
        batches = math.ceil(source.rows / size)
        bounds = [math.ceil(source.rows * number / batches) for number in range(batches + 1)]
        for numbers in map(range, bounds, bounds[1:]):
            rows = [source.pairs.row(source.first + number) for number in numbers]
            yield pair_batch(rows, [(place, 0, number) for number in numbers], source.name, draws)


def pair_batch(
    rows: Sequence[TokenizedRow], numbers: Sequence[tuple[int, int, int]], source: str, draws: BatchDraws
) -> ContrastiveBatch:
    """Return the batch of some rows: a positive of each and its hard negatives, drawn by (source, epoch, row)."""
    positives, chosen, negatives, negative_keys = [], [], [], []
    for row, number in zip(rows, numbers, strict=True):
        generator = keyed(draws.seed, Draw.TEXTS, *number)
        chosen.append(int(generator.integers(len(row.positives))))
        positives.append(row.positives[chosen[-1]])
        for place in _drawn(len(row.negatives), draws.max_negatives, generator):
            negatives.append(row.negatives[place])
            negative_keys.append(row.negative_keys[place])
    known_keys_BP2 = _known(rows)
    return ContrastiveBatch(
        queries=[row.query for row in rows],
        positives=positives,
        negatives=negatives,
        query_keys_B2=known_keys_BP2[:, 0],
        positive_keys_B2=known_keys_BP2[torch.arange(len(rows)), torch.tensor(chosen) + 1],
        negative_keys_N2=_keys(negative_keys, negatives),
        known_keys_BP2=known_keys_BP2,
        source=source,
    )


def simcse_batch(rows: Sequence[TokenizedRow], source: str) -> ContrastiveBatch:
    """Return the batch in which each query is its own positive (Gao, Yao and Chen 2021, SimCSE, section 3)."""
    queries = [row.query for row in rows]
    keys_B2 = _keys([row.query_key for row in rows], queries)
    return ContrastiveBatch(
        queries=queries,
        positives=queries,
        negatives=[],
        query_keys_B2=keys_B2,
        positive_keys_B2=keys_B2,
        negative_keys_N2=keys_B2[:0],
        known_keys_BP2=keys_B2.unsqueeze(1),
        source=source,
        simcse=True,
    )


def _drawn(count: int, most: int, generator: np.random.Generator) -> Sequence[int]:
    if count <= most:
        return range(count)
    return sorted(generator.choice(count, size=most, replace=False).tolist())


def _keys(text_keys: Sequence[int], texts: Texts) -> Tensor:
    """int64 [rows, 2]: texts cut to the same tokens count as equal, too: the model cannot tell them apart."""
    if not texts:
        return torch.empty(0, 2, dtype=torch.int64)
    lengths_B = torch.tensor([len(text) for text in texts])
    flat_T = torch.from_numpy(np.concatenate(texts).astype(np.int64))
    padded_BT = torch.nn.utils.rnn.pad_sequence(flat_T.split(lengths_B.tolist()), batch_first=True)
    mask_BT = torch.arange(padded_BT.shape[1]) < lengths_B.unsqueeze(1)
    return torch.stack([torch.tensor(text_keys, dtype=torch.int64), hash_tokens(padded_BT, mask_BT)], dim=1)


def _known(rows: Sequence[TokenizedRow]) -> Tensor:
    """int64 [rows, P, 2]: the query's keys, then those of its positives in their order."""
    text_keys = [key for row in rows for key in (row.query_key, *row.positive_keys)]
    keys_K2 = _keys(text_keys, [text for row in rows for text in (row.query, *row.positives)])
    return torch.nn.utils.rnn.pad_sequence(keys_K2.split([1 + len(row.positives) for row in rows]), batch_first=True)
