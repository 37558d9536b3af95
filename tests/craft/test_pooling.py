"""Pooling: what it takes, from which positions, whatever the padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from craft.pooling import pool_hidden_states

STRATEGIES = ("last_token", "mean", "cls", "weighted_mean")
anything = settings(deadline=None, max_examples=50, derandomize=True)


def by_loops(hidden: Tensor, mask: Tensor, strategy: str) -> Tensor:
    rows = []
    for states, real in zip(hidden, mask, strict=True):
        kept = [state for state, keep in zip(states, real.tolist(), strict=True) if keep]
        weights = {
            "last_token": [0.0] * (len(kept) - 1) + [1.0],
            "cls": [1.0] + [0.0] * (len(kept) - 1),
            "mean": [1.0] * len(kept),
            "weighted_mean": [float(n + 1) for n in range(len(kept))],
        }[strategy]
        rows.append(sum(w * state for w, state in zip(weights, kept, strict=True)) / sum(weights))
    return torch.stack(rows)


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Any masks of 1..4 rows by 1..9 positions, holes included, with at least one position in each row."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    row = st.lists(st.booleans(), min_size=length, max_size=length).filter(any)
    return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)))


@anything
@given(
    mask=masks(), strategy=st.sampled_from(STRATEGIES), dtype=st.sampled_from([torch.bool, torch.int64, torch.float32])
)
def test_pooling_equals_the_loop_in_value_and_gradient_for_any_mask(
    mask: Tensor, strategy: str, dtype: torch.dtype
) -> None:
    hidden = torch.randn(*mask.shape, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fast, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    pooled, expected = pool_hidden_states(fast, mask.to(dtype), strategy), by_loops(plain, mask, strategy)
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)
    pooled.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    torch.testing.assert_close(fast.grad, plain.grad, rtol=1e-12, atol=1e-12)


@anything
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), strategy=st.sampled_from(STRATEGIES))
def test_left_and_right_padding_pool_the_same(lengths: list[int], strategy: str) -> None:
    # failure 11: the position before the mask's sum is a padding token under left padding
    texts = [torch.randn(n, 2, generator=torch.Generator().manual_seed(n)) for n in lengths]
    pooled = []
    for side in ("left", "right"):
        hidden, mask = torch.full((len(texts), 8, 2), torch.nan), torch.zeros(len(texts), 8)
        for row, text in enumerate(texts):
            where = slice(8 - len(text), 8) if side == "left" else slice(0, len(text))
            hidden[row, where], mask[row, where] = text, 1
        pooled.append(pool_hidden_states(hidden, mask, strategy))
    torch.testing.assert_close(*pooled)  # and the NaN of the padding is nowhere


def test_last_token_of_an_assistant_mask_is_the_last_assistant_token() -> None:
    # failure 11
    hidden = torch.arange(6.0).reshape(1, 6, 1)
    assert pool_hidden_states(hidden, torch.tensor([[0, 0, 1, 1, 1, 0]]), "last_token").item() == 4
    assert pool_hidden_states(hidden, torch.tensor([[0, 1, 0, 0, 1, 0]]), "last_token").item() == 4
    assert pool_hidden_states(hidden, torch.tensor([[0, 1, 0, 0, 1, 0]]), "cls").item() == 1


@pytest.mark.parametrize("before", range(3))
def test_weighted_mean_of_1_to_4_is_3_whatever_the_padding(before: int) -> None:
    hidden = torch.tensor([0.0] * before + [1, 2, 3, 4] + [0] * (2 - before)).reshape(1, 6, 1)
    mask = (hidden[..., 0] > 0).long()
    assert pool_hidden_states(hidden, mask, "weighted_mean").item() == 3


def test_own_weights_are_per_position_or_per_row_and_position() -> None:
    hidden, mask = torch.tensor([[[1.0], [2], [4]]]), torch.tensor([[1, 0, 1]])
    assert pool_hidden_states(hidden, mask, "weighted_mean", torch.tensor([3.0, 9, 1])).item() == 7 / 4
    assert pool_hidden_states(hidden, mask, "weighted_mean", torch.tensor([[1.0, 9, 3]])).item() == 13 / 4


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_kept_and_sums_are_made_in_float32(dtype: torch.dtype, strategy: str) -> None:
    # failure 15
    hidden = (torch.randn(2, 600, 4, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    mask = torch.ones(2, 600)
    pooled = pool_hidden_states(hidden, mask, strategy)
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled, pool_hidden_states(hidden.double(), mask, strategy).to(dtype))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast_around_pooling_changes_nothing(strategy: str) -> None:
    hidden, mask = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 5)
    plain = pool_hidden_states(hidden, mask, strategy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pool_hidden_states(hidden, mask, strategy), plain)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_empty_mask_is_an_error_that_names_the_row(strategy: str) -> None:
    # failure 20
    mask = torch.tensor([[1, 1], [0, 1], [0, 0]])
    with pytest.raises(ValueError, match=r"row 2 .*Drop the row"):
        pool_hidden_states(torch.zeros(3, 2, 4), mask, strategy)


def test_what_does_not_fit_is_told() -> None:
    # failure 20
    hidden, mask = torch.zeros(2, 3, 4), torch.ones(2, 3)
    with pytest.raises(ValueError, match="choose one of last_token, mean, cls, weighted_mean"):
        pool_hidden_states(hidden, mask, "max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not fit"):
        pool_hidden_states(hidden, mask[:, :2], "mean")
    with pytest.raises(ValueError, match="are for pooling 'weighted_mean'"):
        pool_hidden_states(hidden, mask, "mean", torch.ones(3))
    with pytest.raises(ValueError, match=r"weights \[2\] do not fit"):
        pool_hidden_states(hidden, mask, "weighted_mean", torch.ones(2))
    with pytest.raises(ValueError, match=r"row 0 .*do not add up"):
        pool_hidden_states(hidden, mask, "weighted_mean", torch.zeros(3))
