"""The engine's records in SQLite: clients, their operations in order, checkpoints, and the audit chain.

One connection behind one lock. Each method that writes is one transaction: after a crash it has happened or not. An
operation is *accepted* when its row is committed; `finish` writes its outcome and the client's state together.
"""

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inft.client import audit
from inft.client.errors import Closed, StorageFull
from params.errors import UserError

DATABASE = "client.sqlite"
VERSION = 1
OPEN, COMPLETED, FAILED, CANCELLED = "open", "completed", "failed", "cancelled"

_TABLES = """
CREATE TABLE IF NOT EXISTS clients (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, config TEXT NOT NULL, created_at TEXT NOT NULL,
    fingerprint TEXT,                        -- of the base's weights
    status TEXT NOT NULL DEFAULT 'active',   -- or poisoned
    reason TEXT NOT NULL DEFAULT '',         -- why it is poisoned
    step INTEGER NOT NULL DEFAULT 0,
    dp_metrics TEXT,
    next_run INTEGER NOT NULL DEFAULT 1,     -- every smaller number is done
    snapshot TEXT, snapshot_seq INTEGER NOT NULL DEFAULT 0,
    placement TEXT,                          -- where it was computed: what is run again there is bit-equal
    request_id TEXT, UNIQUE (tenant, request_id));
CREATE INDEX IF NOT EXISTS clients_of_tenant ON clients (tenant);
CREATE TABLE IF NOT EXISTS operations (
    id TEXT PRIMARY KEY, client_id TEXT NOT NULL REFERENCES clients, seq INTEGER NOT NULL, kind TEXT NOT NULL,
    payload TEXT,                            -- NULL once a snapshot holds what it did
    digest TEXT NOT NULL, volatile INTEGER NOT NULL, created_at TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,     -- starts of the engine that ended while it ran
    status TEXT NOT NULL DEFAULT 'open', finished_at TEXT, result TEXT, error TEXT, UNIQUE (client_id, seq));
CREATE INDEX IF NOT EXISTS open_operations ON operations (status) WHERE status = 'open';
CREATE TABLE IF NOT EXISTS artifacts (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, client_id TEXT NOT NULL, step INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL, content_hash TEXT NOT NULL, created_at TEXT NOT NULL, metadata TEXT NOT NULL);
"""


@dataclass(frozen=True, kw_only=True)
class ClientRow:
    """A training client as it is stored."""

    id: str
    tenant: str
    config: dict[str, Any]
    created_at: str
    fingerprint: str | None = None
    status: str = "active"
    reason: str = ""
    step: int = 0
    dp_metrics: dict[str, Any] | None = None
    next_run: int = 1
    snapshot: str | None = None
    snapshot_seq: int = 0
    placement: str | None = None  # device, dtype and quantisation of the base
    request_id: str | None = None  # of the request that made it: known when it comes again


