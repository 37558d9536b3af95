"""PPO's mathematics against plain loops in float64: values and gradients."""

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craft.ppo.losses import gae, policy_loss, token_kl, token_rewards, value_loss, whiten

CLOSE = {"rel": 1e-9, "abs": 1e-9}


class Case:
    """Random figures [B, T] in float64, rows of random lengths; garbage on what is no token."""

    def __init__(self, rows: int, width: int, seed: int) -> None:
        draw = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.lengths = [draw.randrange(1, width + 1) for _ in range(rows)]
        self.mask = torch.tensor([[t < length for t in range(width)] for length in self.lengths])
        self.generator, self.shape = generator, (rows, width)

    def figures(self, *, scale: float = 1.0, grad: bool = False) -> torch.Tensor:
        values = torch.randn(self.shape, generator=self.generator, dtype=torch.float64) * scale
        values = torch.where(self.mask, values, 1e6 * torch.sign(values))
        return values.requires_grad_(grad)

    def tokens(self) -> list[tuple[int, int]]:
        return [(b, t) for b, length in enumerate(self.lengths) for t in range(length)]


cases = st.builds(Case, rows=st.integers(1, 4), width=st.integers(1, 7), seed=st.integers(0, 10_000))
shares = st.sampled_from([0.0, 0.5, 0.95, 1.0])


def assert_equal(found: torch.Tensor, expected: dict[tuple[int, int], float], case: Case) -> None:
    for b in range(case.shape[0]):
        for t in range(case.shape[1]):
            assert float(found[b, t]) == pytest.approx(expected.get((b, t), 0.0), **CLOSE)


def derivative(function: Any, x: float, step: float = 1e-6) -> float:
    return (function(x + step) - function(x - step)) / (2 * step)


