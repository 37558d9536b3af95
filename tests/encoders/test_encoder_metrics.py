"""Metrics against values worked out by hand, and against the libraries where they are installed."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inft.encoders.evaluation.metrics import METRICS, accuracy, f1, macro_f1, matthews, pearson, ranks, spearman

PREDICTED = [1, 1, 1, 0, 0, 0, 1, 0]
LABELS = [1, 1, 0, 0, 0, 1, 1, 1]  # 3 true positives, 1 false one, 2 true negatives, 2 false ones

classes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)
values = st.lists(st.tuples(*[st.integers(-50, 50).map(float)] * 2), min_size=2, max_size=40)


def test_golden_values_of_a_confusion_matrix():
    assert accuracy(PREDICTED, LABELS) == 5 / 8
    assert f1(PREDICTED, LABELS) == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert f1(PREDICTED, LABELS, positive=0) == pytest.approx(2 * 2 / (2 * 2 + 2 + 1))
    assert macro_f1(PREDICTED, LABELS) == pytest.approx((2 / 3 + 4 / 7) / 2)
    assert matthews(PREDICTED, LABELS) == pytest.approx((3 * 2 - 1 * 2) / math.sqrt(4 * 5 * 3 * 4))


def test_golden_values_of_correlations():
    assert pearson([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    assert spearman([1, 2, 3, 4], [10, 5, 1000, 40]) == pytest.approx(0.6)
    assert spearman([1, 2, 2, 3], [1, 3, 3, 9]) == 1
    assert ranks([30, 10, 20, 20]).tolist() == [4, 1, 2.5, 2.5]


@pytest.mark.parametrize("metric", [matthews, pearson, spearman])
def test_a_constant_prediction_correlates_with_nothing(metric):
    assert metric([1, 1, 1], [0, 1, 2]) == 0
    assert metric([0, 1, 2], [1, 1, 1]) == 0


def test_f1_of_a_class_that_is_nowhere_is_0():
    assert f1([0, 0], [0, 0]) == 0


@pytest.mark.parametrize("metric", METRICS.values())
def test_rows_without_a_partner_and_no_rows_are_refused(metric):
    with pytest.raises(ValueError, match="one of each row"):
        metric([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="one row at least"):
        metric([], [])


@settings(deadline=None)  # the library is imported within
@given(classes)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_classification_metrics_equal_scikit_learns(pairs):
    library = pytest.importorskip("sklearn.metrics")
    predicted, labels = (np.array(column) for column in zip(*pairs, strict=True))
    assert accuracy(predicted, labels) == pytest.approx(library.accuracy_score(labels, predicted))
    assert macro_f1(predicted, labels) == pytest.approx(library.f1_score(labels, predicted, average="macro"))
    assert matthews(predicted, labels) == pytest.approx(library.matthews_corrcoef(labels, predicted))
    one, other = predicted == 1, labels == 1
    assert f1(predicted, labels) == pytest.approx(library.f1_score(other, one, zero_division=0))


@settings(deadline=None)
@given(values)
def test_correlations_equal_scipys(pairs):
    library = pytest.importorskip("scipy.stats")
    predicted, labels = (np.array(column) for column in zip(*pairs, strict=True))
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return  # not defined there
    assert pearson(predicted, labels) == pytest.approx(library.pearsonr(predicted, labels).statistic, abs=1e-9)
    assert spearman(predicted, labels) == pytest.approx(library.spearmanr(predicted, labels).statistic, abs=1e-9)
