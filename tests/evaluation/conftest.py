"""Stored adapters of the embedded models, with random weights."""

from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from tiny_captioners import adapted, captioner_of
from tiny_families import tiny_family

from inft.evaluation.captioner import Captioner
from inft.training.best import BestRecord, config_sha256, store_best
from params.resolve import resolve_train

TAUGHT = "en,ur,si"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def adapter_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """adapter_of("aya"): a stored adapter of the embedded model, taught English, Urdu and Sinhala by its record."""

    @lru_cache
    def stored(name: str) -> Path:
        directory = tmp_path_factory.mktemp(f"run_{name}") / "best"
        model = adapted(name)
        params = resolve_train(name, demo=True, flags={"data": "sample", "languages": TAUGHT})
        record = BestRecord(
            step=7,
            metric="eval_loss",
            value=0.5,
            why="a test",
            model=name,
            base_model="",
            base_config_sha256=config_sha256(model.get_base_model().config),
            params=asdict(params),
        )
        store_best(model, tiny_family(name).processor, directory, record, initial=None)
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
