import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_files import small_files

from inft.training import storage
from inft.training.storage import locked, remove_leftovers, staged, write_text
from params import UserError


def write(directory: Path, text: str) -> None:
    with staged(directory, what="the thing") as staging:
        (staging / "a").write_text(text)


@pytest.mark.parametrize("atomic", [True, False], ids=["exchange", "two renames"])
def test_a_staged_directory_replaces_the_old_one_and_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic: bool
) -> None:
    if not atomic:
        monkeypatch.setattr(storage, "_exchange", lambda one, other: False)
    for text in ("first", "second", "third"):
        write(tmp_path / "best", text)
        assert (tmp_path / "best" / "a").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def fail(directory: Path, error: BaseException) -> None:
    with staged(directory, what="the thing") as staging:
        (staging / "a").write_text("half")
        raise error


def test_a_failure_leaves_the_old_content(tmp_path: Path) -> None:
    write(tmp_path / "best", "old")
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "best", KeyboardInterrupt())
    assert (tmp_path / "best" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def write_much(directory: Path, library: str) -> None:
    tensors = {"a": torch.zeros(10_000)}
    with staged(directory, what="the thing") as staging:
        if library == "torch":
            torch.save(tensors, staging / "b")
        elif library == "safetensors":
            save_file(tensors, staging / "b")
        else:
            (staging / "b").write_bytes(bytes(20_000))


@pytest.mark.parametrize("library", ["torch", "safetensors", "python"])
def test_a_write_that_the_system_refuses_is_a_clear_error_whatever_library_wrote(tmp_path: Path, library: str) -> None:
    write(tmp_path / "best", "old")
    refused = pytest.raises(UserError, match=r"the thing could not be saved.*What was saved before is intact")
    with refused, small_files(10_000):
        write_much(tmp_path / "best", library)
    assert (tmp_path / "best" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_full_disk_is_named_and_other_errors_are_not_dressed_up(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the disk is full"):
        fail(tmp_path / "x", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(RuntimeError, match="shapes"):
        fail(tmp_path / "x", RuntimeError("shapes do not match"))


def test_leftovers_of_a_killed_run_are_removed_and_a_directory_on_its_way_out_comes_back(tmp_path: Path) -> None:
    for name in (".inft-staging-checkpoint-4", ".inft-previous-best", ".inft-previous-checkpoint-2", "checkpoint-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "checkpoint-2"]
    assert (tmp_path / "best" / "a").read_text() == ".inft-previous-best"
    assert (tmp_path / "checkpoint-2" / "a").read_text() == "checkpoint-2"


def test_a_directory_can_be_held_once_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match="another process is training into"), locked(tmp_path):
        pass
    with locked(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_leftovers_of_another_name_stay(tmp_path: Path) -> None:
    for name in ("best", "other"):
        (tmp_path / f".inft-staging-{name}").mkdir()
    remove_leftovers(tmp_path, "best")
    assert [path.name for path in tmp_path.iterdir()] == [".inft-staging-other"]


DIES_WITH_A_CHILD = """
import os, sys, time
from pathlib import Path
from inft.training.storage import locked

with locked(Path(sys.argv[1])):
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(told, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    print(child, flush=True)
    os._exit(1)
"""


def test_a_worker_that_outlives_a_killed_run_does_not_hold_its_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DIES_WITH_A_CHILD, str(tmp_path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    child = int(run.stdout.readline())
    run.wait()
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        run.stdout.close()


def test_a_text_that_cannot_be_written_leaves_no_draft(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("old")

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("inft.training.storage._sync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"
