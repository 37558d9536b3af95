"""What the routes share: the engine, called in threads of their own; long polls; and the record of refusals."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request

from inft.client.api.auth import Keys
from inft.client.api.limits import Limiter
from inft.client.errors import ClientError
from params.client import ServeParams

if TYPE_CHECKING:
    from inft.client.engine import Engine

WORKERS = 16  # calls of the engine at once
PLACES = 64  # long polls that wait at once; more of them take turns
SLICE = 0.25  # seconds that a long poll waits before it looks whether its client is still there
SHORTEST_SLICE = 0.02  # seconds
FINISHED = ("completed", "failed", "cancelled")
PARSED_AT_ONCE = 2  # large bodies; each holds the interpreter while it is read, and many times its size in memory
MOST_TARGET = 200  # characters of a path in the audit log

Result = TypeVar("Result")
Values = dict[str, Any]
logger = logging.getLogger(__name__)


class Service:
    """One service: an engine, who may use it, and how much of it."""

    def __init__(self, engine: "Engine", params: ServeParams, keys: Keys | None) -> None:
        self.engine, self.params, self.keys = engine, params, keys
        self.tenants = Limiter(rate=params.rate_limit, burst=params.rate_burst)
        self.addresses = Limiter(rate=params.rate_limit, burst=params.rate_burst)
        self.waiting = 0  # long polls that are open
        self.parsing = asyncio.Semaphore(PARSED_AT_ONCE)
        self.closing = False  # long polls are answered at once
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="inft-http")
        self._places = ThreadPoolExecutor(PLACES, thread_name_prefix="inft-poll")

    def close(self) -> None:
        """Let the threads end; what they are doing is finished by them."""
        self.closing = True
        self._workers.shutdown(wait=False)
        self._places.shutdown(wait=False)

    async def call(self, work: Callable[[], Result]) -> Result:
        """Return what `work`, which may block, returns."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    async def finished(self, request: Request, tenant: str, future_id: str, seconds: float) -> Values:
        """Return FutureInfo when the operation has finished, or as it is after `seconds`.

        Ends early where the client is gone or the service closes.
        """
        deadline = time.monotonic() + min(seconds, self.params.max_wait_s)
        self.waiting += 1
        try:
            while True:
                # With more polls than places each waits for less, so that nobody's turn is longer off than SLICE.
                share = max(SHORTEST_SLICE, SLICE * min(1.0, PLACES / self.waiting))
                timeout = max(0.0, min(share, deadline - time.monotonic()))
                info = await asyncio.get_running_loop().run_in_executor(
                    self._places, self.engine.wait, tenant, future_id, timeout
                )
                over = self.closing or time.monotonic() >= deadline
                if info["status"] in FINISHED or over or await request.is_disconnected():
                    return info
        finally:
            self.waiting -= 1

    async def record_refusal(self, tenant: str, action: str, path: str, error: ClientError, request_id: str) -> None:
        """Put a refused request into the tenant's audit log: what was asked and the code, none of its contents."""
        details = {"status": error.status, "code": error.code}
        try:
            await self.call(
                lambda: self.engine.record(tenant, action, path[:MOST_TARGET], "refused", details, request_id)
            )
        except ClientError as trouble:  # the log is closed or full: the refusal itself still holds
            logger.warning("a refusal of request %s could not be recorded: %s", request_id, trouble.code)
