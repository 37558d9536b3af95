"""Stored adapters of the embedded models, with random weights, and a captioner with one in memory."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from stored_adapters import store_adapter
from tiny_captioners import captioner_of

from inft.evaluation.captioner import Captioner
from params import MUNIChusLoadConfig


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


@pytest.fixture
def held(tmp_path: Path) -> MUNIChusLoadConfig:
    """A file of sixty news in each of two languages, and the data section of a run on it."""
    rows = [
        {"title": f"{code} {i}", "content": f"{code} {i}", "caption": f"{code} caption {i}", "language": code}
        for code in ("en", "fr")
        for i in range(60)
    ]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return MUNIChusLoadConfig(data=str(tmp_path), eval_fraction=0.2, seed=3)
