"""The thread that runs operations, one at a time: the models' weights are one thing that all clients share."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from inft.client.errors import (
    ClientError,
    ClientPoisoned,
    ClientUnavailable,
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
from inft.client.running import Running
from inft.client.schedule import OpenOperation, Schedule
from inft.client.store import COMPLETED, FAILED, ClientRow, OperationRow, Store
from inft.training.hardware import is_out_of_memory
from inft.training.storage import disk_trouble
from params.client import EngineParams
from params.errors import UserError

logger = logging.getLogger(__name__)

OPERATIONS_A_STEP = 4  # as many operations without a step count as one, for the interval between snapshots
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
        self,
        store: Store,
        residents: Residents,
        schedule: Schedule,
        changed: threading.Condition,
        params: EngineParams,
        running: Running,
    ) -> None:
        self._store, self._residents, self._schedule, self._running = store, residents, schedule, running
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
        self._residents.store_all()

    def _recorded(self, outcome: Outcome, entry: Mapping[str, Any]) -> bool:
        """Whether the log has taken the outcome; not so while the disk is full."""
        try:
            self._store.finish(outcome.row, entry, client=outcome.client, artifact=outcome.artifact)
        except StorageFull as error:
            logger.warning("the outcome of operation %d waits for the disk: %s", outcome.row.seq, error)
            return False
        return True

    def _run(self, operation: OpenOperation) -> None:
        self._running.set(operation.row.id)
        try:
            self._run_and_record(operation)
        finally:
            self._running.set(None)

    def _run_and_record(self, operation: OpenOperation) -> None:
        try:
            outcome = self._outcome(operation)
        except ClientUnavailable as error:
            logger.warning("client %s waits: %s", operation.row.client_id, error)
            with self._changed:
                self._schedule.park(operation, error)
            return
        row = outcome.row
        details = {"seq": row.seq, **({"error": row.error["code"]} if row.error else {})}
        entry = audit_entry(operation.tenant, row.kind, row.client_id, row.status, details, None)
        while not self._recorded(outcome, entry):
            with self._changed:
                if self._changed.wait_for(lambda: self._stopping, RETRY_S):
                    self._residents.drop(row.client_id)  # it runs again at the next start
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
        resident = None
        try:
            self._refuse_deadly(row)
            _refuse_poisoned(client, row)
            self._refuse_half_a_batch(client, row)
            resident = self._resident(client, row)
            result, artifact = self._perform(resident, operation)
            resident.applied = row.seq
            columns |= _columns(resident.learner, row)
            if self._needs_snapshot(resident, client, row, result):
                columns |= self._snapshot(resident, row)
        except ClientUnavailable:
            raise
        except (Exception, SystemExit) as error:
            if _is_of_the_device(error):
                raise
            return self._failed(row, error, resident)
        finished = replace(row, status=COMPLETED, finished_at=now(), result=result)
        return Outcome(row=finished, client=columns, artifact=artifact)

    def _refuse_deadly(self, row: OperationRow) -> None:
        """Refuse what has ended the process again and again, so that the others can run."""
        if row.attempts >= self._params.max_attempts:
            raise InternalError(
                f"the process has ended {row.attempts} times while this ran, so it is not tried again: send fewer or "
                "shorter rows, should memory be the reason.",
                attempts=row.attempts,
            )

    def _refuse_half_a_batch(self, client: ClientRow, row: OperationRow) -> None:
        """Refuse a private step after a forward_backward that failed: it would spend the budget on noise alone."""
        if row.kind != OPTIM_STEP or client.dp_metrics is None:
            return
        before, kind, status = self._store.last_change(row.client_id, row.seq)
        if kind == FORWARD_BACKWARD and status == FAILED:
            raise InvalidRequest(
                f"forward_backward number {before} failed, so its rows are not in this step, which would spend "
                "privacy without them. Send them again and then optim_step; or optim_step once more, for a step "
                "without them."
            )

    def _failed(self, row: OperationRow, error: BaseException, resident: Resident | None) -> Outcome:
        told = _told(error)
        columns: dict[str, Any] = {"next_run": row.seq + 1}
        if isinstance(told, NotFinite):
            columns |= {"status": "poisoned", "reason": f"operation {row.seq} ({row.kind}): {told}"}
        if isinstance(told, InternalError | StorageFull):
            logger.warning("operation %d of %s failed", row.seq, row.client_id, exc_info=error)
        if isinstance(told, InternalError | StorageFull | NotFinite) or (resident and resident.learner.half_way):
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
        if prepared is None and row.kind != LOAD_STATE:
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
            raise StorageFull(self._residents.without_place(error)) from error
        record = {"id": artifact_id, "tenant": operation.tenant, "client_id": row.client_id, **figures}
        record |= {"created_at": row.created_at, "metadata": dict((row.payload or {}).get("metadata") or {})}
        return {"artifact_id": artifact_id, **figures, "created_at": row.created_at}, record

    def _needs_snapshot(
        self, resident: Resident, client: ClientRow, row: OperationRow, result: Mapping[str, Any]
    ) -> bool:
        if row.volatile or row.kind == LOAD_STATE:
            return True
        if row.seq - client.snapshot_seq >= self._params.snapshot_steps * OPERATIONS_A_STEP:
            return True
        if row.kind != OPTIM_STEP or not result["applied"]:
            return False
        # Noise is never drawn twice for one step: the second draw would be a second release.
        private = resident.learner.config.dp is not None
        return private or resident.learner.step - resident.snapshot_step >= self._params.snapshot_steps

    def _snapshot(self, resident: Resident, row: OperationRow) -> dict[str, Any]:
        try:
            return self._residents.snapshot(row.client_id, row.seq)
        except UserError as error:
            if row.volatile or resident.learner.config.dp is not None:
                raise StorageFull(self._residents.without_place(error)) from error
            logger.warning("no snapshot of %s: %s", row.client_id, error)  # the log is kept until there is one
            return {}


def artifact_of(row: OperationRow) -> str:
    """The id of the checkpoint that a save_state writes: known before it runs, the same when it is run again."""
    return f"art-{row.id.partition('-')[2]}"


def _answer(function: Callable[[], Any], future: "Future[Any]") -> None:
    try:
        future.set_result(function())
    except (Exception, SystemExit) as error:  # noqa: BLE001 - raised where the call was made
        future.set_exception(error)


def _refuse_poisoned(client: ClientRow, row: OperationRow) -> None:
    if client.status == "poisoned" and row.kind in (FORWARD_BACKWARD, OPTIM_STEP):
        raise ClientPoisoned(
            f"the client is poisoned since {client.reason} Its weights are those before: save_state keeps them, and "
            "load_state of this or another checkpoint lets it train again."
        )


def _columns(learner: Any, row: OperationRow) -> dict[str, Any]:
    """What an operation made of the client's row."""
    columns: dict[str, Any] = {"step": learner.step}
    if row.kind == LOAD_STATE:
        columns |= {"status": "active", "reason": ""}
    if learner.config.dp is not None and row.kind in (OPTIM_STEP, LOAD_STATE):
        columns["dp_metrics"] = learner.dp_metrics()
    return columns


def _is_of_the_device(error: BaseException) -> bool:
    """Whether nothing can run on the device any more, until the process is started again."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def _told(error: BaseException) -> ClientError:
    reason = disk_trouble(error)
    if reason is not None and not isinstance(error, UserError):
        return StorageFull(f"it could not be written: {reason}. Free space in state_dir.")
    if is_out_of_memory(error):
        return InternalError(
            "out of memory: send fewer or shorter rows in a forward_backward and accumulate.", type="OutOfMemory"
        )
    if not isinstance(error, Exception):
        return InternalError(f"it ended with {type(error).__name__}: {error}", type=type(error).__name__)
    return as_client_error(error)
