"""Semantic textual similarity on local files: Spearman's correlation of cosines with human scores."""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

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
    """Return spearman and pairs of a .tsv or .jsonl file with sentence1, sentence2 and score.

    Both texts get the same prompt. Errors: UserError naming a line that lacks a field, and for scores all alike.
    """
    pairs = list(read_scored(file))
    scores_B = np.array([pair.score for pair in pairs])
    if len(pairs) < 2 or (scores_B == scores_B[0]).all():
        raise UserError(f"{file} has no two different scores: there is no order to compare with.")
    ones, others = [pair.one for pair in pairs], [pair.other for pair in pairs]
    one_BD, other_BD = (embedder.embed(texts, prompt=prompt).astype(np.float64) for texts in (ones, others))
    norms_B = np.linalg.norm(one_BD, axis=1) * np.linalg.norm(other_BD, axis=1)
    cosines_B = (one_BD * other_BD).sum(1) / norms_B
    return {"spearman": spearman(cosines_B, scores_B), "pairs": len(pairs)}


def spearman(one_B: np.ndarray, other_B: np.ndarray) -> float:
    """Return Spearman's rank correlation: Pearson's of the ranks, equal values sharing the mean of their ranks.

    NaN where all values of a side are equal.
    """
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (one_B, other_B)]
    centred = [rank - rank.mean() for rank in ranks]
    norms = [float(np.sqrt((c * c).sum())) for c in centred]
    if min(norms) == 0:
        return math.nan
    return float((centred[0] * centred[1]).sum() / (norms[0] * norms[1]))


def read_scored(file: Path) -> Iterator[ScoredPair]:
    """Yield the rows of a .tsv file with a header, or of .jsonl."""
    if not file.is_file():
        raise UserError(f"{file}: there is no such file.")
    with file.open(encoding="utf-8-sig", newline="") as lines:
        try:
            rows = _json_rows(lines, file) if file.suffix == ".jsonl" else _tsv_rows(lines, file)
            for where, values in rows:
                yield _scored(values, where)
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 ({error.reason}): save the file as UTF-8.") from error


def _ranks(values_B: np.ndarray) -> np.ndarray:
    _, group_B, counts_G = np.unique(values_B, return_inverse=True, return_counts=True)
    ends_G = counts_G.cumsum()
    return (ends_G - (counts_G - 1) / 2)[group_B]


def _json_rows(lines: Any, file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{file} line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not JSON ({error}).") from error


def _tsv_rows(lines: Any, file: Path) -> Iterator[tuple[str, Any]]:
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    if missing := [name for name in FIELDS if name not in (rows.fieldnames or ())]:
        raise UserError(f"{file} has no column {', '.join(missing)}: its first line names the columns, by tabs.")
    for values in rows:
        yield f"{file} line {rows.line_num}", values


def _scored(values: Any, where: str) -> ScoredPair:
    if not isinstance(values, dict):
        raise UserError(f"{where}: write an object with {', '.join(FIELDS)}.")
    try:
        number = float(values.get("score", ""))
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: score is {values.get('score')!r}: give a finite number.")
    return ScoredPair(_sentence(values, "sentence1", where), _sentence(values, "sentence2", where), number)


def _sentence(values: Any, name: str, where: str) -> str:
    text = values.get(name)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: {name} is missing or empty: give a text or drop the line.")
    return text
