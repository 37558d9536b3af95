"""What the SDK asks of an engine, wherever that is: plain JSON values in and out, no number of a retry seen twice."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from inft.client.errors import NotFound

Values = dict[str, Any]
FINISHED = ("completed", "failed", "cancelled")  # states of an operation that do not change any more
_PLAIN_ID = re.compile(r"[A-Za-z0-9_-]+")


class Transport(Protocol):
    """An engine in this process or a service elsewhere, for one tenant.

    Errors: those of inft.client.errors; a request that was refused has changed nothing.
    """

    def create_client(self, config: Values) -> Values:
        """Return ClientInfo of a new training client."""

    def get_client(self, client_id: str) -> Values:
        """Return ClientInfo."""

    def delete_client(self, client_id: str) -> None:
        """Delete a training client that has nothing open."""

    def list_clients(self) -> list[Values]:
        """Return ClientInfo of all training clients of this tenant."""

    def submit(self, client_id: str, kind: str, payload: Values, *, loss: Callable[..., Any] | None = None) -> Values:
        """Return FutureInfo of the operation, which is the client's next one."""

    def future(self, future_id: str) -> Values:
        """Return FutureInfo as it is now."""

    def wait(self, future_id: str, timeout: float | None) -> Values:
        """Return FutureInfo when the operation has finished, or as it is after `timeout` seconds."""

    def cancel(self, future_id: str) -> bool:
        """Return whether the operation had not begun and now never will."""

    def audit_logs(self, after: int, limit: int) -> list[Values]:
        """Return entries of this tenant with numbers above `after`."""

    def pull(self, artifact_id: str, directory: Path) -> Mapping[str, Any]:
        """Put the files of a checkpoint into `directory`, which is empty, and return the artifact's info."""

    def close(self) -> None:
        """Let go of the engine or the connections; called once."""


def plain_id(identifier: str) -> str:
    """Return an id that can stand in a path; NotFound for what is none, since it could name another place."""
    if not isinstance(identifier, str) or not _PLAIN_ID.fullmatch(identifier):
        raise NotFound(f"there is no {identifier!r:.80}.")
    return identifier
