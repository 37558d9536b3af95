"""Scores of captions per language and overall, with intervals, and differences between two systems."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inft.evaluation.metrics import Score
from inft.evaluation.metrics.bootstrap import figures, interval, resampled_sums
from inft.evaluation.metrics.libraries import load_library
from inft.evaluation.metrics.rows import (
    BLEU,
    CHRF,
    CIDER,
    EXACT,
    WRONG_SCRIPT,
    ScoredRows,
    check_languages,
    cider,
    sacrebleu_metrics,
    score_rows,
)
from inft.evaluation.metrics.segment import segmenter

CJK_TOKENS = ("ja", "zh", "yue")
# CIDEr's row scores are rounded to multiples of this: sums of up to 200,000 rows are then exact, so that intervals do
# not depend on the order in which a machine adds. The scores themselves are not rounded.
CIDER_GRID = 2.0**-32


def score_captions(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    languages: Sequence[str],
    *,
    cjk_tokens: Sequence[str] = CJK_TOKENS,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Score]]:
    """Return every metric of METRICS for each language, in order of first appearance, and for ALL rows.

    Values are those of the libraries on all rows of the language: sacrebleu's corpus BLEU and chrF with its defaults,
    100 times pycocoevalcap's CIDEr with the document frequencies of these rows, words as `segmenter` cuts them.
    Intervals are percentile bootstrap intervals over rows, with CIDEr's document frequencies held fixed; with
    ``resamples`` 0 there are none. An empty caption is scored; a blank reference is none.
    Errors: ValueError for arguments of unequal lengths, no rows, and a row without a reference; UserError for a
    language that is not segmented as it must be, and for a library that is not installed.
    """
    rows = score_rows(captions, references, languages, cjk_tokens)
    found = {}
    for language, indices in rows.groups():
        group = _group(rows, indices)
        found[language] = _with_intervals(group.values, _resampled(group.statistics, resamples, seed))
    return found


def score_differences(
    before: Sequence[str],
    after: Sequence[str],
    references: Sequence[Sequence[str]],
    languages: Sequence[str],
    *,
    cjk_tokens: Sequence[str] = CJK_TOKENS,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Score]]:
    """Return after minus before of every metric, as score_captions does, with paired bootstrap intervals.

    Both systems are scored on the same drawn rows, so what is hard about a row for both does not widen the interval.
    """
    old, new = (score_rows(captions, references, languages, cjk_tokens) for captions in (before, after))
    found = {}
    for language, indices in old.groups():
        group, other = _group(old, indices), _group(new, indices)
        values = {name: other.values[name] - value for name, value in group.values.items()}
        drawn = _resampled(group.statistics, resamples, seed)
        drawn_after = _resampled(other.statistics, resamples, seed)
        found[language] = _with_intervals(values, {name: drawn_after[name] - drawn[name] for name in drawn})
    return found


def caption_figures(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    languages: Sequence[str],
    *,
    cjk_tokens: Sequence[str] = CJK_TOKENS,
) -> dict[str, float]:
    """Return every metric over all rows, as score_captions does for ALL, without intervals."""
    rows = score_rows(captions, references, languages, cjk_tokens)
    return _group(rows, np.arange(len(rows.captions))).values


def check_scoring(
    references: Sequence[Sequence[str]], languages: Sequence[str], *, cjk_tokens: Sequence[str] = CJK_TOKENS
) -> None:
    """UserError, before a caption is generated, for what score_captions would refuse: languages and libraries."""
    check_languages(references, languages, cjk_tokens)
    for module in ("sacrebleu.metrics", "pycocoevalcap.cider.cider"):
        load_library(module)
    for language in dict.fromkeys(languages):
        segmenter(language, cjk_tokens)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Rows that are scored together."""

    values: dict[str, float]
    statistics: np.ndarray  # (rows, 31)


def _group(rows: ScoredRows, indices: np.ndarray) -> _Group:
    """The rows with these indices: their values by the libraries, and their statistics with CIDEr filled in."""
    mean, of_rows = cider([rows.captions[index] for index in indices], [rows.references[index] for index in indices])
    statistics = rows.statistics[indices]
    sums = statistics.sum(axis=0)
    bleu, chrf = sacrebleu_metrics()
    bleu_score = bleu._compute_score_from_stats(sums[BLEU].astype(int).tolist())
    values = {
        "bleu4": bleu_score.score,
        "chrf": chrf._compute_score_from_stats(sums[CHRF].astype(int).tolist()).score,
        "cider": 100 * mean,
        "exact": 100 * sums[EXACT] / len(indices),
        "length_ratio": bleu_score.ratio,
        "wrong_script": 100 * sums[WRONG_SCRIPT] / len(indices),
    }
    statistics[:, CIDER] = np.round(of_rows / CIDER_GRID) * CIDER_GRID
    return _Group(values={name: float(value) for name, value in values.items()}, statistics=statistics)


def _resampled(statistics: np.ndarray, resamples: int, seed: int) -> dict[str, np.ndarray]:
    return figures(resampled_sums(statistics, resamples=resamples, seed=seed), rows=len(statistics))


def _with_intervals(values: dict[str, float], drawn: dict[str, np.ndarray]) -> dict[str, Score]:
    """Values with the intervals of what was drawn; the values alone when nothing was."""
    found = {}
    for name, value in values.items():
        low, high = interval(drawn[name]) if len(drawn[name]) else (value, value)
        found[name] = Score(value, low, high)
    return found
