"""An engine in this process: started at the first use, and shared by all who name the same state directory."""

import atexit
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inft.client.errors import Closed, QueueFull, RateLimited
from inft.client.sdk.seeds import same_random
from inft.client.sdk.transport import FINISHED, Values
from params.client import EngineParams
from params.errors import UserError

if TYPE_CHECKING:
    from inft.client.engine import Engine

LONG_WAIT = 3600.0  # seconds, of one wait without a limit
PAUSE = 0.02  # seconds between two looks at a full queue


@dataclass(kw_only=True)
class _Shared:
    engine: "Engine"
    params: EngineParams
    holders: int = 0


_shared: dict[str, _Shared] = {}  # by state directory
_lock = threading.Lock()


class LocalTransport:
    """One tenant's use of an engine in this process; `timeout` is the seconds it waits for room in a full queue.

    Errors: UserError at the first use where another process, or other settings in this one, hold the state directory.
    """

    def __init__(self, params: EngineParams, tenant: str, *, timeout: float) -> None:
        # As an absolute path: one directory is one engine, however it is named and wherever the program goes.
        self._params = replace(params, state_dir=str(Path(params.state_dir).expanduser().resolve()))
        self._tenant, self._timeout = tenant, timeout
        self._engine: Engine | None = None
        self._closed = False
        self._starting = threading.Lock()

    def __repr__(self) -> str:
        return f"in process, state in {self._params.state_dir}"

    @property
    def engine(self) -> "Engine":
        """The engine; started at the first use."""
        with self._starting:
            if self._closed:
                raise Closed("this ServiceClient is closed: make another one.")
            if self._engine is None:
                self._engine = _acquire(self._params)
            return self._engine

    def create_client(self, config: Values) -> Values:
        """Return ClientInfo of a new training client."""
        return self.engine.create_client(self._tenant, config)

    def get_client(self, client_id: str) -> Values:
        """Return ClientInfo."""
        return self.engine.get_client(self._tenant, client_id)

    def delete_client(self, client_id: str) -> None:
        """Delete a training client that has nothing open."""
        self.engine.delete_client(self._tenant, client_id)

    def list_clients(self) -> list[Values]:
        """Return ClientInfo of all training clients of this tenant."""
        return self.engine.list_clients(self._tenant)

    def submit(self, client_id: str, kind: str, payload: Values, *, loss: Callable[..., Any] | None = None) -> Values:
        """Return FutureInfo; the engine counts, so that all handles of a client share its numbers.

        Where as many operations wait as the engine takes, this waits for room, as it does over HTTP.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return self.engine.submit(self._tenant, client_id, kind, payload, loss=loss)
            except (RateLimited, QueueFull):
                if time.monotonic() > deadline:
                    raise
                time.sleep(PAUSE)

    def future(self, future_id: str) -> Values:
        """Return FutureInfo as it is now."""
        return self.engine.future(self._tenant, future_id)

    def wait(self, future_id: str, timeout: float | None) -> Values:
        """Return FutureInfo when the operation has finished, or after `timeout` seconds. Errors: Closed."""
        seconds, begun = LONG_WAIT if timeout is None else timeout, time.monotonic()
        info = self.engine.wait(self._tenant, future_id, seconds)
        if info["status"] not in FINISHED and time.monotonic() - begun < seconds:
            raise Closed(
                f"the engine was closed while {future_id} was waited for: it runs when the engine is started again on "
                f"{self._params.state_dir}, and get_future finds it."
            )
        return info

    def cancel(self, future_id: str) -> bool:
        """Return whether the operation had not begun and now never will."""
        return self.engine.cancel(self._tenant, future_id)

    def audit_logs(self, after: int, limit: int) -> list[Values]:
        """Return entries of this tenant with numbers above `after`."""
        return self.engine.audit_logs(self._tenant, after=after, limit=limit)

    def pull(self, artifact_id: str, directory: Path) -> Mapping[str, Any]:
        """Copy the files of a checkpoint into `directory`."""
        info = self.engine.artifact(self._tenant, artifact_id)
        shutil.copytree(self.engine.artifact_path(self._tenant, artifact_id), directory, dirs_exist_ok=True)
        return info

    def close(self) -> None:
        """Let go of the engine; the last one to do so closes it."""
        with self._starting:
            held, self._engine, self._closed = self._engine, None, True
        if held is not None:
            _release(held)


def _acquire(params: EngineParams) -> "Engine":
    with same_random():
        from inft.client.engine import Engine  # brings torch

    place = params.state_dir
    with _lock:
        if place not in _shared:
            if not _shared:
                atexit.register(_close_all, os.getpid())
            _shared[place] = _Shared(engine=Engine(params), params=params)
        found = _shared[place]
        if found.params != params:
            raise UserError(
                f"an engine with other settings is open on {params.state_dir} in this process: close its "
                "ServiceClient, give the same settings, or choose another state_dir."
            )
        found.holders += 1
        return found.engine


def _release(engine: "Engine") -> None:
    with _lock:
        place, found = next((place, found) for place, found in _shared.items() if found.engine is engine)
        found.holders -= 1
        if found.holders == 0:
            del _shared[place]
            engine.close()


def _close_all(process: int) -> None:
    """At the end of the interpreter: finish the running operation and keep the rest in the log."""
    if os.getpid() == process:  # a fork has the table and not the engine's thread
        for found in list(_shared.values()):
            found.engine.close()
        _shared.clear()
