"""Clients in memory: brought back from snapshot and log, snapshotted, and put away when others need the room.

Used by the engine's worker thread alone. A snapshot is a directory of the form of a checkpoint, with the accumulated
gradient; a client's state is its snapshot (or its configuration) and the operations after it, run again in order.
"""

import logging
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inft.client.bases import Base, Bases
from inft.client.checkpoints import Checkpoint, check_fits, read_checkpoint, write_checkpoint
from inft.client.errors import ClientUnavailable, Conflict, InternalError, InvalidRequest
from inft.client.learner import Learner
from inft.client.operations import CHANGING, FORWARD_BACKWARD, LOAD_STATE, OPTIM_STEP, check_operation
from inft.client.store import COMPLETED, ClientRow, OperationRow, Store
from inft.training.storage import remove, remove_leftovers, staged
from params.client import EngineParams
from params.client_resolve import training_config
from params.errors import UserError

logger = logging.getLogger(__name__)

SNAPSHOTS, ARTIFACTS = "snapshots", "artifacts"  # directories in state_dir


@dataclass(eq=False, kw_only=True)
class Resident:
    """A client in memory."""

    learner: Learner
    applied: int  # number of the last operation in its state
    snapshot: str | None  # name of the directory it stands on
    snapshot_step: int

    def dirty(self, stored: int) -> bool:
        """Whether operations after the snapshot's have run."""
        return self.applied > stored


