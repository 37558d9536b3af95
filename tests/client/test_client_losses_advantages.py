"""Advantages are each reward against its group."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inft.client.losses.advantages import advantages_of
from params.errors import UserError


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5).flatmap(lambda size: st.tuples(
    st.just(size),
    st.lists(st.lists(st.integers(-8, 8), min_size=size, max_size=size), min_size=1, max_size=4),
)), st.booleans())  # fmt: skip
def test_advantages_equal_a_loop(groups: tuple[int, list[list[int]]], normalise: bool) -> None:
    size, rewards = groups
    expected = []
    for group in rewards:
        mean, spread = statistics.fmean(group), statistics.pstdev(group)
        scale = (spread or 1.0) if normalise else 1.0
        expected += [(reward - mean) / scale for reward in group]
    flat = torch.tensor([reward for group in rewards for reward in group], dtype=torch.float64)
    found = advantages_of(flat, size, normalise)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_equal_rewards_have_an_advantage_of_exactly_zero() -> None:
    assert advantages_of([0.1] * 3 + [0.7] * 3, 3).tolist() == [0.0] * 6


def test_rewards_in_a_list_give_float32() -> None:
    assert advantages_of([1, 0], 2).tolist() == [1.0, -1.0]
    assert advantages_of([1, 0], 2).dtype == torch.float32


@pytest.mark.parametrize(
    ("rewards", "size", "message"),
    [
        ([1.0, 2.0, 3.0], 2, "whole groups of 2"),
        ([], 2, "whole groups"),
        ([1.0, 2.0], 1, "group_size is 1"),
        ([1.0, float("nan")], 2, "rollout 1 is nan"),
        (["a", "b"], 2, "a flat list of numbers"),
        ([[1.0], [1.0, 2.0]], 2, "a flat list of numbers"),
        ([1.0, 10**400], 2, "a flat list of numbers"),
    ],
)
def test_wrong_rewards_are_named(rewards: list[float], size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        advantages_of(rewards, size)
