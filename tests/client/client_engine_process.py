"""An engine in a process of its own, which tests can kill at any moment: what is then left is what a crash leaves.

The process is forked from a server that has imported torch, so that a new one answers within half a second.
"""

import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from client_engine_help import TENANT

ANSWER_S = 120.0  # far longer than any call takes
WAITED = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree")  # what a kill can be set before

_context = multiprocessing.get_context("forkserver")


class Killed(Exception):
    """The process ended without an answer."""


class EngineProcess:
    """Engine(state_dir) in another process; each call is sent there."""

    def __init__(self, directory: Path, **params: Any) -> None:
        _start_server()
        self._here, there = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(there, str(directory), params), daemon=True)
        self._process.start()
        there.close()
        self._answer()

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of the engine for the one tenant; raise what it raises, or Killed."""
        self.send(method, *args, **options)
        return self._answer()

    def send(self, method: str, *args: Any, **options: Any) -> None:
        """Begin a call whose answer nobody waits for."""
        self._here.send((method, args, options))

    def kill_soon(self) -> None:
        """End the process from another thread: a call that waits for an answer then raises Killed."""
        self._process.kill()

    def kill(self) -> None:
        """End the process at once, and wait until it has."""
        self.kill_soon()
        self._process.join()
        self._here.close()

    def close(self) -> None:
        """Close the engine in order, as the end of a program does."""
        self.call("close")
        self._process.join()
        self._here.close()

    def _answer(self) -> Any:
        try:
            if not self._here.poll(ANSWER_S):
                raise TimeoutError(f"no answer within {ANSWER_S} s")
            kind, value = self._here.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise Killed from error
        if kind == "error":
            raise value
        return value


def wait(engine: EngineProcess, future_id: str) -> dict[str, Any]:
    """The FutureInfo of an operation that has ended."""
    ended = engine.call("wait", future_id, ANSWER_S)
    assert ended["status"] in ("completed", "failed", "cancelled"), ended
    return ended


@functools.cache
def _start_server() -> None:
    """Start the server that processes are forked from: it finds what it is to import in PYTHONPATH alone."""
    _context.set_forkserver_preload(["client_engine_preloaded"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _serve(connection: Connection, directory: str, params: dict[str, Any]) -> None:
    import torch

    from inft.client.engine import Engine
    from params.client import EngineParams

    torch.set_num_threads(1)
    # A test kills it within milliseconds, again and again: that is no reason to give an operation up.
    engine = Engine(EngineParams(state_dir=directory, **{"max_attempts": 10**6, **params}))
    connection.send(("value", None))
    while True:
        try:
            method, args, options = connection.recv()
        except EOFError:  # the test failed and has gone
            return
        try:
            if method == "kill_before":
                value: Any = _kill_before(*args)
            elif method == "count_events":
                value = _count_events(*args)
            elif method == "close":
                value = engine.close()
            else:
                value = getattr(engine, method)(TENANT, *args, **options)
        except Exception as error:  # noqa: BLE001 - raised where the call was made
            connection.send(("error", error))
        else:
            connection.send(("value", value))
        if method == "close":
            return


def _kill_before(directory: str, number: int) -> None:
    """Kill this process before the worker thread's `number`-th change to files below a directory."""
    counted = _Counter(directory)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if counted.takes(event, args) and counted.number > number:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(ANSWER_S)

    sys.addaudithook(hook)


_counters: dict[str, "_Counter"] = {}


def _count_events(directory: str) -> int:
    """The number of changes since the first call with this directory."""
    if directory not in _counters:
        counter = _counters[directory] = _Counter(directory)
        sys.addaudithook(lambda event, args: counter.takes(event, args) and None)
    return _counters[directory].number


class _Counter:
    def __init__(self, directory: str) -> None:
        self.directory, self.number = directory, 0

    def takes(self, event: str, args: tuple[Any, ...]) -> bool:
        if event not in WAITED or threading.current_thread().name != "inft-client":
            return False
        if not any(isinstance(arg, (str, os.PathLike)) and str(arg).startswith(self.directory) for arg in args[:2]):
            return False
        self.number += 1
        return True
