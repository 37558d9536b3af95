import io
from collections.abc import Callable

import pytest
from rich.console import Console

from inft.training.progress import duration
from inft.training.run import fit
from params import TrainParams


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3599, "59 min 59 s"), (3900, "1 h 05 min")],
)
def test_a_duration_is_said_in_its_two_largest_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_without_a_terminal_each_log_is_a_plain_line(make_params: Callable[..., TrainParams]) -> None:
    out = io.StringIO()
    fit(make_params(sft__logging_steps=4), console=Console(file=out, width=100))
    lines = [line for line in out.getvalue().splitlines() if line.startswith("step ")]
    assert [line.split(" · ")[0] for line in lines] == [f"step {step}/8" for step in (1, 2, 4, 4, 6, 8, 8)]
    assert "tokens/s" in lines[2]
    assert "left" in lines[2]
    assert "held-out loss" in lines[1]
    assert "\x1b" not in out.getvalue()


def test_on_a_terminal_there_is_a_bar_with_loss_and_speed(make_params: Callable[..., TrainParams]) -> None:
    out = io.StringIO()
    fit(make_params(), console=Console(file=out, width=120, force_terminal=True))
    text = out.getvalue()
    assert "8/8" in text
    assert "tokens/s" in text
    assert "loss" in text
