"""The engine of the training client: who may do what, in which order, and what becomes of it after a crash.

It knows neither HTTP nor the SDK. Every method takes the tenant first; what belongs to another tenant does not exist.
An operation is accepted when `submit` returns: it then runs once, in the order of its client's numbers, also when the
process is killed meanwhile. Values in and out are plain JSON ones.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from inft.client.bases import Bases
from inft.client.clients import Clients
from inft.client.errors import (
    Closed,
    Conflict,
    InternalError,
    InvalidRequest,
    NotFound,
    QueueFull,
    RateLimited,
    error_of,
)
from inft.client.operations import (
    FORWARD_BACKWARD,
    LOAD_STATE,
    as_run,
    audit_entry,
    canonical,
    check_operation,
    digest,
    has_images,
    new_id,
    now,
    refuse_too_many,
)
from inft.client.residents import Residents
from inft.client.running import Running
from inft.client.schedule import OpenOperation, Schedule, future_info
from inft.client.store import CANCELLED, OPEN, ClientRow, OperationRow, Store
from inft.client.worker import Worker
from inft.training.storage import locked
from params.client import EngineParams, TrainingConfig
from params.errors import UserError

logger = logging.getLogger(__name__)

LOCAL = "local"  # the tenant in process, and of a service without keys
FURTHEST = 10_000  # how far ahead of the next number one may arrive
RETRY_AFTER_S = 1.0  # what a client is told to wait when the queue is full

Values = dict[str, Any]


class Engine:
    """Training clients of many tenants on models that are loaded once, at their first use or, with `preload`, here.

    Errors: UserError where the state directory is in use, is no directory, or cannot be read.
    """

    def __init__(self, params: EngineParams | None = None, *, preload: bool = False) -> None:
        self.params = params or EngineParams()
        self.directory = Path(self.params.state_dir).expanduser()
        if find_spec("peft") is None:
            raise UserError("the training client needs the package peft: pip install 'inft[client]'.")
        self._changed = threading.Condition(threading.RLock())
        self._closing = False
        self._deleting: set[str] = set()  # clients that are being deleted
        with ExitStack() as opening:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"state_dir {self.directory} cannot be made: {error.strerror}.") from error
            opening.enter_context(locked(self.directory, doing="running training clients in", setting="state_dir"))
            self._store = Store(self.directory, durable=self.params.durable)
            opening.callback(self._store.close)
            self._bases = Bases(self.params)
            for name in self.params.models if preload else ():
                self._bases.get(name)
            self._residents = Residents(self._store, self._bases, self.directory, self.params)
            self._schedule = Schedule()
            running = Running(self.directory)
            opening.callback(running.close)
            self._recover(running)
            self._worker = Worker(self._store, self._residents, self._schedule, self._changed, self.params, running)
            self._clients = Clients(self._store, self._bases, self._residents, self._worker, self.params)
            self._resources = opening.pop_all()
        self._worker.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self, timeout: float | None = None) -> None:
        """Finish the running operation, snapshot every client and release the directory; the rest stays in the log.

        Whoever waits gets the operation as it is. After `timeout` seconds the directory is left as a crash would leave
        it, which loses nothing either.
        """
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        ended = self._worker.stop(timeout)
        with self._changed:
            self._schedule.release()
        if ended:
            self._resources.close()
        else:
            logger.warning("an operation is still running: it is run again when the engine is started again.")

    def _recover(self, running: Running) -> None:
        """Put what was accepted and has no outcome back in line."""
        ended_in = running.left_over()
        if ended_in is not None:
            self._store.count_attempt(ended_in)
            running.set(None)
        for client in self._store.clients_with_open_operations():
            self._line(client)
            for row in self._store.operations(client.id, after=client.next_run - 1, status=OPEN):
                self._schedule.add(OpenOperation(row=row, tenant=client.tenant))

    def _line(self, client: ClientRow) -> None:
        if self._schedule.knows(client.id):
            return
        line = self._schedule.line(client.id, next_run=client.next_run)
        rows = self._store.operations(client.id, after=client.next_run - 1)
        # Cancelled ones; and those that have run where a cancelled one's record came later than theirs.
        line.skipped |= {row.seq for row in rows if row.status != OPEN}
        line.advance()

    # Models and clients

    def create_client(
        self, tenant: str, config: Mapping[str, Any] | TrainingConfig, *, request_id: str | None = None
    ) -> Values:
        """Return the ClientInfo of a new client; its model is loaded where it is not yet.

        The same `request_id` once more gives the same client: its answer may have been lost.
        Errors: UserError for a configuration, a model or targets that are not right; Conflict for a `request_id` that
        made a client with another configuration, and where the tenant has as many clients as it may.
        """
        self._refuse_when_closing()
        return self._clients.create(tenant, config, request_id)

    def get_client(self, tenant: str, client_id: str) -> Values:
        """Return a client's ClientInfo. Errors: NotFound."""
        return self._clients.info(self._clients.row(tenant, client_id))

    def list_clients(self, tenant: str) -> list[Values]:
        """Return the tenant's clients, oldest first."""
        return self._clients.of_tenant(tenant)

    def delete_client(self, tenant: str, client_id: str, *, request_id: str | None = None) -> None:
        """Remove a client with its log; its checkpoints stay.

        Errors: NotFound; Conflict while operations of it are open.
        """
        row = self._clients.row(tenant, client_id)
        with self._changed:
            self._refuse_when_closing()
            if self._schedule.busy(client_id):
                raise Conflict(f"client {client_id} has operations that have not ended: wait for them, or cancel them.")
            self._schedule.forget(client_id)
            self._deleting.add(client_id)  # nothing is accepted from here on
        try:
            self._clients.delete(row, request_id)
        finally:
            with self._changed:
                self._deleting.discard(client_id)

    # Operations

    def submit(
        self,
        tenant: str,
        client_id: str,
        kind: str,
        payload: Mapping[str, Any],
        *,
        seq: int | None = None,
        request_id: str | None = None,
        loss: Callable[..., Any] | None = None,
    ) -> Values:
        """Accept an operation and return its FutureInfo; the same number and payload once more give the same answer.

        `seq` is its number in the client's order, by default the next one; it may arrive before smaller ones. `loss` is
        a function of this process in the place of a name.
        Errors: NotFound; Conflict for a number that another payload has; InvalidRequest and other UserErrors of the
        payload, which do not use up the number; RateLimited, QueueFull and Closed.
        """
        client = self._clients.row(tenant, client_id)
        text = canonical(payload)
        known = digest(kind, text, loss)
        if seq is not None and (before := self._repeated(client, seq, known)):
            return before
        self._refuse_when_closing()
        self._refuse_when_full(client, seq)
        prepared = self._checked(client, kind, payload, loss)
        if has_images(payload):
            prepared = None  # decoded images take a thousand times their file: they are decoded again when it is run
        with self._changed:
            if seq is not None and (before := self._repeated(client, seq, known)):  # one that came meanwhile
                return before
            self._refuse_when_closing()
            self._refuse_when_full(client, seq)
            if client_id in self._deleting:
                raise NotFound(f"there is no training client {client_id!r:.80}.")
            self._line(self._clients.row(tenant, client_id))
            number = self._number(client, seq)
            row = OperationRow(
                id=new_id("fut"),
                client_id=client_id,
                seq=number,
                kind=kind,
                payload=as_run(kind, payload),
                digest=known,
                volatile=loss is not None,
                created_at=now(),
            )
            details = {"seq": number, "payload_sha256": known}
            self._store.accept(row, audit_entry(tenant, kind, client_id, "accepted", details, request_id))
            operation = OpenOperation(row=row, tenant=tenant, prepared=prepared, loss=loss)
            self._schedule.add(operation)
            self._schedule.try_again(client_id)
            self._changed.notify_all()
            return self._open_info(operation)

    def _repeated(self, client: ClientRow, seq: int, known: str) -> Values | None:
        row = self._store.operation_at(client.id, seq) if isinstance(seq, int) and 0 < seq < 2**63 else None
        if row is None:
            return None
        if row.digest != known:
            raise Conflict(
                f"number {seq} of client {client.id} is a {row.kind} that was sent with other contents. Another "
                "program may be driving this client: refresh it and go on with next_seq.",
                next_seq=self._store.last_seq(client.id) + 1,
            )
        return self.future(client.tenant, row.id)

    def _checked(
        self, client: ClientRow, kind: str, payload: Mapping[str, Any], loss: Callable[..., Any] | None
    ) -> Any:
        config = self._clients.config(client)
        base = self._clients.base(config)
        if kind == LOAD_STATE and isinstance(payload.get("artifact_id"), str):
            self.artifact(client.tenant, payload["artifact_id"])
        prepared = check_operation(base, config, kind, payload, loss=loss, allowed_losses=self.params.losses)
        if kind == FORWARD_BACKWARD:
            refuse_too_many(prepared.model_batch.batch.input_ids_BT.numel(), self.params.max_batch_tokens)
        return prepared

    def _number(self, client: ClientRow, seq: int | None) -> int:
        if seq is None:
            return self._store.last_seq(client.id) + 1
        line = self._schedule.line(client.id)
        if isinstance(seq, bool) or not isinstance(seq, int) or not 0 < seq <= line.next_run + FURTHEST:
            raise InvalidRequest(
                f"seq is {seq!r:.40}: the next number to run is {line.next_run}, and one may be at most {FURTHEST} "
                "ahead."
            )
        if seq < line.next_run:  # cancelled numbers have rows, so this one was passed over by a restart of counting
            raise Conflict(f"number {seq} is past: the next number is {self._store.last_seq(client.id) + 1}.")
        return seq

    def future(self, tenant: str, future_id: str) -> Values:
        """Return the FutureInfo of an operation. Errors: NotFound."""
        with self._changed:
            operation = self._schedule.get(future_id)
            if operation is not None and operation.tenant == tenant:
                return self._open_info(operation)
        row = self._store.operation(future_id)
        client = None if row is None else self._store.client(row.client_id)
        if row is None or client is None or client.tenant != tenant:
            raise NotFound(f"there is no future {future_id!r:.80}.")
        return future_info(row, row.status)

    def wait(self, tenant: str, future_id: str, timeout: float) -> Values:
        """Return the FutureInfo when the operation has ended, or as it is after `timeout` seconds or at closing.

        Errors: NotFound; ClientUnavailable where its client cannot be brought back now; InternalError where the engine
        has stopped.
        """
        with self._changed:
            operation = self._schedule.get(future_id)
        if operation is not None and operation.tenant == tenant:
            operation.ended.wait(timeout)
            if operation.outcome is not None:
                return future_info(operation.outcome, operation.outcome.status)
            self._refuse_when_failed()
            with self._changed:
                parked = self._schedule.parked(operation.row.client_id)
            if parked is not None:
                raise error_of(parked.as_dict())
        return self.future(tenant, future_id)

    def cancel(self, tenant: str, future_id: str) -> bool:
        """Take back an operation that has not begun, and say whether it was; its number then counts as done."""
        self.future(tenant, future_id)
        with self._changed:
            operation = self._schedule.get(future_id)
            if operation is None or operation.running:
                return False
            row = replace(
                operation.row,
                status=CANCELLED,
                finished_at=now(),
                error={"code": "cancelled", "message": "it was cancelled before it ran.", "details": {}},
            )
            entry = audit_entry(tenant, "cancel", row.client_id, "completed", {"seq": row.seq}, None)
            self._store.finish(row, entry, client={})
            self._schedule.cancelled(operation)
            operation.finish(row)
            self._changed.notify_all()
            return True

    def _open_info(self, operation: OpenOperation) -> Values:
        if operation.running:
            return future_info(operation.row, "running")
        missing = self._schedule.waits_for(operation)
        return future_info(operation.row, "queued" if missing is None else "waiting", waits_for=missing)

    # Checkpoints, audit, health

    def artifact(self, tenant: str, artifact_id: str) -> Values:
        """Return what is known of a checkpoint. Errors: NotFound."""
        found = self._store.artifact(artifact_id)
        if found is None or found.pop("tenant") != tenant:
            raise NotFound(f"there is no artifact {artifact_id!r:.80}.")
        return {"artifact_id": found.pop("id"), **found}

    def artifact_path(self, tenant: str, artifact_id: str) -> Path:
        """Return the directory of a checkpoint. Errors: NotFound."""
        return self._residents.artifact_path(self.artifact(tenant, artifact_id)["artifact_id"])

    def audit_logs(self, tenant: str, *, after: int = 0, limit: int = 100) -> list[Values]:
        """Return the tenant's audit entries after a number, oldest first."""
        return self._store.audit_entries(tenant, after=after, limit=limit)

    def record(
        self, tenant: str, action: str, target: str, outcome: str, details: Mapping[str, Any], request_id: str | None
    ) -> None:
        """Append an audit entry for what was refused before it reached the engine."""
        self._store.audit(audit_entry(tenant, action, target, outcome, details, request_id))

    def health(self) -> Values:
        """Return the state of the service; nothing of it tells of a tenant."""
        with self._changed:
            pending = len(self._schedule)
        return {
            "status": "failed" if self._worker.failed else "closing" if self._closing else "ok",
            "pending": pending,
            "resident_clients": len(self._residents),
            "models": self._bases.names(),
            "version": version("inft"),
        }

    def _refuse_when_failed(self) -> None:
        if self._worker.failed is not None:
            raise InternalError(
                f"the engine has stopped on a fault of the machine or of ours ({self._worker.failed}): start it again; "
                "what it accepted is kept.",
                type=type(self._worker.failed).__name__,
            )

    def _refuse_when_closing(self) -> None:
        self._refuse_when_failed()
        if self._closing:
            raise Closed("the engine is shutting down: what it has accepted runs when it is started again.")

    def _refuse_when_full(self, client: ClientRow, seq: int | None) -> None:
        with self._changed:
            if seq is not None and self._schedule.lacks(client.id, seq):
                return  # the others of its client wait for it: refused, they would never make room
        if self._schedule.pending(client.tenant) >= self.params.max_pending_per_tenant:
            raise RateLimited(
                f"{self.params.max_pending_per_tenant} operations of this tenant are waiting: wait for results.",
                retry_after=RETRY_AFTER_S,
            )
        if len(self._schedule) >= self.params.max_pending:
            raise QueueFull(
                f"{self.params.max_pending} operations are waiting: try again later.", retry_after=RETRY_AFTER_S
            )
