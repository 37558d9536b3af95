"""Drift: CKA as it is defined, 1 for what did not move, near 0 for what has nothing in common."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_captioners import captioner_of

from inft.evaluation.drift import linear_cka, measure_drift
from inft.evaluation.rows import load_rows
from params import MUNIChusLoadConfig


def drawn(seed, rows=12, dims=5):
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_cka(x, y):
    """The debiased estimate written out over pairs and quadruples of rows: Song et al. 2012, eq. 4."""

    def hsic(k, m):
        n = len(k)
        first = second = third = 0.0
        for i in range(n):
            for j in range(n):
                if i != j:
                    first += float(k[i, j] * m[i, j])
                    for q in range(n):
                        if q not in (i, j):
                            second += float(k[i, j] * m[i, q])
                            third += sum(float(k[i, j] * m[q, r]) for r in range(n) if r not in (i, j, q))
        pairs = n * (n - 1)
        triples, quadruples = pairs * (n - 2), pairs * (n - 2) * (n - 3)
        return first / pairs - 2 * second / triples + third / quadruples

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / (hsic(k, k) * hsic(m, m)) ** 0.5


def test_cka_is_its_definition_written_out():
    x, y = drawn(1, rows=7), drawn(2, rows=7) + drawn(1, rows=7)
    assert linear_cka(x, y) == pytest.approx(plain_cka(x, y), rel=1e-9)


@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_rotation_scale_and_shift_are_no_drift(seed, scale):
    x = drawn(seed)
    rotation = torch.linalg.qr(drawn(seed + 1, rows=5)).Q
    assert linear_cka(x, scale * x @ rotation + 3) == pytest.approx(1, abs=1e-9)


def test_unrelated_representations_are_near_zero_with_fewer_rows_than_dimensions():
    values = [linear_cka(drawn(seed, rows=20, dims=300), drawn(seed + 500, rows=20, dims=300)) for seed in range(20)]
    assert abs(sum(values) / len(values)) < 0.05  # the plain estimate would be above .9


def test_a_constant_representation_has_no_cka():
    assert linear_cka(drawn(1), torch.ones(12, 5)) != linear_cka(drawn(1), torch.ones(12, 5))  # nan


@pytest.fixture(scope="module")
def samples():
    config = MUNIChusLoadConfig(data="sample", split="test", context="none", languages=("en", "ja"))
    return [row.sample for row in load_rows(config, limit=10, with_images=True).rows]


@pytest.mark.parametrize("name", ["llama32", "aya", "text"])
def test_an_adapter_of_zeros_moves_nothing_and_one_of_noise_does(name, samples):
    captioner = captioner_of(name)
    moved = measure_drift(captioner, samples, data="sample", split="test", fingerprint="")
    for key, weight in captioner.model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.zeros_(weight)
    still = measure_drift(captioner, samples, data="sample", split="test", fingerprint="")
    assert len(still.layers) == len(still.cka) == len(still.cosine)
    assert still.cka == pytest.approx([1] * len(still.layers), abs=1e-6)
    assert still.cosine == pytest.approx([1] * len(still.layers), abs=1e-6)
    assert min(moved.cosine) < 0.98
    assert moved.cosine[0] == pytest.approx(1)
