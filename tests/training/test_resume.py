import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from inft.training.resume import (
    MANIFEST,
    checkpoints,
    damage,
    delete_run,
    find_checkpoint,
    refuse_changed_parameters,
    refuse_foreign_output,
    write_manifest,
)
from inft.training.run import fit
from inft.training.runlog import read_events
from params import TrainParams, UserError
from params.resolve import dump_yaml

Make = Callable[..., TrainParams]
QUIET = Console(quiet=True)

WORKER = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from rich.console import Console
from inft.training.run import fit
from inft.training.runlog import JsonlLogger
from params.resolve import load_params

write, die_at, number = JsonlLogger.event, int(sys.argv[3]), int(sys.argv[4])

def write_and_die(logger, event, **fields):
    global die_at
    write(logger, event, **fields)
    if die_at and event == "log" and fields["step"] >= die_at:
        die_at = 0
        os.killpg(0, number)

JsonlLogger.event = write_and_die
print(fit(load_params(Path(sys.argv[1])), resume=sys.argv[2] or None, console=Console(quiet=True)).status)
"""


def figures(params: TrainParams, event: str) -> dict[int, set[tuple[Any, ...]]]:
    """step -> everything that was logged of it, in any of the processes that the run took."""
    keys = ("loss", "grad_norm", "learning_rate", "entropy", "num_tokens", "languages", "tokens")
    found: dict[int, set[tuple[Any, ...]]] = {}
    for entry in read_events(Path(params.basic.logs_dir) / "trainer_text_basic.jsonl"):
        if entry["event"] == event:
            found.setdefault(entry["step"], set()).add(tuple(str(entry.get(key)) for key in keys))
    return found


def start(
    params: TrainParams, file: Path, resume: str = "", *, die_at: int = 0, of: signal.Signals = signal.SIGKILL
) -> "subprocess.Popen[str]":
    """A run in a process of its own, which sends itself a signal when it has logged a step."""
    file.write_text(dump_yaml(params))
    command = [sys.executable, "-c", WORKER, str(file), resume, str(die_at), str(int(of))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_a_run_killed_twice_and_resumed_has_the_losses_of_an_uninterrupted_one_to_the_bit(
    tmp_path: Path, make_params: Make
) -> None:
    long = {"sft__max_steps": 60, "sft__save_steps": 7, "sft__eval_steps": 5, "sft__logging_steps": 2}
    whole, broken = make_params(tmp_path / "whole", **long), make_params(tmp_path / "broken", **long)
    expected = fit(whole, console=QUIET)

    log = tmp_path / "broken" / "logs" / "trainer_text_basic.jsonl"
    for step in (18, 44):
        process = start(broken, tmp_path / "broken.yaml", "latest" if step == 44 else "", die_at=step)
        err = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, err
    process = start(broken, tmp_path / "broken.yaml", resume="latest")
    out, err = process.communicate()
    assert out.strip() == "finished", err

    assert figures(broken, "log") == figures(whole, "log")
    assert figures(broken, "eval") == figures(whole, "eval")
    name = "adapter_model.safetensors"
    assert (Path(broken.best_model_dir) / name).read_bytes() == (Path(whole.best_model_dir) / name).read_bytes()
    end = [event for event in read_events(log) if event["event"] == "run_end"][-1]
    assert (end["train_loss"], end["best_step"], end["best_metric"]) == (
        expected.train_loss,
        expected.best_step,
        expected.best_metric,
    )


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGTERM, 2), (signal.SIGINT, 2)])
def test_a_signal_to_the_process_group_finishes_the_step_and_the_resumed_run_has_the_same_losses(
    tmp_path: Path, make_params: Make, number: signal.Signals, workers: int
) -> None:
    long = {"sft__max_steps": 24, "sft__save_steps": 1000, "sft__eval_steps": 9, "sft__logging_steps": 4}
    whole = make_params(tmp_path / "whole", **long)
    broken = make_params(tmp_path / "broken", data__num_workers=workers, **long)
    fit(whole, console=QUIET)
    out, err = start(broken, tmp_path / "broken.yaml", die_at=8, of=number).communicate()
    assert out.strip() == "interrupted", err
    ((step, path),) = checkpoints(Path(broken.output_dir))
    assert 8 <= step < 24
    assert damage(path) is None
    assert fit(broken, resume="latest", console=QUIET).status == "finished"
    assert figures(broken, "log") == figures(whole, "log")
    assert figures(broken, "eval") == figures(whole, "eval")


def test_resume_before_the_first_checkpoint_starts_from_the_beginning(make_params: Make) -> None:
    params = make_params()
    Path(params.output_dir).mkdir()
    (Path(params.output_dir) / "params.yaml").write_text(dump_yaml(params))
    assert fit(params, resume="latest", console=QUIET).global_step == 8


def test_resuming_a_finished_run_changes_nothing_and_more_steps_go_on(make_params: Make) -> None:
    params = make_params()
    first = fit(params, console=QUIET)
    again = fit(params, resume="latest", console=QUIET)
    assert (again.global_step, again.train_loss, again.best_step) == (8, first.train_loss, first.best_step)
    longer = fit(make_params(sft__max_steps=10), resume="latest", console=QUIET)
    assert (longer.global_step, longer.status) == (10, "finished")


def test_a_resumed_run_logs_evaluates_and_saves_as_it_is_told_now(make_params: Make) -> None:
    fit(make_params(sft__max_steps=4), console=QUIET)
    params = make_params(sft__max_steps=12, sft__logging_steps=4, sft__eval_steps=6, sft__save_steps=12)
    result = fit(params, resume="latest", console=QUIET)
    steps: dict[str, list[int]] = {"log": [], "eval": [], "checkpoint": []}
    for event in read_events(result.log_file):
        if event["event"] in steps:
            steps[event["event"]].append(event["step"])
    assert steps == {"log": [1, 2, 3, 4, 8, 12], "eval": [2, 4, 6, 12], "checkpoint": [3, 4, 12]}


def test_going_back_to_an_earlier_checkpoint_by_its_path_makes_it_the_latest(make_params: Make) -> None:
    params = make_params(sft__save_total_limit=3)
    fit(params, console=QUIET)
    before = figures(params, "log")
    output = Path(params.output_dir)
    fit(make_params(sft__max_steps=7, sft__save_total_limit=3), resume=str(output / "checkpoint-3"), console=QUIET)
    assert [step for step, _ in checkpoints(output)] == [7, 6, 8]
    steps = [
        event["step"]
        for event in read_events(params.basic.logs_dir + "/trainer_text_basic.jsonl")
        if event["event"] == "log"
    ]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6, 7]
    assert figures(params, "log").keys() == before.keys()


def test_early_stopping_goes_on_counting_after_a_resume(make_params: Make, tmp_path: Path) -> None:
    still = {"sft__lr": 1e-12, "sft__eval_steps": 1, "sft__save_steps": 1, "sft__early_stopping_patience": 4}
    whole = fit(make_params(tmp_path / "whole", **still), console=QUIET)
    assert (whole.status, whole.global_step) == ("early_stopped", 5)
    params = make_params(tmp_path / "broken", **still)
    fit(make_params(tmp_path / "broken", **still, sft__max_steps=3), console=QUIET)
    resumed = fit(params, resume="latest", console=QUIET)
    assert (resumed.status, resumed.global_step) == ("early_stopped", 5)
    again = fit(params, resume="latest", console=QUIET)
    assert (again.status, again.global_step) == ("early_stopped", 5)
    assert again.train_loss == pytest.approx(resumed.train_loss)


def make_checkpoint(directory: Path, step: int, *, age: float = 0) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "adapter_model.safetensors").write_bytes(bytes(100))
    (path / "trainer_state.json").write_text("{}")
    write_manifest(path, step=step)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, "time": manifest["time"] - age}))
    return path


def break_nothing(path: Path) -> None:
    pass


def remove_a_file(path: Path) -> None:
    (path / "trainer_state.json").unlink()


def cut_a_file(path: Path) -> None:
    os.truncate(path / "adapter_model.safetensors", 50)


def change_a_byte(path: Path) -> None:
    (path / "adapter_model.safetensors").write_bytes(bytes(99) + b"\1")


def remove_the_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def garble_the_manifest(path: Path) -> None:
    (path / MANIFEST).write_text('{"files": ')


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (remove_a_file, "trainer_state.json is missing"),
        (cut_a_file, "50 bytes, 100 were written"),
        (change_a_byte, "has changed"),
        (remove_the_manifest, "not finished"),
        (garble_the_manifest, "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, harm: Callable[[Path], None], word: str
) -> None:
    good, bad = make_checkpoint(tmp_path, 10, age=10), make_checkpoint(tmp_path, 20)
    assert find_checkpoint(tmp_path, "latest") == (bad, [])
    harm(bad)
    found, (warning,) = find_checkpoint(tmp_path, "latest")
    assert found == good
    assert word in warning
    with pytest.raises(UserError, match=str(good)):
        find_checkpoint(tmp_path, str(bad))


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(make_params: Make) -> None:
    params = make_params()
    fit(make_params(sft__max_steps=7), console=QUIET)
    cut_a_file(Path(params.output_dir) / "checkpoint-7")
    fit(params, resume="latest", console=QUIET)
    starts = [e for e in read_events(params.basic.logs_dir + "/trainer_text_basic.jsonl") if e["event"] == "run_start"]
    assert [start["resumed_from_step"] for start in starts] == [None, 6]


def test_changed_parameters_are_listed_all_at_once_unless_harmless(make_params: Make) -> None:
    before = make_params()
    notes = refuse_changed_parameters(before, make_params(sft__max_steps=9, sft__logging_steps=3))
    assert notes == ["sft.logging_steps: 1 -> 3", "sft.max_steps: 8 -> 9"]
    with pytest.raises(UserError, match=r"(?s)lora\.r: 4 -> 8.*sft\.lr: 0\.01 -> 0\.1"):
        refuse_changed_parameters(before, make_params(sft__lr=0.1, lora__r=8))


def test_a_resume_on_changed_data_is_refused(make_params: Make, captions_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(captions_dir, tmp_path / "data")
    params = make_params(data__data=str(tmp_path / "data"), sft__max_steps=3)
    fit(params, console=QUIET)
    train = tmp_path / "data" / "train.jsonl"
    train.write_text("".join(train.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"the data has changed since .*checkpoint-3"):
        fit(params, resume="latest", console=QUIET)


def test_another_runs_directory_is_refused_and_overwrite_deletes_only_what_runs_write(
    tmp_path: Path, make_params: Make
) -> None:
    params = make_params()
    refuse_foreign_output(params, resume=False, overwrite=False)
    output = Path(params.output_dir)
    make_checkpoint(output, 10)
    (output / "params.yaml").write_text("")
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        refuse_foreign_output(params, resume=False, overwrite=False)
    refuse_foreign_output(params, resume=True, overwrite=False)
    (output / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        refuse_foreign_output(params, resume=False, overwrite=True)
    (output / "thesis.txt").rename(tmp_path / "thesis.txt")
    refuse_foreign_output(params, resume=False, overwrite=True)
    (output / "quarantine.jsonl").write_text("")
    delete_run(params)
    assert [path.name for path in output.iterdir()] == ["quarantine.jsonl"]


def test_a_directory_that_is_no_adapter_is_never_replaced_by_the_best_one(tmp_path: Path, make_params: Make) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="photos"):
            refuse_foreign_output(
                make_params(best_model_dir=str(tmp_path / "photos")), resume=False, overwrite=overwrite
            )


def test_a_checkpoint_of_another_directory_is_refused(tmp_path: Path, make_params: Make) -> None:
    with pytest.raises(UserError, match="must lie in"):
        fit(make_params(), resume=str(make_checkpoint(tmp_path / "other", 3)), console=QUIET)


def test_overwrite_with_a_mistake_in_the_data_leaves_the_old_run(tmp_path: Path, make_params: Make) -> None:
    params = make_params()
    fit(params, console=QUIET)
    with pytest.raises(UserError):
        fit(make_params(data__data=str(tmp_path / "nowhere")), overwrite=True, console=QUIET)
    assert [step for step, _ in checkpoints(Path(params.output_dir))] == [8, 6]
    assert (Path(params.best_model_dir) / "best.json").exists()
    fit(make_params(sft__max_steps=3), overwrite=True, console=QUIET)
    assert [step for step, _ in checkpoints(Path(params.output_dir))] == [3]


def test_without_resume_or_overwrite_a_finished_run_stays(make_params: Make) -> None:
    params = make_params(sft__max_steps=2)
    fit(params, console=QUIET)
    with pytest.raises(UserError, match="another run"):
        fit(params, console=QUIET)
    shutil.rmtree(params.output_dir)
    fit(params, console=QUIET)


def test_a_directory_name_that_is_too_long_is_an_error(make_params: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be used: File name too long"):
        fit(make_params(output_dir=str(tmp_path / ("x" * 300))), console=QUIET)
