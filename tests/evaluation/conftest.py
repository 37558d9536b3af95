"""Stored adapters of the embedded models, with random weights, and a captioner with one in memory."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from stored_adapters import store_adapter
from tiny_captioners import captioner_of

from inft.evaluation.captioner import Captioner


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def adapter_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """adapter_of("aya"): a stored adapter of the embedded model that changes what it says."""

    @lru_cache
    def stored(name: str) -> Path:
        directory = tmp_path_factory.mktemp(f"run_{name}") / "best"
        store_adapter(directory, name, std=0.3)
        return directory

    return stored


@pytest.fixture(scope="session")
def adapter_dir(adapter_of: Callable[[str], Path]) -> Path:
    """The stored adapter of the embedded Llama 3.2 Vision."""
    return adapter_of("llama32")


@pytest.fixture
def captioner() -> Captioner:
    """The embedded Llama 3.2 Vision with an adapter in memory."""
    return captioner_of("llama32")
