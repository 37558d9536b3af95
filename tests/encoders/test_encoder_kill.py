"""A run that is killed at any moment goes on as if nothing had happened."""

import signal
import time
from pathlib import Path

import pytest
from encoder_runs import command_line, events, losses, started, write_data

from inft.encoders.checkpoints import STATES
from inft.training.resume import damage

TOLD = {
    "dataset__streaming": True,
    "datacollator__pack_sequences": True,
    "dataset__num_workers": 1,
    "trainer__max_steps": 60,
    "trainer__save_steps": 4,
    "trainer__eval_steps": 30,
    "trainer__save_total_limit": 2,
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return write_data(tmp_path)


def wait_for_step(place: Path, step: int) -> None:
    """Until the log has the step; it fails when the run ends before."""
    log = place / "logs" / "trainer_neobert.jsonl"
    deadline = time.monotonic() + 90
    while not (log.exists() and max(losses(place), default=0) >= step):
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.02)


def finished(command: list[str], place: Path) -> str:
    run = started(command, place)
    output, _ = run.communicate(timeout=180)
    assert run.returncode == 0, output
    return output


def test_a_killed_streaming_packed_run_goes_on_with_equal_losses(place):
    whole = {**TOLD, "trainer__run_name": "whole", "trainer__output_dir": str(place / "whole")}
    finished(command_line(place, **whole), place)
    for step in (6, 19):
        run = started(
            command_line(place, **TOLD, **({"trainer__resume_from_checkpoint": "latest"} if step > 6 else {})), place
        )
        wait_for_step(place, step)
        run.send_signal(signal.SIGKILL)
        run.communicate()
    assert [path for path in (place / "run" / STATES).glob("[0-9]*") if damage(path)] == []
    finished([*command_line(place, **TOLD), "--resume"], place)
    resumed = [event["resumed_from_step"] for event in events(place, "run_start")]
    assert resumed[0] is None
    assert 0 < resumed[1] < resumed[2]
    assert losses(place) == losses(place, "whole")
    assert [e["loss"] for e in events(place, "eval")][-1] == [e["loss"] for e in events(place, "eval", "whole")][-1]


def test_ctrl_c_saves_says_how_to_go_on_and_ends_with_130(place):
    run = started(command_line(place, **{**TOLD, "trainer__max_steps": 5000, "trainer__save_steps": 5000}), place)
    wait_for_step(place, 3)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 130, output
    assert "--trainer.resume_from_checkpoint latest" in output
    (saved,) = (place / "run" / STATES).glob("[0-9]*")
    assert damage(saved) is None