class Residents:
    """The clients in memory, the one used last at the end."""

    def __init__(self, store: Store, bases: Bases, directory: Path, params: EngineParams) -> None:
        self._store, self._bases, self._params = store, bases, params
        self._snapshots = directory / SNAPSHOTS
        self._artifacts = directory / ARTIFACTS
        for folder in (self._snapshots, self._artifacts):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
        self._remove_unused()
        self._residents: OrderedDict[str, Resident] = OrderedDict()

    def __len__(self) -> int:
        return len(self._residents)

    def _remove_unused(self) -> None:
        """Remove snapshots and checkpoints that no record names: their commit never came, nothing of them was told."""
        for folder, used in (
            (self._snapshots, self._store.snapshots()),
            (self._artifacts, self._store.wanted_artifacts()),
        ):
            for path in folder.iterdir():
                if path.name not in used:
                    remove(path)

    def artifact_path(self, artifact_id: str) -> Path:
        """Where a checkpoint of that id, which is one of ours, lies."""
        return self._artifacts / artifact_id

    def create(self, row: ClientRow) -> Learner:
        """Make a new client's learner and keep it."""
        self._make_room(lambda client_id: False)
        learner = Learner(self._base(row), row.id, training_config(row.config))
        self._residents[row.id] = Resident(learner=learner, applied=0, snapshot=None, snapshot_step=0)
        return learner

    def get(self, row: ClientRow, *, busy: Callable[[str], bool]) -> Resident:
        """Return a client, brought back if need be; `busy` tells which others have something to run."""
        found = self._residents.get(row.id)
        if found is None:
            self._make_room(busy)
            try:
                found = self._brought_back(row)
            except UserError as error:
                raise ClientUnavailable(
                    f"the client cannot be brought back as it was: {error} Its operations are kept, and tried again at "
                    "the next request or start. To be rid of it, cancel them and delete it; its checkpoints stay.",
                    client_id=row.id,
                ) from error
            self._residents[row.id] = found
        self._residents.move_to_end(row.id)
        return found

    def drop(self, client_id: str) -> None:
        """Forget what is in memory: the next use brings back what is stored."""
        found = self._residents.pop(client_id, None)
        if found is not None:
            found.learner.close()

    def snapshot(self, client_id: str, seq: int) -> dict[str, Any]:
        """Write a client's state after operation `seq`; return the client's columns to set once that is recorded."""
        resident = self._residents[client_id]
        name = f"{client_id}-{seq}"
        learner = resident.learner
        with staged(self._snapshots / name, what="a snapshot", remedy="Free space in state_dir.") as directory:
            write_checkpoint(
                directory,
                learner.state(),
                base=learner.base,
                config=learner.config,
                include_optimizer=True,
                include_gradients=True,
                info={"client_id": client_id, "seq": seq},
            )
        return {"snapshot": name, "snapshot_seq": seq}

    def delete(self, client_id: str) -> None:
        """Forget a client and remove its snapshots, once no record names them."""
        self.drop(client_id)
        for path in self._snapshots.glob(f"{client_id}-*"):
            shutil.rmtree(path, ignore_errors=True)

    def stands_on(self, client_id: str, name: str) -> None:
        """Take note of a recorded snapshot and remove the one before."""
        resident = self._residents[client_id]
        before, resident.snapshot = resident.snapshot, name
        resident.snapshot_step = resident.learner.step
        if before is not None and before != name:
            shutil.rmtree(self._snapshots / before, ignore_errors=True)

    def store_all(self) -> None:
        """Snapshot every client that has changed since its last one, as far as the disk takes them."""
        for client_id in list(self._residents):
            self._stored(client_id)

    def _stored(self, client_id: str) -> bool:
        """Whether all that a client has done is in a snapshot now; without one, the log still has it."""
        resident = self._residents[client_id]
        row = self._store.client(client_id)
        if row is None or not resident.dirty(row.snapshot_seq):
            return True
        try:
            columns = self.snapshot(client_id, resident.applied)
            self._store.set_client(client_id, columns)
        except (UserError, OSError) as error:
            logger.warning("client %s could not be stored: %s", client_id, error)
            return False
        self.stands_on(client_id, columns["snapshot"])
        return True

    def _make_room(self, busy: Callable[[str], bool]) -> None:
        surplus = len(self._residents) - self._params.max_resident_clients + 1
        idle_first = sorted(self._residents, key=busy)  # stable: within both, the one used longest ago first
        for client_id in idle_first:
            if surplus <= 0:
                return
            # One that cannot be stored stays, above the limit: another client's operation is not to fail of it.
            if self._stored(client_id):
                self.drop(client_id)
                surplus -= 1

    def _base(self, row: ClientRow) -> Base:
        return self._bases.get(str(row.config["model_ref"]))

    def _brought_back(self, row: ClientRow) -> Resident:
        base = self._base(row)
        if row.fingerprint is not None and base.fingerprint != row.fingerprint:
            raise Conflict(
                f"the weights of {row.config['model_ref']} are not those that client {row.id} was made on: put the "
                "earlier ones back, or start a new client."
            )
        again = [
            operation
            for operation in self._store.operations(row.id, after=row.snapshot_seq, status=COMPLETED)
            if operation.kind in CHANGING
        ]
        if again and row.placement not in (None, base.placement):
            raise Conflict(
                f"its last operations ran on {row.placement}, and here they would run on {base.placement} with other "
                "results: start the engine once as it was, and close it."
            )
        learner = Learner(base, row.id, training_config(row.config))
        try:
            if row.snapshot is not None:
                learner.load(self._read(self._snapshots / row.snapshot, learner).state)
            resident = Resident(
                learner=learner, applied=row.snapshot_seq, snapshot=row.snapshot, snapshot_step=learner.step
            )
            for operation in again:
                self._run_again(learner, operation)
                resident.applied = operation.seq
        except BaseException:
            learner.close()
            raise
        return resident

    def _read(self, directory: Path, learner: Learner) -> Checkpoint:
        try:
            checkpoint = read_checkpoint(directory)
            check_fits(checkpoint, learner.base, learner.config)
        except UserError as error:
            raise InternalError(
                f"its stored state is damaged: {self.without_place(error)}", type="DamagedSnapshot"
            ) from error
        return checkpoint

    def _run_again(self, learner: Learner, operation: OperationRow) -> None:
        """Do once more what a completed operation did, and compare."""
        payload = operation.payload
        if payload is None or operation.volatile:
            raise InternalError(f"operation {operation.seq} cannot be run again: its payload is gone.")
        if operation.kind == FORWARD_BACKWARD:
            prepared = check_operation(
                learner.base, learner.config, operation.kind, payload, allowed_losses=self._params.losses
            )
            _compare(operation, learner.forward_backward(prepared), "loss", "grad_norm")
        elif operation.kind == OPTIM_STEP:
            _compare(operation, learner.optim_step(payload), "step", "grad_norm")
        elif operation.kind == LOAD_STATE:
            self.load(learner, operation)

    def load(self, learner: Learner, operation: OperationRow) -> None:
        """Load the checkpoint that an operation names into a learner."""
        artifact_id = str((operation.payload or {})["artifact_id"])
        try:
            checkpoint = read_checkpoint(self.artifact_path(artifact_id))
        except UserError as error:
            raise InvalidRequest(self.without_place(error)) from error
        check_fits(checkpoint, learner.base, learner.config)
        learner.load(checkpoint.state, keep_privacy=checkpoint.info.get("client_id") == operation.client_id)

    def without_place(self, error: Exception) -> str:
        """Return an error's text without the directory that the service keeps its state in."""
        text = str(error)
        for folder in (self._snapshots, self._artifacts):
            for path in (folder.resolve(), folder):
                text = text.replace(f"{path}/", "")
        return text

    def save(self, resident: Resident, operation: OperationRow, artifact_id: str) -> dict[str, Any]:
        """Write a checkpoint, or find the one that a killed process wrote for this operation; return its figures."""
        payload, learner = operation.payload or {}, resident.learner
        final = self.artifact_path(artifact_id)
        if not final.exists():
            with staged(final, what="the checkpoint", remedy="Free space in state_dir and save again.") as directory:
                written = write_checkpoint(
                    directory,
                    learner.state(),
                    base=learner.base,
                    config=learner.config,
                    include_optimizer=payload.get("include_optimizer", True),
                    include_gradients=False,
                    info={
                        "client_id": operation.client_id,
                        "artifact_id": artifact_id,
                        "created_at": operation.created_at,
                        "metadata": payload.get("metadata") or {},
                    },
                )
            return {"size_bytes": written.size_bytes, "content_hash": written.content_hash, "step": learner.step}
        size = sum(path.stat().st_size for path in final.iterdir())
        return {"size_bytes": size, "content_hash": read_checkpoint(final).content_hash, "step": learner.step}


def _compare(operation: OperationRow, result: Mapping[str, Any], *names: str) -> None:
    before = operation.result or {}
    for name in names:
        if before.get(name) != result[name]:
            logger.warning(
                "client %s: operation %d gave %s %r before and %r when run again: this machine computes otherwise.",
                operation.client_id,
                operation.seq,
                name,
                before.get(name),
                result[name],
            )
