import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from inft.training.runlog import COMMON, EVENTS, SCHEMA_VERSION, JsonlLogger, read_events
from params import UserError


def test_an_event_is_readable_before_the_log_is_closed(tmp_path: Path) -> None:
    log = JsonlLogger(tmp_path / "logs" / "trainer_x.jsonl")
    log.event("checkpoint", step=3, path=tmp_path / "checkpoint-3")
    (event,) = read_events(tmp_path / "logs" / "trainer_x.jsonl")
    log.close()
    assert event["event"] == "checkpoint"
    assert event["schema"] == SCHEMA_VERSION
    assert event["path"] == str(tmp_path / "checkpoint-3")
    assert set(event) == COMMON | EVENTS["checkpoint"]


def test_non_finite_numbers_stay_valid_json_and_are_read_back_by_float(tmp_path: Path) -> None:
    with JsonlLogger(tmp_path / "log.jsonl") as log:
        log.event("best", step=1, metric="eval_loss", value=math.nan, path=[math.inf, {"deep": -math.inf}])
    line = (tmp_path / "log.jsonl").read_text()
    event = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert math.isnan(float(event["value"]))
    assert float(event["path"][0]) == math.inf
    assert float(event["path"][1]["deep"]) == -math.inf


def test_an_event_that_lacks_a_key_of_the_schema_is_refused(tmp_path: Path) -> None:
    with JsonlLogger(tmp_path / "log.jsonl") as log, pytest.raises(AssertionError, match="path"):
        log.event("checkpoint", step=3)


def test_lines_that_a_killed_run_left_unfinished_are_passed_over_and_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with JsonlLogger(path) as log:
        log.event("error", kind="A", message="first")
    with path.open("a") as file:
        file.write('{"event": "log", "step": 4, "lo')
    assert [event["message"] for event in read_events(path)] == ["first"]
    with JsonlLogger(path) as log:
        log.event("error", kind="B", message="second")
    assert [event["message"] for event in read_events(path)] == ["first", "second"]


def test_a_log_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where a directory is needed")
    with pytest.raises(UserError, match=r"cannot be written.*basic\.logs_dir"):
        JsonlLogger(tmp_path / "logs" / "trainer_x.jsonl")
    if Path("/dev/full").exists():
        with JsonlLogger("/dev/full") as log, pytest.raises(UserError, match="No space left"):
            log.event("error", kind="A", message="b")


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with JsonlLogger(None) as log:
        log.event("error", kind="A", message="nowhere")
    assert list(tmp_path.iterdir()) == []


def test_reading_a_log_imports_no_torch_and_the_callback_is_found_in_the_same_place() -> None:
    code = (
        "import sys; from inft.training.runlog import JsonlLogger, read_events; "
        "assert not {'torch', 'transformers'} & set(sys.modules); "
        "from inft.training.runlog import TrainerLoggingCallback; "
        "assert 'transformers' in sys.modules; print(TrainerLoggingCallback.__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "TrainerLoggingCallback"
