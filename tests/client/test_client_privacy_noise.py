"""Noise on the clipped sum, and Poisson sampling of rows."""

import math
from itertools import islice

import pytest
import torch
from torch import nn

from inft.client.privacy.noise import NoiseSource, add_noise, poisson_batches
from params.errors import UserError


def kolmogorov_smirnov(drawn: torch.Tensor, cdf) -> float:
    ordered = cdf(drawn.sort().values)
    steps = torch.arange(len(drawn) + 1, dtype=torch.float64) / len(drawn)
    return float(torch.maximum((ordered - steps[:-1]).abs(), (steps[1:] - ordered).abs()).max())


@pytest.mark.parametrize("seed", [None, 3])
def test_numbers_follow_their_distributions(seed):
    source = NoiseSource(seed)
    count = 40_001
    limit = 2.9 / math.sqrt(count)  # fails once in ten million draws
    assert kolmogorov_smirnov(source.uniform(count), lambda x: x) < limit
    assert kolmogorov_smirnov(source.normal(count), lambda x: torch.special.ndtr(x)) < limit
    uniform = source.uniform(count)
    assert 0 < uniform.min() < uniform.max() < 1
    assert abs(torch.corrcoef(source.normal(2 * 20_000).view(2, -1))[0, 1]) < 0.04  # the two halves of a pair


def test_only_an_unseeded_source_is_private():
    assert NoiseSource().private
    assert not NoiseSource(0).private
    assert not torch.equal(NoiseSource().normal(8), NoiseSource().normal(8))
    assert torch.equal(NoiseSource(5).normal(8), NoiseSource(5).normal(8))
    torch.manual_seed(0)
    one = NoiseSource().normal(8)
    torch.manual_seed(0)
    assert not torch.equal(one, NoiseSource().normal(8))


def test_a_seeded_source_goes_on_from_its_state_and_kinds_do_not_mix():
    source = NoiseSource(1)
    source.normal(3)
    state, expected = source.state(), source.normal(5)
    other = NoiseSource(2)
    other.load_state(state)
    assert torch.equal(other.normal(5), expected)
    assert NoiseSource().state() is None
    with pytest.raises(UserError, match="private"):
        NoiseSource().load_state(state)
    with pytest.raises(UserError, match="seeded"):
        other.load_state(None)


def test_the_step_is_the_sum_plus_noise_over_the_expected_batch_size():
    weights = [nn.Parameter(torch.zeros(3, 2, dtype=torch.float64)), nn.Parameter(torch.zeros(5, dtype=torch.float64))]
    total = torch.arange(6, dtype=torch.float64).view(3, 2)
    weights[0].grad = total.clone()
    add_noise(weights, noise_multiplier=0.7, clip_norm=2.0, expected_batch_size=2.5, source=NoiseSource(9))
    plain = NoiseSource(9)
    expected = [(total + 1.4 * plain.normal(6).view(3, 2)) / 2.5, 1.4 * plain.normal(5) / 2.5]
    for weight, reference in zip(weights, expected, strict=True):
        assert torch.allclose(weight.grad, reference, rtol=0, atol=1e-15)


def test_the_noise_of_an_empty_batch_has_the_deviation_promised():
    weight = nn.Parameter(torch.zeros(20_000))
    add_noise([weight], noise_multiplier=1.5, clip_norm=0.2, expected_batch_size=4.0, source=NoiseSource())
    assert weight.grad.dtype == torch.float32
    assert weight.grad.double().std().item() == pytest.approx(1.5 * 0.2 / 4, rel=0.03)


@pytest.mark.parametrize("wrong", [{"expected_batch_size": 0.0}, {"clip_norm": 0.0}, {"noise_multiplier": -1.0}])
def test_wrong_settings_of_noise_change_nothing(wrong):
    weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError):
        add_noise(
            [weight],
            **{"noise_multiplier": 1.0, "clip_norm": 1.0, "expected_batch_size": 1.0, **wrong},
            source=NoiseSource(0),
        )
    assert weight.grad is None


def test_poisson_batches_draw_each_row_on_its_own_with_the_rate():
    batches = list(islice(poisson_batches(50, 0.1, NoiseSource(4)), 2000))
    counts = torch.bincount(torch.tensor([row for batch in batches for row in batch]), minlength=50).double()
    deviation = math.sqrt(2000 * 0.1 * 0.9)
    assert (counts - 200).abs().max() < 5 * deviation
    sizes = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
    assert sizes.mean().item() == pytest.approx(5, abs=0.25)
    assert sizes.var().item() == pytest.approx(50 * 0.1 * 0.9, rel=0.15)  # binomial: rows do not depend on each other
    assert all(batch == sorted(set(batch)) for batch in batches)


def test_poisson_batches_can_be_empty_or_everything():
    assert [] in list(islice(poisson_batches(3, 0.05, NoiseSource()), 200))
    assert next(poisson_batches(3, 1.0, NoiseSource())) == [0, 1, 2]
    for rows, rate in ((0, 0.5), (3, 0.0), (3, 1.1)):
        with pytest.raises(UserError):
            next(poisson_batches(rows, rate, NoiseSource()))
