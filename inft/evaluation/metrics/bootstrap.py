"""Intervals by the bootstrap: rows drawn with replacement, figures computed from the sums over the drawn rows."""

import numpy as np

from inft.evaluation.metrics.rows import BLEU, CHRF, CIDER, EXACT, WRONG_SCRIPT

BLOCK = 2**21  # weights held at once: 16 MiB
PERCENTILES = (2.5, 97.5)


def resampled_sums(rows_NK: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Column sums over N rows drawn with replacement, (resamples, K) float64.

    The same seed and number of rows draw the same rows, whatever stands in them: so two systems are compared in pairs.
    """
    rng = np.random.default_rng(seed)
    count = len(rows_NK)
    size = max(1, BLOCK // count)
    sums = np.empty((resamples, rows_NK.shape[1]))
    for start in range(0, resamples, size):
        stop = min(start + size, resamples)
        weights = [np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(start, stop)]
        sums[start:stop] = np.asarray(weights, dtype=np.float64) @ rows_NK
    return sums


def interval(values: np.ndarray) -> tuple[float, float]:
    """The percentile interval that holds 95 % of the values."""
    low, high = np.percentile(values, PERCENTILES)
    return float(low), float(high)


def figures(sums: np.ndarray, *, rows: int) -> dict[str, np.ndarray]:
    """Every metric of each line of sums over ``rows`` rows, (R, 31) -> (R,) each, in the units of METRICS."""
    bleu = sums[:, BLEU]
    return {
        "bleu4": corpus_bleu(bleu),
        "chrf": corpus_chrf(sums[:, CHRF]),
        "cider": 100 * sums[:, CIDER] / rows,
        "exact": 100 * sums[:, EXACT] / rows,
        "length_ratio": _ratio(bleu[:, 0], bleu[:, 1]),
        "wrong_script": 100 * sums[:, WRONG_SCRIPT] / rows,
    }


def corpus_bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU-4 with exponential smoothing from sacrebleu's statistics, (R, 10) -> (R,), 0 to 100.

    Equal to sacrebleu's own score of each line but for rounding; Chen and Cherry (2014), method 3.
    """
    words, reference_words, matches, totals = sums[:, 0], sums[:, 1], sums[:, 2:6], sums[:, 6:10]
    halvings = np.cumsum((matches == 0) & (totals > 0), axis=1)  # each order without a match counts half the last one
    smoothed = np.where(matches > 0, matches, 0.5**halvings)
    precisions = _ratio(smoothed, totals)
    scored = np.logical_and(matches.any(axis=1), totals.all(axis=1))
    logs = np.log(np.where(scored[:, np.newaxis], precisions, 1.0))
    brevity = np.exp(np.minimum(0.0, 1 - _ratio(reference_words, words)))
    return np.where(scored, 100 * brevity * np.exp(logs.mean(axis=1)), 0.0)


def corpus_chrf(sums: np.ndarray) -> np.ndarray:
    """chrF2 from sacrebleu's statistics, (R, 18) -> (R,), 0 to 100: equal to its own score but for rounding."""
    of_caption, of_reference, matches = sums[:, 0::3], sums[:, 1::3], sums[:, 2::3]
    counted = (of_caption > 0) & (of_reference > 0)  # orders longer than every text say nothing
    orders = counted.sum(axis=1)
    precision = _ratio((_ratio(matches, of_caption) * counted).sum(axis=1), orders)
    recall = _ratio((_ratio(matches, of_reference) * counted).sum(axis=1), orders)
    return 100 * _ratio(5 * precision * recall, 4 * precision + recall)  # beta = 2: recall weighs four times


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Their quotient, 0 where there is nothing to divide by."""
    return np.divide(above, below, out=np.zeros(np.shape(above)), where=below > 0)