@dataclass(frozen=True, kw_only=True)
class OperationRow:
    """An accepted operation as it is stored."""

    id: str
    client_id: str
    seq: int
    kind: str
    payload: dict[str, Any] | None
    digest: str  # sha256 of the payload as it was sent
    volatile: bool  # a part of it lives in this process alone: it cannot be run again after a crash
    created_at: str
    attempts: int = 0  # processes that ended while it ran
    status: str = OPEN
    finished_at: str | None = None
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class Store:
    """The records of one state directory."""

    def __init__(self, directory: Path, *, durable: bool) -> None:
        self._lock = threading.RLock()
        self._closed = False
        self._durable = durable
        try:
            self._db = sqlite3.connect(directory / DATABASE, check_same_thread=False, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            # NORMAL loses nothing when the process is killed; FULL also keeps what a power cut would take.
            self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._prepare(directory)
        except sqlite3.DatabaseError as error:
            raise UserError(f"{directory / DATABASE} cannot be used: {error}. Choose another state_dir.") from error

    def _prepare(self, directory: Path) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, VERSION):
            raise UserError(
                f"{directory / DATABASE} is of version {version}, this inft writes {VERSION}: choose another state_dir."
            )
        with self._writing():
            for statement in (_TABLES + audit.SCHEMA).split(";\n"):
                if statement.strip():
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {VERSION}")

    @contextmanager
    def _writing(self, *, safely: bool = False) -> Iterator[None]:
        """One transaction; `safely` waits for the disk, as what is removed after it cannot be brought back."""
        with self._reading():
            if safely and not self._durable:
                self._db.execute("PRAGMA synchronous = FULL")
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise StorageFull(f"the log could not be written ({error}): free space in state_dir.") from error
                raise
            finally:
                if safely and not self._durable:
                    self._db.execute("PRAGMA synchronous = NORMAL")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock:
            self._require_open()
            yield

    def _require_open(self) -> None:
        if self._closed:
            raise Closed("the engine has been closed.")

    def close(self) -> None:
        """Close the connection; every call after it raises Closed."""
        with self._lock:
            self._closed = True
            self._db.close()

    def add_client(self, row: ClientRow, entry: Mapping[str, Any]) -> None:
        """Record a client and its audit entry."""
        with self._writing():
            self._db.execute(
                "INSERT INTO clients (id, tenant, config, created_at, fingerprint, dp_metrics, placement, request_id) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    row.id,
                    row.tenant,
                    _json(row.config),
                    row.created_at,
                    row.fingerprint,
                    _json_or_none(row.dp_metrics),
                    row.placement,
                    row.request_id,
                ),
            )
            audit.append(self._db, **entry)

    def client(self, client_id: str) -> ClientRow | None:
        """Return a client, or None."""
        with self._reading():
            row = self._db.execute("SELECT * FROM clients WHERE id = ?", (client_id,)).fetchone()
        return None if row is None else _client(row)

    def client_made_by(self, tenant: str, request_id: str) -> ClientRow | None:
        """Return the client that a request made, or None."""
        query = "SELECT * FROM clients WHERE tenant = ? AND request_id = ?"
        with self._reading():
            row = self._db.execute(query, (tenant, request_id)).fetchone()
        return None if row is None else _client(row)

    def count_clients(self, tenant: str) -> int:
        """Return the number of a tenant's clients."""
        with self._reading():
            return int(self._db.execute("SELECT COUNT(*) FROM clients WHERE tenant = ?", (tenant,)).fetchone()[0])

    def delete_client(self, client_id: str, entry: Mapping[str, Any]) -> None:
        """Remove a client and its operations, and record that."""
        with self._writing():
            self._db.execute("DELETE FROM operations WHERE client_id = ?", (client_id,))
            self._db.execute("DELETE FROM clients WHERE id = ?", (client_id,))
            audit.append(self._db, **entry)

    def clients(self, tenant: str) -> list[ClientRow]:
        """Return a tenant's clients, oldest first."""
        with self._reading():
            rows = self._db.execute("SELECT * FROM clients WHERE tenant = ? ORDER BY rowid", (tenant,)).fetchall()
        return [_client(row) for row in rows]

    def accept(self, row: OperationRow, entry: Mapping[str, Any]) -> None:
        """Record an accepted operation and its audit entry."""
        with self._writing():
            self._db.execute(
                "INSERT INTO operations (id, client_id, seq, kind, payload, digest, volatile, created_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    row.id,
                    row.client_id,
                    row.seq,
                    row.kind,
                    _json_or_none(row.payload),
                    row.digest,
                    int(row.volatile),
                    row.created_at,
                ),
            )
            audit.append(self._db, **entry)

    def count_attempt(self, operation_id: str) -> None:
        """Take note that a process ended while an open operation ran."""
        with self._writing():
            query = "UPDATE operations SET attempts = attempts + 1 WHERE id = ? AND status = 'open'"
            self._db.execute(query, (operation_id,))

    def finish(
        self,
        row: OperationRow,
        entry: Mapping[str, Any],
        *,
        client: Mapping[str, Any],
        artifact: Mapping[str, Any] | None = None,
    ) -> None:
        """Record an operation's outcome, what it made of the client, and the checkpoint it wrote, all or nothing.

        `client` are columns of the client to set; with a snapshot the payloads that it covers are dropped.
        """
        with self._writing(safely="snapshot" in client):
            self._db.execute(
                "UPDATE operations SET status = ?, finished_at = ?, result = ?, error = ? WHERE id = ?",
                (row.status, row.finished_at, _json_or_none(row.result), _json_or_none(row.error), row.id),
            )
            self._set_client(row.client_id, client)
            if artifact is not None:
                names = ", ".join(artifact)
                marks = ", ".join("?" * len(artifact))
                values = tuple(_column(value) for value in artifact.values())
                self._db.execute(f"INSERT INTO artifacts ({names}) VALUES ({marks})", values)
            audit.append(self._db, **entry)

    def set_client(self, client_id: str, columns: Mapping[str, Any]) -> None:
        """Set columns of a client."""
        with self._writing(safely="snapshot" in columns):
            self._set_client(client_id, columns)

    def _set_client(self, client_id: str, columns: Mapping[str, Any]) -> None:
        if not columns:
            return
        assignments = ", ".join(f"{name} = ?" for name in columns)
        values = [_column(value) for value in columns.values()]
        self._db.execute(f"UPDATE clients SET {assignments} WHERE id = ?", (*values, client_id))
        if "snapshot_seq" in columns:
            self._db.execute(
                "UPDATE operations SET payload = NULL "
                "WHERE client_id = ? AND seq <= ? AND status != 'open' AND payload IS NOT NULL",
                (client_id, columns["snapshot_seq"]),
            )

    def operation(self, operation_id: str) -> OperationRow | None:
        """Return an operation by its id, or None."""
        return self._operation("id = ?", (operation_id,))

    def operation_at(self, client_id: str, seq: int) -> OperationRow | None:
        """Return a client's operation of that number, or None."""
        return self._operation("client_id = ? AND seq = ?", (client_id, seq))

    def _operation(self, where: str, values: Sequence[Any]) -> OperationRow | None:
        with self._reading():
            row = self._db.execute(f"SELECT * FROM operations WHERE {where}", values).fetchone()
        return None if row is None else _operation(row)

    def operations(self, client_id: str, *, after: int, status: str | None = None) -> list[OperationRow]:
        """Return a client's operations with larger numbers, in order."""
        query = "SELECT * FROM operations WHERE client_id = ? AND seq > ?"
        values: tuple[Any, ...] = (client_id, after)
        if status is not None:
            query, values = f"{query} AND status = ?", (*values, status)
        with self._reading():
            rows = self._db.execute(f"{query} ORDER BY seq", values).fetchall()
        return [_operation(row) for row in rows]

    def last_change(self, client_id: str, before: int) -> tuple[int, str, str]:
        """Return number, kind and status of the last operation under a number that ran or failed to.

        Of those that make up a step; (0, "", "") where there is none.
        """
        query = (
            "SELECT seq, kind, status FROM operations WHERE client_id = ? AND seq < ? "
            "AND kind IN ('forward_backward', 'optim_step', 'load_state') AND status IN ('completed', 'failed') "
            "ORDER BY seq DESC LIMIT 1"
        )
        with self._reading():
            row = self._db.execute(query, (client_id, before)).fetchone()
        return (0, "", "") if row is None else (row["seq"], row["kind"], row["status"])

    def last_seq(self, client_id: str) -> int:
        """Return a client's largest number, 0 without any operation."""
        with self._reading():
            row = self._db.execute("SELECT MAX(seq) FROM operations WHERE client_id = ?", (client_id,)).fetchone()
        return int(row[0] or 0)

    def clients_with_open_operations(self) -> list[ClientRow]:
        """Return the clients that have something to run, in the order of their oldest operation."""
        query = (
            "SELECT clients.* FROM clients JOIN operations ON operations.client_id = clients.id "
            "WHERE operations.status = 'open' GROUP BY clients.id ORDER BY MIN(operations.rowid)"
        )
        with self._reading():
            return [_client(row) for row in self._db.execute(query).fetchall()]

    def snapshots(self) -> set[str]:
        """Return the names of the snapshots that clients stand on."""
        with self._reading():
            rows = self._db.execute("SELECT snapshot FROM clients WHERE snapshot IS NOT NULL").fetchall()
        return {row[0] for row in rows}

    def artifact(self, artifact_id: str) -> dict[str, Any] | None:
        """Return a checkpoint's record, with its tenant, or None."""
        with self._reading():
            row = self._db.execute("SELECT * FROM artifacts WHERE id = ?", (artifact_id,)).fetchone()
        return None if row is None else {**dict(row), "metadata": json.loads(row["metadata"])}

    def wanted_artifacts(self) -> set[str]:
        """Return the ids of all checkpoints, and of those that an open operation is to write."""
        query = "SELECT id FROM artifacts UNION SELECT 'art-' || substr(id, 5) FROM operations WHERE status = 'open'"
        with self._reading():
            return {row[0] for row in self._db.execute(query).fetchall()}

    def audit(self, entry: Mapping[str, Any]) -> None:
        """Append an audit entry."""
        with self._writing():
            audit.append(self._db, **entry)

    def audit_entries(self, tenant: str, *, after: int, limit: int) -> list[dict[str, Any]]:
        """Return a tenant's audit entries after a number."""
        with self._reading():
            return audit.entries(self._db, tenant, after=after, limit=limit)


def _client(row: sqlite3.Row) -> ClientRow:
    values = dict(row)
    dp_metrics = values.pop("dp_metrics")
    return ClientRow(
        **values | {"config": json.loads(values["config"])},
        dp_metrics=None if dp_metrics is None else json.loads(dp_metrics),
    )


def _operation(row: sqlite3.Row) -> OperationRow:
    values = dict(row)
    parsed = {name: values[name] and json.loads(values[name]) for name in ("payload", "result", "error")}
    return OperationRow(**values | parsed | {"volatile": bool(values["volatile"])})


def _column(value: Any) -> Any:
    return _json(value) if isinstance(value, Mapping) else value


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))  # ASCII: a lone surrogate in an error's text is no UTF-8


def _json_or_none(value: Any) -> str | None:
    return None if value is None else _json(value)
