"""The thread that runs operations, one at a time: the models' weights are one thing that all clients share."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from inft.client.errors import (
    ClientError,
    ClientPoisoned,
    Closed,
    InternalError,
    InvalidRequest,
    NotFinite,
    StorageFull,
    as_client_error,
)
from inft.client.operations import (
    FORWARD_BACKWARD,
    LOAD_STATE,
    OPTIM_STEP,
    SAMPLE,
    SAVE_STATE,
    audit_entry,
    check_operation,
    now,
)
from inft.client.residents import Resident, Residents
from inft.client.schedule import OpenOperation, Schedule
from inft.client.store import COMPLETED, FAILED, ClientRow, OperationRow, Store
from inft.training.storage import disk_trouble
from params.client import EngineParams
from params.errors import UserError

logger = logging.getLogger(__name__)

RETRY_S = 1.0  # pause before an outcome that the disk did not take is tried again


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an operation came to: its row with result or error, and what is to be recorded with it."""

    row: OperationRow
    client: dict[str, Any] = field(default_factory=dict)  # columns to set
    artifact: dict[str, Any] | None = None  # a checkpoint's record


class Worker:
    """Runs what the schedule gives; `changed` guards the schedule and wakes both sides."""

    def __init__(
        self, store: Store, residents: Residents, schedule: Schedule, changed: threading.Condition, params: EngineParams
    ) -> None:
        self._store, self._residents, self._schedule = store, residents, schedule
        self._changed, self._params = changed, params
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._stopping = False
        self.failed: Exception | None = None  # what ended the thread before it was told to stop
        self._thread = threading.Thread(target=self._work, name="inft-client", daemon=True)

    def start(self) -> None:
        """Begin to run operations."""
        self._thread.start()

    def stop(self, timeout: float | None) -> bool:
        """Let the running operation end, snapshot every client, and end; False where that takes longer."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function between two operations and return what it returns, or raise what it raises."""
        future: Future[Any] = Future()
        with self._changed:
            if self._stopping or self.failed is not None:
                future.set_exception(Closed("the engine has been closed."))
            else:
                self._calls.append((function, future))
                self._changed.notify_all()
        return future.result()

    def _work(self) -> None:
        try:
            self._work_until_stopped()
        except Exception as error:  # not an operation's: the log itself cannot be read or written
            logger.critical("the engine has stopped", exc_info=error)
            with self._changed:
                self.failed = error
                self._refuse_calls()
                self._schedule.release()
                self._changed.notify_all()
            return
        self._end()

    def _work_until_stopped(self) -> None:
        while True:
            with self._changed:
                operation = None
                while not (self._stopping or self._calls) and (operation := self._schedule.take()) is None:
                    self._changed.wait()
                if self._stopping:
                    break
                call = self._calls.popleft() if self._calls else None
            if call is not None:
                _answer(*call)
            if operation is not None:
                self._run(operation)

    def _refuse_calls(self) -> None:
        while self._calls:
            self._calls.popleft()[1].set_exception(Closed("the engine has been closed."))

    def _end(self) -> None:
        with self._changed:
            self._refuse_calls()
        try:
            self._residents.store_all()
        except (ClientError, UserError, OSError) as error:
            # The log holds everything that the snapshots would have spared running again.
            logger.warning("clients could not be stored at the end: %s", error)

    def _run(self, operation: OpenOperation) -> None:
        outcome = self._outcome(operation)
        row = outcome.row
        details = {"seq": row.seq, **({"error": row.error["code"]} if row.error else {})}
        entry = audit_entry(operation.tenant, row.kind, row.client_id, row.status, details, None)
        try:
            self._store.finish(row, entry, client=outcome.client, artifact=outcome.artifact)
        except StorageFull as error:
            logger.warning("operation %d of %s runs again: %s", row.seq, row.client_id, error)
            self._residents.drop(row.client_id)
            with self._changed:
                self._schedule.give_back(operation)
                self._changed.wait(RETRY_S)
            return
        if "snapshot" in outcome.client:
            self._residents.stands_on(row.client_id, outcome.client["snapshot"])
        with self._changed:
            self._schedule.done(operation)
            operation.finish(row)
            self._changed.notify_all()

    def _outcome(self, operation: OpenOperation) -> Outcome:
        row = operation.row
        client = self._store.client(row.client_id)
        assert client is not None, row.client_id
        columns: dict[str, Any] = {"next_run": row.seq + 1}
        try:
            _refuse_poisoned(client, row)
            resident = self._resident(client, row)
            result, artifact = self._perform(resident, operation)
            resident.applied = row.seq
            columns |= _columns(resident.learner, row)
            if self._needs_snapshot(resident, row, result):
                columns |= self._snapshot(resident, row, result)
        except Exception as error:  # noqa: BLE001 - whatever it was, it is the operation's outcome
            return self._failed(row, error, columns)
        finished = replace(row, status=COMPLETED, finished_at=now(), result=result)
        return Outcome(row=finished, client=columns, artifact=artifact)

    def _failed(self, row: OperationRow, error: Exception, columns: dict[str, Any]) -> Outcome:
        told = _told(error)
        if isinstance(told, NotFinite):
            columns |= {"status": "poisoned", "reason": f"operation {row.seq} ({row.kind}): {told}"}
        if isinstance(told, InternalError | StorageFull):
            logger.warning("operation %d of %s failed", row.seq, row.client_id, exc_info=error)
        if isinstance(told, InternalError | StorageFull | NotFinite):
            self._residents.drop(row.client_id)  # it may have ended half way: what is stored is whole
        return Outcome(row=replace(row, status=FAILED, finished_at=now(), error=told.as_dict()), client=columns)

    def _resident(self, client: ClientRow, row: OperationRow) -> Resident:
        return self._residents.get(client, busy=lambda other: other != row.client_id and self._schedule.busy(other))

    def _perform(self, resident: Resident, operation: OpenOperation) -> tuple[dict[str, Any], dict[str, Any] | None]:
        row, learner = operation.row, resident.learner
        payload = row.payload or {}
        if row.volatile and operation.loss is None:
            raise InvalidRequest(
                "the loss was a function of a process that has ended, so this cannot be run: send it again."
            )
        prepared = operation.prepared
        if prepared is None:
            prepared = check_operation(
                learner.base, learner.config, row.kind, payload, loss=operation.loss, allowed_losses=self._params.losses
            )
        if row.kind == FORWARD_BACKWARD:
            return learner.forward_backward(prepared), None
        if row.kind == OPTIM_STEP:
            return learner.optim_step(payload), None
        if row.kind == SAMPLE:
            return learner.sample(prepared, seed=payload["seed"]), None
        if row.kind == SAVE_STATE:
            return self._save(resident, operation)
        self._residents.load(learner, row)
        return {"loaded_artifact_id": payload["artifact_id"], "step": learner.step}, None

    def _save(self, resident: Resident, operation: OpenOperation) -> tuple[dict[str, Any], dict[str, Any]]:
        row = operation.row
        artifact_id = artifact_of(row)
        try:
            figures = self._residents.save(resident, row, artifact_id)
        except UserError as error:
            raise StorageFull(str(error)) from error
        record = {"id": artifact_id, "tenant": operation.tenant, "client_id": row.client_id, **figures}
        record |= {"created_at": row.created_at, "metadata": dict((row.payload or {}).get("metadata") or {})}
        return {"artifact_id": artifact_id, **figures, "created_at": row.created_at}, record

    def _needs_snapshot(self, resident: Resident, row: OperationRow, result: Mapping[str, Any]) -> bool:
        if row.volatile or row.kind == LOAD_STATE:
            return True
        if row.kind != OPTIM_STEP or not result["applied"]:
            return False
        # Noise is never drawn twice for one step: the second draw would be a second release.
        private = resident.learner.config.dp is not None
        return private or resident.learner.step - resident.snapshot_step >= self._params.snapshot_steps

    def _snapshot(self, resident: Resident, row: OperationRow, result: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self._residents.snapshot(row.client_id, row.seq)
        except UserError as error:
            if row.volatile or resident.learner.config.dp is not None:
                raise StorageFull(str(error)) from error
            logger.warning("no snapshot of %s: %s", row.client_id, error)  # the log is kept until there is one
            return {}


def artifact_of(row: OperationRow) -> str:
    """The id of the checkpoint that a save_state writes: known before it runs, the same when it is run again."""
    return f"art-{row.id.partition('-')[2]}"


def _answer(function: Callable[[], Any], future: "Future[Any]") -> None:
    try:
        future.set_result(function())
    except Exception as error:  # noqa: BLE001 - raised where the call was made
        future.set_exception(error)


def _refuse_poisoned(client: ClientRow, row: OperationRow) -> None:
    if client.status == "poisoned" and row.kind != LOAD_STATE:
        raise ClientPoisoned(
            f"the client is poisoned since {client.reason} Load a checkpoint with load_state, or start a new client."
        )


def _columns(learner: Any, row: OperationRow) -> dict[str, Any]:
    """What an operation made of the client's row."""
    columns: dict[str, Any] = {"step": learner.step}
    if row.kind == LOAD_STATE:
        columns |= {"status": "active", "reason": ""}
    if learner.config.dp is not None and row.kind in (OPTIM_STEP, LOAD_STATE):
        columns["dp_metrics"] = learner.dp_metrics()
    return columns


def _told(error: Exception) -> ClientError:
    import torch

    reason = disk_trouble(error)
    if reason is not None and not isinstance(error, UserError):
        return StorageFull(f"it could not be written: {reason}. Free space in state_dir.")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return InternalError(
            "out of memory: send fewer or shorter rows in a forward_backward and accumulate.", type="OutOfMemory"
        )
    return as_client_error(error)
