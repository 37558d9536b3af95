"""inft.evaluation.metrics.bootstrap: sums over drawn rows, figures from them, and how often intervals are right."""

import math

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider
from sacrebleu.metrics import BLEU as SacreBleu
from sacrebleu.metrics import CHRF as SacreChrf

from inft.evaluation.metrics import ALL, METRICS, bootstrap
from inft.evaluation.metrics.bootstrap import corpus_bleu, corpus_chrf, figures, interval, resampled_sums
from inft.evaluation.metrics.rows import BLEU, CHRF, WRONG_SCRIPT, score_rows
from inft.evaluation.metrics.scores import score_captions

FAST = settings(deadline=None, max_examples=150, derandomize=True)
DEFAULT = ("ja", "zh", "yue")
COUNTS = st.integers(0, 30)


@st.composite
def bleu_sums(draw):
    totals = draw(st.lists(COUNTS, min_size=4, max_size=4))
    return [draw(COUNTS), draw(st.integers(1, 30)), *[draw(st.integers(0, total)) for total in totals], *totals]


@st.composite
def chrf_sums(draw):
    orders = [(draw(COUNTS), draw(COUNTS)) for _ in range(6)]
    return [count for above, below in orders for count in (above, below, draw(st.integers(0, min(above, below))))]


@pytest.mark.filterwarnings("error")
@FAST
@given(bleu_sums())
def test_bleu_from_sums_is_sacrebleus(sums):
    expected = SacreBleu()._compute_score_from_stats(list(sums)).score
    assert corpus_bleu(np.asarray([sums], dtype=float))[0] == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.filterwarnings("error")
@FAST
@given(chrf_sums())
def test_chrf_from_sums_is_sacrebleus(sums):
    expected = SacreChrf()._compute_score_from_stats(sums).score
    assert corpus_chrf(np.asarray([sums], dtype=float))[0] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_figures_of_drawn_rows_are_those_of_the_texts_drawn(rows):
    few = rows.of("fr")
    scored = score_rows(*few.args(), DEFAULT)
    sums = resampled_sums(scored.statistics, resamples=25, seed=3)
    found = figures(sums, rows=len(few.captions))
    rng = np.random.default_rng(3)
    for index in range(25):
        drawn = few.picked(rng.integers(len(few.captions), size=len(few.captions)).tolist())
        most = max(map(len, drawn.references))
        streams = [[of[n] if n < len(of) else None for of in drawn.references] for n in range(most)]
        bleu = sacrebleu.corpus_bleu(drawn.captions, streams)
        assert found["bleu4"][index] == pytest.approx(bleu.score, rel=1e-9)
        assert found["length_ratio"][index] == pytest.approx(bleu.sys_len / bleu.ref_len, rel=1e-12)
        assert found["chrf"][index] == pytest.approx(sacrebleu.corpus_chrf(drawn.captions, streams).score, rel=1e-9)


def test_the_interval_of_cider_is_that_of_its_mean_over_drawn_rows(rows):
    few = rows.of("fr")
    pairs = dict(enumerate(few.references)), {index: [text] for index, text in enumerate(few.captions)}
    _, of_rows = Cider().compute_score(*pairs)
    rng = np.random.default_rng(4)
    means = [100 * of_rows[rng.integers(len(of_rows), size=len(of_rows))].mean() for _ in range(100)]
    found = score_captions(*few.args(), resamples=100, seed=4)["fr"]["cider"]
    assert (found.low, found.high) == pytest.approx(interval(np.asarray(means)), abs=1e-7)


def test_the_sums_of_all_rows_give_exactly_the_corpus_scores(rows):
    few = rows.of("en")
    sums = score_rows(*few.args(), DEFAULT).statistics.sum(axis=0).astype(int)
    streams = [[of[n] if n < len(of) else None for of in few.references] for n in range(2)]
    assert SacreBleu()._compute_score_from_stats(sums[BLEU].tolist()).score == (
        sacrebleu.corpus_bleu(few.captions, streams).score
    )
    assert SacreChrf()._compute_score_from_stats(sums[CHRF].tolist()).score == (
        sacrebleu.corpus_chrf(few.captions, streams).score
    )


def test_drawn_sums_do_not_depend_on_the_block(monkeypatch):
    rows_NK = np.random.default_rng(0).integers(0, 9, (50, 3)).astype(float)
    whole = resampled_sums(rows_NK, resamples=33, seed=1)
    monkeypatch.setattr(bootstrap, "BLOCK", 500)
    assert (resampled_sums(rows_NK, resamples=33, seed=1) == whole).all()
    assert (resampled_sums(rows_NK, resamples=33, seed=2) != whole).any()


def test_each_resample_draws_as_many_rows_as_there_are():
    assert (resampled_sums(np.ones((70, 1)), resamples=40, seed=0) == 70).all()
    drawn = resampled_sums(np.eye(70), resamples=2000, seed=0)
    assert drawn.mean(axis=0) == pytest.approx(np.ones(70), abs=0.15)  # each row is as likely as the others
    assert drawn.var(axis=0) == pytest.approx(np.full(70, 69 / 70), abs=0.2)


def test_the_interval_of_a_share_is_close_to_the_normal_approximation():
    hits = np.zeros((1000, 1))
    hits[:300] = 1
    low, high = interval(resampled_sums(hits, resamples=4000, seed=0)[:, 0] / 1000)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.1 * half)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth():
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(400):
        hits = (rng.random((150, 1)) < 0.35).astype(float)
        low, high = interval(resampled_sums(hits, resamples=300, seed=trial)[:, 0] / 150)
        held += low <= 0.35 <= high
    assert 0.91 <= held / 400 <= 0.98


def test_intervals_stand_around_their_values(rows):
    found = score_captions(*rows.args())
    assert all(score.low <= score.value <= score.high for of in found.values() for score in of.values())
    assert all(score.low < score.high for score in found[ALL].values())


def test_more_rows_narrow_the_interval(rows):
    many = rows.picked([*range(len(rows.captions))] * 4)
    wide, narrow = (score_captions(*of.args())[ALL] for of in (rows, many))
    for name in ("bleu4", "chrf", "exact", "wrong_script"):
        widths = [score.high - score.low for score in (wide[name], narrow[name])]
        assert widths[1] == pytest.approx(widths[0] / 2, rel=0.2), name


def test_one_row_and_equal_rows_have_no_width():
    for count in (1, 7):
        found = score_captions(["a small red star"] * count, [["a large red star"]] * count, ["en"] * count)
        for name, score in found[ALL].items():
            assert (score.low, score.high) == pytest.approx((score.value, score.value), rel=1e-9, abs=1e-9), name
    assert set(found[ALL]) == set(METRICS)


def test_the_same_seed_gives_the_same_intervals(rows):
    few = rows.of("zh")
    one, two, other = (score_captions(*few.args(), resamples=60, seed=seed) for seed in (5, 5, 6))
    assert one == two
    assert one != other


def test_a_row_of_statistics_has_a_column_for_each_sum(rows):
    scored = score_rows(*rows.of("id").args(), DEFAULT)
    assert scored.statistics.shape == (12, WRONG_SCRIPT + 1)
    assert set(figures(scored.statistics, rows=1)) == set(METRICS)
