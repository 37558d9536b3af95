"""The watch over the processes of a run ends before Python does."""

import time

import pytest

from inft.training import processes


def test_closing_a_watch_waits_until_its_thread_has_left_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def check(self, keys: list[str]) -> bool:
            time.sleep(0.3)
            return False

    monkeypatch.setattr(processes, "OUTLAST", 3.0)
    watch = processes._Watch([Slow(), Slow()])  # type: ignore[list-item]
    watch.start()
    began = time.monotonic()
    watch.close()
    assert not watch.is_alive()
    assert time.monotonic() - began < 2.0
