"""Weights of micro-batches: alpha is the ratio of the accumulated gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craft.accumulator import CRAFTGradientAccumulator, compute_batch_distribution, micro_batch_weights

FAST = settings(deadline=None, max_examples=50, derandomize=True)


def test_the_golden_window():
    """# failure 9: means of means would give 2.0."""
    sft, contrastive = [[2.0, 4.0], [1.0] * 6], [[0.5, 1.5], [3.0]]
    weights = micro_batch_weights([2, 6], 0.6), micro_batch_weights([2, 1], 0.4)
    assert weights[0] == pytest.approx([0.15, 0.45])
    assert weights[1] == pytest.approx([0.26666667, 0.13333333])
    means = [[sum(losses) / len(losses) for losses in kind] for kind in (sft, contrastive)]
    total = sum(w * m for ws, ms in zip(weights, means, strict=True) for w, m in zip(ws, ms, strict=True))
    assert total == pytest.approx(1.5666666666666667, abs=1e-15)


@FAST
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.floats(0, 1))
def test_weights_give_each_token_the_same_say(counts, share):
    weights = micro_batch_weights(counts, share)
    total = sum(counts)
    assert sum(weights) == pytest.approx(share if total else 0.0)
    assert all(
        weight == pytest.approx(share * count / total) for weight, count in zip(weights, counts, strict=True) if total
    )


@FAST
@given(st.floats(0, 1), st.integers(1, 9), st.integers(1, 9))
def test_scaled_losses_add_up_to_alpha_and_the_rest(alpha, n_sft, n_contrastive):
    scaler = CRAFTGradientAccumulator(alpha, n_sft + n_contrastive, n_sft, n_contrastive)
    one = torch.tensor(1.0, dtype=torch.float64)
    assert float(n_sft * scaler.scale_sft_loss(one)) == pytest.approx(alpha)
    assert float(n_contrastive * scaler.scale_contrastive_loss(one)) == pytest.approx(1 - alpha)
    assert scaler.scales.effective_alpha == alpha


def test_scales_follow_new_counts_and_a_missing_kind():
    scaler = CRAFTGradientAccumulator(0.6, 8, 5, 3)
    assert (scaler.scales.sft_scale, scaler.scales.contrastive_scale) == pytest.approx((0.12, 0.4 / 3))
    scaler.update_batch_counts(2, 0)
    assert (scaler.scales.sft_scale, scaler.scales.contrastive_scale) == (0.3, 0.0)
    assert (scaler.scales.effective_alpha, scaler.n_sft) == (1.0, 2)
    scaler.update_batch_counts(0, 2)
    assert (scaler.scales.contrastive_scale, scaler.scales.effective_alpha) == (0.2, 0.0)
    assert "n_contrastive=2" in repr(scaler)


@FAST
@given(st.floats(0.001, 0.999), st.integers(2, 64))
def test_a_window_of_two_or_more_holds_both_kinds(beta, window):
    n_sft, n_contrastive = compute_batch_distribution(beta, window)
    assert n_sft + n_contrastive == window
    assert min(n_sft, n_contrastive) >= 1
    assert abs(n_sft - beta * window) <= 1


@pytest.mark.parametrize(
    ("beta", "window", "found"),
    [
        (0.75, 4, (3, 1)),
        (0.6, 8, (5, 3)),
        (0.6, 1, (1, 0)),  # failure 7
        (0.4, 1, (0, 1)),
        (0.0, 4, (0, 4)),
        (1.0, 4, (4, 0)),
    ],
)
def test_distributions(beta, window, found):
    assert compute_batch_distribution(beta, window) == found


def test_what_is_out_of_range_is_refused():
    """# failure 20."""
    with pytest.raises(ValueError, match=r"craft_beta=1\.5"):
        compute_batch_distribution(1.5, 4)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=0"):
        compute_batch_distribution(0.5, 0)
    with pytest.raises(ValueError, match="craft_alpha=-1"):
        CRAFTGradientAccumulator(-1, 4, 2, 2)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=0"):
        CRAFTGradientAccumulator(0.5, 0, 1, 1)
    for counts in ((-1, 2), (0, 0), (3, 2)):
        with pytest.raises(ValueError, match="n_sft="):
            CRAFTGradientAccumulator(0.5, 4, *counts)
