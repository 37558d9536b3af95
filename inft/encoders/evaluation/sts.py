"""Semantic textual similarity on local files: Spearman's correlation of cosines with human scores."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from inft.encoders.evaluation.metrics import spearman
from inft.encoders.evaluation.tables import TableRow, read_table
from params.errors import UserError

FIELDS = ("sentence1", "sentence2", "score")


class ScoredPair(NamedTuple):
    """Two texts and how alike people found them."""

    one: str
    other: str
    score: float


class Embeds(Protocol):
    """What `inft.encoders.embed.Embedder` does."""

    def embed(self, texts: Sequence[str], *, prompt: Any) -> np.ndarray:
        """Return float32 [texts, D]."""


def evaluate_sts(embedder: Embeds, file: Path, *, prompt: str = "query") -> dict[str, float]:
    """Return spearman and pairs of a file with the columns sentence1, sentence2 and score.

    Both texts get the same prompt. Errors: UserError naming a line that lacks a field, and for scores all alike.
    """
    return score_pairs(embedder, read_pairs(file), prompt=prompt)


def read_pairs(file: Path) -> list[ScoredPair]:
    """Read a file's pairs; UserError naming a line that lacks a field, and for scores all alike."""
    pairs = [_scored(row) for row in read_table(file, FIELDS)]
    if len({pair.score for pair in pairs}) < 2:
        raise UserError(f"{file} has no two different scores: there is no order to compare with.")
    return pairs


def score_pairs(embedder: Embeds, pairs: Sequence[ScoredPair], *, prompt: str = "query") -> dict[str, float]:
    """Return spearman and pairs; both texts of a pair get the same prompt."""
    scores_B = np.array([pair.score for pair in pairs])
    ones, others = [pair.one for pair in pairs], [pair.other for pair in pairs]
    one_BD, other_BD = (embedder.embed(texts, prompt=prompt).astype(np.float64) for texts in (ones, others))
    norms_B = np.linalg.norm(one_BD, axis=1) * np.linalg.norm(other_BD, axis=1)
    cosines_B = (one_BD * other_BD).sum(1) / norms_B
    return {"spearman": spearman(cosines_B, scores_B), "pairs": len(pairs)}


def _scored(row: TableRow) -> ScoredPair:
    value = row.values["score"]
    try:
        number = float("" if value is None or isinstance(value, bool) else value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{row.where}: score is {value!r}: give a finite number.")
    return ScoredPair(_sentence(row, "sentence1"), _sentence(row, "sentence2"), number)


def _sentence(row: TableRow, name: str) -> str:
    text = row.values[name]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{row.where}: {name} is missing or empty: give a text or drop the line.")
    return text