@given(case=cases, gamma=shares, lam=shares)
@settings(deadline=None, max_examples=60)
def test_gae_equals_its_float64_reference(case, gamma, lam):
    rewards, values = case.figures(), case.figures()
    advantages, returns = gae(rewards, values, case.mask, gamma, lam)
    expected = {}
    for b, length in enumerate(case.lengths):
        r, v = rewards[b].tolist(), [*values[b, :length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):  # the sum itself, not its recursion
            expected[b, t] = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
    assert_equal(advantages, expected, case)
    assert_equal(returns, {(b, t): a + float(values.detach()[b, t]) for (b, t), a in expected.items()}, case)


def test_with_lambda_and_gamma_1_the_return_is_the_sum_of_what_follows():
    mask = torch.tensor([[True, True, True, False]])
    rewards = torch.tensor([[1.0, 2.0, 4.0, 100.0]])
    _, returns = gae(rewards, torch.tensor([[0.3, -0.2, 5.0, 7.0]]), mask, 1.0, 1.0)
    assert returns.tolist() == [pytest.approx([7.0, 6.0, 4.0, 0.0])]


@given(case=cases, shift=st.booleans())
@settings(deadline=None, max_examples=40)
def test_whitening_equals_its_float64_reference(case, shift):
    x = case.figures(scale=3.0)
    tokens = [float(x[b, t]) for b, t in case.tokens()]
    mean = math.fsum(tokens) / len(tokens)
    variance = math.fsum((value - mean) ** 2 for value in tokens) / max(len(tokens) - 1, 1)
    expected = {
        (b, t): (float(x[b, t]) - mean) / math.sqrt(variance + 1e-8) + (0 if shift else mean) for b, t in case.tokens()
    }
    assert_equal(whiten(x, case.mask, shift_mean=shift), expected, case)


def test_whitening_one_token_or_equal_ones_gives_no_nan():
    one = whiten(torch.tensor([[5.0, 9.0]]), torch.tensor([[True, False]]))
    same = whiten(torch.full((2, 2), 3.0), torch.ones(2, 2, dtype=torch.bool))
    assert one.tolist() == [[0.0, 0.0]]
    assert same.tolist() == [[0.0, 0.0]] * 2


@given(case=cases, cliprange=st.sampled_from([0.05, 0.2, 1.0]))
@settings(deadline=None, max_examples=60)
def test_the_policy_loss_and_its_gradient_equal_their_float64_reference(case, cliprange):
    new, old, advantages = case.figures(scale=0.3, grad=True), case.figures(scale=0.3), case.figures()

    def loss_of(logprob: float, b: int, t: int) -> float:
        ratio, a = math.exp(logprob - float(old[b, t])), float(advantages[b, t])
        return -min(ratio * a, max(min(ratio, 1 + cliprange), 1 - cliprange) * a)

    losses, clipped = policy_loss(new, old, advantages, case.mask, cliprange)
    losses.sum().backward()
    assert_equal(losses.detach(), {(b, t): loss_of(float(new.detach()[b, t]), b, t) for b, t in case.tokens()}, case)
    for b in range(case.shape[0]):
        for t in range(case.shape[1]):
            expected = (
                derivative(lambda x, b=b, t=t: loss_of(x, b, t), float(new.detach()[b, t])) if case.mask[b, t] else 0.0
            )
            assert float(new.grad[b, t]) == pytest.approx(expected, rel=1e-5, abs=1e-7)
            outside = abs(math.exp(min(float(new.detach()[b, t] - old[b, t]), 50)) - 1) > cliprange
            assert bool(clipped[b, t]) == bool(case.mask[b, t] and outside and new.grad[b, t] == 0)


@given(case=cases, cliprange=st.sampled_from([0.05, 0.5, 2.0]))
@settings(deadline=None, max_examples=60)
def test_the_value_loss_and_its_gradient_equal_their_float64_reference(case, cliprange):
    values, old, returns = case.figures(grad=True), case.figures(), case.figures()

    def loss_of(value: float, b: int, t: int) -> float:
        before, target = float(old[b, t]), float(returns[b, t])
        near = max(min(value, before + cliprange), before - cliprange)
        return 0.5 * max((value - target) ** 2, (near - target) ** 2)

    losses, _ = value_loss(values, old, returns, case.mask, cliprange)
    losses.sum().backward()
    assert_equal(losses.detach(), {(b, t): loss_of(float(values.detach()[b, t]), b, t) for b, t in case.tokens()}, case)
    for b, t in case.tokens():
        expected = derivative(lambda x, b=b, t=t: loss_of(x, b, t), float(values.detach()[b, t]))
        assert float(values.grad[b, t]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert not values.grad[~case.mask].any()


@given(case=cases, estimator=st.sampled_from(["k1", "k3"]), kl_coef=st.sampled_from([0.0, 0.05, 1.0]))
@settings(deadline=None, max_examples=40)
def test_rewards_are_kl_penalties_with_the_score_at_the_last_token(case, estimator, kl_coef):
    new, reference = case.figures(scale=0.5), case.figures(scale=0.5)
    scores = torch.arange(1.0, case.shape[0] + 1, dtype=torch.float64)
    kl = token_kl(new, reference, case.mask, estimator)
    expected = {}
    for b, t in case.tokens():
        difference = float(reference[b, t] - new[b, t])
        penalty = -difference if estimator == "k1" else math.exp(difference) - 1 - difference
        assert float(kl[b, t]) == pytest.approx(penalty, **CLOSE)
        expected[b, t] = -kl_coef * penalty + (float(scores[b]) if t == case.lengths[b] - 1 else 0.0)
    assert_equal(token_rewards(scores, kl, case.mask, kl_coef), expected, case)


def test_both_kl_estimators_have_the_divergence_as_their_mean():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    exact = float((p * (p / q).log()).sum())
    for estimator in ("k1", "k3"):
        estimates = token_kl(p.log()[None], q.log()[None], mask, estimator)[0]
        assert float((p * estimates).sum()) == pytest.approx(exact)
