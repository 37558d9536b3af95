"""Fixtures of the training client's tests."""

import threading

import pytest
import torch
from client_engine_help import SECONDS

from inft.client.losses.inputs import LossOutput


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gate():
    """A loss that waits: what is behind it in line stays there until the gate is opened."""
    event = threading.Event()

    def waits(inputs):
        assert event.wait(SECONDS)
        return LossOutput(loss=inputs.logits_BTV.float().mean())

    yield waits, event
    event.set()
