"""The metrics of GLUE and STS as pure functions of numpy arrays: accuracy, F1, Matthews, Pearson, Spearman.

Where a metric is not defined, such as the correlation with a constant, it is 0: nothing was predicted.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray


def accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Share of rows whose predicted class is the label."""
    one, other = _pair(predicted, labels)
    return float(np.mean(one == other))


def f1(predicted: ArrayLike, labels: ArrayLike, *, positive: int = 1) -> float:
    """Harmonic mean of precision and recall of one class; 0 when it is neither predicted nor there."""
    one, other = _pair(predicted, labels)
    hits = int(np.sum((one == positive) & (other == positive)))
    marked = int(np.sum(one == positive) + np.sum(other == positive))
    return 2 * hits / marked if marked else 0.0


def macro_f1(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Mean of the F1 of every class that is predicted or there."""
    one, other = _pair(predicted, labels)
    classes = np.union1d(one, other)
    return float(np.mean([f1(one, other, positive=int(label)) for label in classes]))


def matthews(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Matthews correlation, for any number of classes (Gorodkin 2004, R_K), from -1 to 1."""
    one, other = _pair(predicted, labels)
    classes = np.union1d(one, other)
    one_NK, other_NK = one[:, None] == classes, other[:, None] == classes
    rows = len(one)
    both = float(np.sum(one_NK & other_NK))
    predicted_K, labels_K = one_NK.sum(0).astype(float), other_NK.sum(0).astype(float)
    covariance = both * rows - predicted_K @ labels_K
    spread = np.sqrt((rows**2 - predicted_K @ predicted_K) * (rows**2 - labels_K @ labels_K))
    return float(covariance / spread) if spread else 0.0


def pearson(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Linear correlation, from -1 to 1."""
    one, other = (values.astype(np.float64) for values in _pair(predicted, labels))
    one, other = one - one.mean(), other - other.mean()
    spread = float(np.sqrt((one @ one) * (other @ other)))
    return float(np.clip(one @ other / spread, -1, 1)) if spread else 0.0


def spearman(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Pearson correlation of the ranks; equal values share the mean of their ranks."""
    one, other = _pair(predicted, labels)
    return pearson(ranks(one), ranks(other))


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 1; equal values get the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse].astype(np.float64)


METRICS: Mapping[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def _pair(predicted: ArrayLike, labels: ArrayLike) -> tuple[NDArray, NDArray]:
    one, other = np.asarray(predicted), np.asarray(labels)
    if one.shape != other.shape or one.ndim != 1 or not len(one):
        raise ValueError(f"{one.shape} predictions for {other.shape} labels: one of each row, and one row at least.")
    return one, other
