"""Finding, following and cutting up trainer_<task>.jsonl files."""

import difflib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from params.errors import UserError

PREFIX = "trainer_"
Event = dict[str, Any]
Run = list[Event]  # the events of one process, its run_start first unless it failed before that


def all_logs(logs_dir: Path) -> list[Path]:
    """The logs of a directory, oldest first; UserError when there are none."""
    paths = sorted(logs_dir.glob(f"{PREFIX}*.jsonl"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise UserError(f"no {PREFIX}<task>.jsonl in {logs_dir}: start a run, or name its directory with --logs-dir.")
    return paths


def task_of(path: Path) -> str:
    """The task whose log a file is."""
    return path.stem.removeprefix(PREFIX)


def find_log(logs_dir: Path, task: str | None) -> Path:
    """The log of a task ("aya_basic"), or the newest one; UserError naming the tasks that have logs."""
    paths = all_logs(logs_dir)
    if task is None:
        return paths[-1]
    by_task = {task_of(path): path for path in paths}
    if task not in by_task:
        near = difflib.get_close_matches(task, by_task, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(by_task))}."
        raise UserError(f"no log of task {task!r} in {logs_dir}; {hint}")
    return by_task[task]


def followed_events(path: Path, *, last: int, poll_seconds: float = 0.2) -> Iterator[Event]:
    """Yield the last events and then new ones as they are written, without end.

    A line counts once its line break is there; a file that shrank was replaced and is read from its beginning.
    """
    backlog, position, rest = [], 0, b""
    caught_up = False
    while True:
        size = path.stat().st_size
        if size < position:
            position, rest = 0, b""
        with path.open("rb") as file:
            file.seek(position)
            fresh = file.read()
        position += len(fresh)
        *lines, rest = (rest + fresh).split(b"\n")
        events = list(_parsed(lines))
        if caught_up:
            yield from events
            time.sleep(poll_seconds)
        else:
            backlog, caught_up = events[-last:], True
            yield from backlog


def split_runs(events: Iterable[Event]) -> list[Run]:
    """The events of a log by run, in the order in which the runs began.

    Events with a ``run`` belong together by it. Without one a run goes from its run_start, or from what an attempt
    logged that failed before it, to its run_end or error.
    """
    runs: list[Run] = []
    growing: dict[str | None, Run] = {}
    for event in events:
        key = event.get("run")
        if key not in growing or event.get("event") == "run_start":
            growing[key] = []
            runs.append(growing[key])
        growing[key].append(event)
        if key is None and event.get("event") in ("run_end", "error"):
            del growing[key]
    return runs


def last_run(events: Iterable[Event]) -> Run:
    """The events of the newest run that started, after those of the runs that it went on from; else nothing."""
    joined: list[Run] = []
    for run in reversed([run for run in split_runs(events) if run[0].get("event") == "run_start"]):
        if not joined or _output_dir(run) == _output_dir(joined[0]):
            joined.insert(0, run)
        if not joined[0][0].get("resumed_from_step"):
            break
    return [event for run in joined for event in run]


def run_status(run: Run) -> str:
    """How a run ended; "unfinished" while it runs and after a kill, since the log cannot tell them apart."""
    for event in reversed(run):
        if event.get("event") == "error":
            return f"error: {event.get('kind', '')} {event.get('message', '')}".strip()
        if event.get("event") == "run_end":
            return str(event.get("status"))
    return "unfinished"


def _output_dir(run: Run) -> str | None:
    directory: str | None = run[0].get("params", {}).get("output_dir")
    return directory


def _parsed(lines: Iterable[bytes]) -> Iterator[Event]:
    for line in lines:
        try:
            event = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):  # a killed run's half line
            continue
        if isinstance(event, dict):
            yield event
