"""Which operation runs next: each client's in the order of their numbers, clients in turn.

Pure: it holds what is open in memory and knows neither SQLite nor threads. A number that was cancelled counts as done.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from inft.client.errors import ClientError
from inft.client.store import OperationRow


@dataclass(eq=False, kw_only=True)
class OpenOperation:
    """An accepted operation that has no outcome yet."""

    row: OperationRow
    tenant: str
    prepared: Any = None  # what validation made of the payload; None after a restart
    loss: Callable[..., Any] | None = None  # a user's own function, in process only
    running: bool = False
    outcome: OperationRow | None = None  # the row with result or error, once it has ended
    ended: threading.Event = field(default_factory=threading.Event)

    def finish(self, outcome: OperationRow) -> None:
        """Set the outcome and wake whoever waits for it."""
        self.outcome = outcome
        self.ended.set()


@dataclass(eq=False, kw_only=True)
class Line:
    """The open operations of one client."""

    next_run: int  # every smaller number is done
    open: dict[int, OpenOperation] = field(default_factory=dict)
    skipped: set[int] = field(default_factory=set)  # cancelled numbers from next_run on
    parked: ClientError | None = None  # why the client cannot be brought back: nothing of it runs until it is tried

    def advance(self) -> None:
        """Pass the numbers that were cancelled."""
        while self.next_run in self.skipped:
            self.skipped.discard(self.next_run)
            self.next_run += 1


class Schedule:
    """The lines of all clients."""

    def __init__(self) -> None:
        self._lines: dict[str, Line] = {}
        self._turns: OrderedDict[str, None] = OrderedDict()  # clients with open operations, whose turn is next first
        self._by_id: dict[str, OpenOperation] = {}
        self._per_tenant: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def pending(self, tenant: str) -> int:
        """The number of a tenant's open operations."""
        return self._per_tenant.get(tenant, 0)

    def line(self, client_id: str, *, next_run: int = 1) -> Line:
        """A client's line; a new one stands at `next_run`."""
        if client_id not in self._lines:
            self._lines[client_id] = Line(next_run=next_run)
        return self._lines[client_id]

    def lacks(self, client_id: str, seq: int) -> bool:
        """Whether that number is the one that a client's open operations wait for."""
        line = self._lines.get(client_id)
        return line is not None and bool(line.open) and line.next_run == seq and seq not in line.open

    def knows(self, client_id: str) -> bool:
        """Whether the client has a line."""
        return client_id in self._lines

    def forget(self, client_id: str) -> None:
        """Drop the line of a client without open operations."""
        self._lines.pop(client_id, None)

    def busy(self, client_id: str) -> bool:
        """Whether the client has open operations."""
        return client_id in self._lines and bool(self._lines[client_id].open)

    def get(self, operation_id: str) -> OpenOperation | None:
        """An open operation by its id."""
        return self._by_id.get(operation_id)

    def add(self, operation: OpenOperation) -> None:
        """Put an accepted operation in its client's line."""
        row = operation.row
        self.line(row.client_id).open[row.seq] = operation
        self._by_id[row.id] = operation
        self._turns.setdefault(row.client_id)
        self._per_tenant[operation.tenant] = self.pending(operation.tenant) + 1

    def take(self) -> OpenOperation | None:
        """The next operation to run, marked as running; None where all wait for earlier numbers or there is none."""
        for client_id in self._turns:
            line = self._lines[client_id]
            operation = line.open.get(line.next_run)
            if operation is not None and not operation.running and line.parked is None:
                operation.running = True
                self._turns.move_to_end(client_id)
                return operation
        return None

    def give_back(self, operation: OpenOperation) -> None:
        """Make a taken operation wait again."""
        operation.running = False

    def park(self, operation: OpenOperation, reason: ClientError) -> None:
        """Let a client's operations wait, the taken one too, and wake who waits for them: they are told the reason."""
        self.give_back(operation)
        line = self._lines[operation.row.client_id]
        line.parked = reason
        for waiting in line.open.values():
            waiting.ended.set()

    def try_again(self, client_id: str) -> None:
        """Let a parked client's operations run again."""
        line = self._lines.get(client_id)
        if line is None or line.parked is None:
            return
        line.parked = None
        for waiting in line.open.values():
            waiting.ended.clear()

    def parked(self, client_id: str) -> ClientError | None:
        """Why a client's operations wait; None where they do not."""
        line = self._lines.get(client_id)
        return None if line is None else line.parked

    def done(self, operation: OpenOperation) -> None:
        """Take the operation that ran out of its line."""
        line = self._remove(operation)
        line.next_run = operation.row.seq + 1
        line.advance()

    def cancelled(self, operation: OpenOperation) -> None:
        """Take an operation that will not run out of its line."""
        line = self._remove(operation)
        line.skipped.add(operation.row.seq)
        line.advance()

    def release(self) -> None:
        """Wake whoever waits for an operation that will not run now."""
        for operation in self._by_id.values():
            operation.ended.set()

    def _remove(self, operation: OpenOperation) -> Line:
        line = self._lines[operation.row.client_id]
        del line.open[operation.row.seq], self._by_id[operation.row.id]
        self._per_tenant[operation.tenant] -= 1
        if not line.open:
            del self._turns[operation.row.client_id]
        return line

    def waits_for(self, operation: OpenOperation) -> int | None:
        """The first number before it that has not arrived; None where all have."""
        line = self._lines[operation.row.client_id]
        earlier = range(line.next_run, operation.row.seq)
        return next((seq for seq in earlier if seq not in line.open and seq not in line.skipped), None)


def future_info(row: OperationRow, status: str, *, waits_for: int | None = None) -> dict[str, Any]:
    """Return the FutureInfo of an operation; `waits_for` is the first number before it that has not arrived."""
    return {
        "id": row.id,
        "client_id": row.client_id,
        "kind": row.kind,
        "seq": row.seq,
        "status": status,
        "waits_for": waits_for,
        "created_at": row.created_at,
        "finished_at": row.finished_at,
        "result": row.result,
        "error": row.error,
    }
