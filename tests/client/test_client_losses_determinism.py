"""A seed gives the same numbers again, and golden files lose no bit."""

import json
import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inft.client.losses.determinism import deterministic, float_hex, platform_fingerprint, set_seed
from params.errors import UserError


@pytest.fixture
def torch_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_seed_gives_the_same_numbers_of_all_generators() -> None:
    set_seed(42)
    first = drawn()
    assert all(a != b for a, b in zip(first, drawn(), strict=True))
    set_seed(42)
    assert drawn() == first


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, True, "42", None])
def test_what_is_no_seed_is_refused(seed: object) -> None:
    with pytest.raises(UserError, match="seed is"):
        set_seed(seed)  # type: ignore[arg-type]


@pytest.mark.usefixtures("torch_settings")
def test_deterministic_mode_sets_what_the_guide_names() -> None:
    deterministic(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert platform_fingerprint()["deterministic"] is True
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
    deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("torch_settings")
def test_a_workspace_that_is_deterministic_already_is_kept() -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    deterministic(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_the_fingerprint_is_json_and_names_versions_and_threads() -> None:
    found = platform_fingerprint()
    assert json.loads(json.dumps(found)) == found
    assert {"python", "torch", "transformers", "machine", "threads"} <= set(found)
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()


def test_the_fingerprint_changes_with_the_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert platform_fingerprint()["threads"] == before + 1
    finally:
        torch.set_num_threads(before)


@given(st.lists(st.floats(allow_nan=False)))
def test_hex_floats_come_back_bit_for_bit(values: list[float]) -> None:
    assert [float.fromhex(text) for text in float_hex(values)] == values


def test_tensors_are_written_as_their_numbers() -> None:
    assert float_hex(torch.tensor([0.1, 2.0])) == [float(np.float32(0.1)).hex(), "0x1.0000000000000p+1"]
