"""The answer to an operation that was accepted and may not have run yet."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, Generic, TypeVar

from inft.client.errors import ClientError, OperationCancelled, TimedOut, error_of
from inft.client.sdk.transport import FINISHED, Transport, Values

Result = TypeVar("Result")
Parse = Callable[[Mapping[str, Any]], Result]
_log = logging.getLogger(__name__)


class Future(Generic[Result]):
    """One accepted operation; it runs whether or not anybody waits for it.

    Waiting is woken by the engine (in process) or held open by the service (long poll): nothing sleeps in between.
    ``await future`` gives the result too. Safe in several threads.
    """

    def __init__(
        self,
        transport: Transport,
        info: Values,
        parse: Parse[Result],
        *,
        on_finished: Callable[[Values], None] = lambda info: None,
    ) -> None:
        self._transport, self._info, self._parse, self._on_finished = transport, info, parse, on_finished
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[Future[Result]], Any]] = []
        self._watched = False
        self._told = False
        self._keep(info)

    def __repr__(self) -> str:
        return f"Future(id={self.id!r}, kind={self.kind!r}, seq={self.seq}, status={self._info['status']!r})"

    @property
    def id(self) -> str:
        """The operation's id, which ServiceClient.get_future takes, in another process too."""
        return str(self._info["id"])

    @property
    def kind(self) -> str:
        """forward_backward, optim_step, sample, save_state or load_state."""
        return str(self._info["kind"])

    @property
    def seq(self) -> int:
        """The operation's place among those of its client, from 1."""
        return int(self._info["seq"])

    @property
    def status(self) -> str:
        """Its status now: waiting, queued, running, completed, failed or cancelled."""
        return str(self._now()["status"])

    def done(self) -> bool:
        """Whether it has completed, failed or been cancelled."""
        return self.status in FINISHED

    def cancelled(self) -> bool:
        """Whether it was cancelled before it began."""
        return self.status == "cancelled"

    def result(self, timeout: float | None = None) -> Result:
        """Return the result, waiting for it at most `timeout` seconds (None: as long as it takes).

        Errors: TimedOut and ClientUnavailable, which leave the operation as it is; OperationCancelled; or what the
        operation failed with.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self._parse(self._info["result"])

    def exception(self, timeout: float | None = None) -> ClientError | None:
        """Return what the operation failed with, or None, waiting as `result` does. Errors: TimedOut."""
        info = self._wait(timeout)
        if info["status"] == "completed":
            return None
        if info["status"] == "cancelled" and not info.get("error"):
            return OperationCancelled(f"the operation {self.id} ({self.kind}) was cancelled before it ran.")
        return error_of(info["error"])

    def cancel(self) -> bool:
        """Return whether the operation is cancelled now; one that has begun goes on, and this is False."""
        return self._transport.cancel(self.id) or self.cancelled()

    def add_done_callback(self, fn: Callable[["Future[Result]"], Any]) -> None:
        """Call `fn(future)` when it has finished: at once where it has, else in a thread that waits for it.

        What `fn` raises is logged and stops nothing.
        """
        with self._lock:
            finished = self._info["status"] in FINISHED
            if not finished:
                self._callbacks.append(fn)
                start, self._watched = not self._watched, True
        if finished:
            self._call(fn)
        elif start:
            threading.Thread(target=self._watch, name=f"inft-{self.id}", daemon=True).start()

    def __await__(self) -> Generator[Any, None, Result]:
        return asyncio.to_thread(self.result).__await__()

    def _now(self) -> Values:
        return self._info if self._info["status"] in FINISHED else self._keep(self._transport.future(self.id))

    def _wait(self, timeout: float | None) -> Values:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._info["status"] not in FINISHED:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            info = self._keep(self._transport.wait(self.id, left))
            if info["status"] not in FINISHED and deadline is not None and time.monotonic() >= deadline:
                raise TimedOut(
                    f"{self.kind} ({self.id}) is {info['status']} after {timeout:g} s; {_prospect(info)}",
                    future_id=self.id,
                )
        return self._info

    def _keep(self, info: Values) -> Values:
        with self._lock:
            if self._info["status"] not in FINISHED:
                self._info = info
            tell = self._info["status"] in FINISHED and not self._told
            self._told = self._told or tell
        if tell:
            self._on_finished(self._info)
        return self._info

    def _watch(self) -> None:
        try:
            self._wait(None)
        except ClientError as error:
            _log.warning("the callbacks of %s are not called, since waiting for it failed: %s", self.id, error)
            return
        with self._lock:
            waiting, self._callbacks = self._callbacks, []
        for fn in waiting:
            self._call(fn)

    def _call(self, fn: Callable[["Future[Result]"], Any]) -> None:
        try:
            fn(self)
        except Exception:  # noqa: BLE001 - whatever the user's function raises, where nobody would see it
            _log.exception("a callback of %s raised", self.id)


def _prospect(info: Values) -> str:
    """What an operation that has not ended is there for."""
    missing = info.get("waits_for")
    if missing is None:
        return "it goes on: ask again, or wait longer."
    return f"it waits for number {missing}, which has not come: send that, or cancel this one."
