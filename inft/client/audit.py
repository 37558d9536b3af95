"""The audit log: what each tenant did and was refused, an entry a row, in a chain of hashes that shows tampering.

Each tenant has a chain of its own. An entry's hash is the SHA-256 of the hash before it and of the entry's canonical
JSON (sorted keys, no spaces, ASCII), so whoever holds an earlier hash can check everything up to it:

    sha256((previous + canonical(entry without "previous" and "hash")).encode()).hexdigest()

Entries hold no keys and no contents of batches: `details` is short, and a payload stands there as its SHA-256.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

FIRST = "0" * 64  # the hash before a chain's first entry
SCHEMA = """
CREATE TABLE IF NOT EXISTS audit (
    tenant TEXT NOT NULL,
    number INTEGER NOT NULL,
    at TEXT NOT NULL,
    action TEXT NOT NULL,
    target TEXT NOT NULL,
    outcome TEXT NOT NULL,
    details TEXT NOT NULL,
    request_id TEXT,
    previous TEXT NOT NULL,
    hash TEXT NOT NULL,
    PRIMARY KEY (tenant, number)
) WITHOUT ROWID;
"""
_COLUMNS = ("tenant", "number", "at", "action", "target", "outcome", "details", "request_id", "previous", "hash")
MOST_SHOWN = 60  # characters of what an entry says, in a problem
_MOST_PROBLEMS = 10  # named of one chain: past the first few they only repeat what is known


@dataclass(frozen=True, kw_only=True)
class ChainReport:
    """What the check of one tenant's chain found."""

    tenant: str
    entries: int
    head: str  # hash of the last entry
    problems: tuple[str, ...]  # each names its entry; empty for a whole chain

    @property
    def whole(self) -> bool:
        """Whether nothing was changed, removed, inserted or swapped up to the head."""
        return not self.problems


def canonical(values: Any) -> str:
    """Return the one JSON text of plain values. Errors: ValueError for NaN and infinities."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def entry_hash(previous: str, entry: Mapping[str, Any]) -> str:
    """Return the hash of an entry, given without `previous` and `hash`."""
    return hashlib.sha256((previous + canonical(entry)).encode()).hexdigest()


def append(
    db: sqlite3.Connection,
    *,
    tenant: str,
    action: str,
    target: str,
    outcome: str,
    details: Mapping[str, Any] | None = None,
    at: str,
    request_id: str | None = None,
) -> str:
    """Add an entry to the tenant's chain, within the caller's transaction, and return its hash.

    `at` is ISO 8601 in UTC; `details` plain JSON values. Errors: sqlite3.IntegrityError where another connection has
    added to the same chain meanwhile.
    """
    columns = "SELECT number, hash FROM audit WHERE tenant = ? ORDER BY number DESC LIMIT 1"
    number, previous = db.execute(columns, (tenant,)).fetchone() or (0, FIRST)
    entry = {
        "tenant": tenant,
        "number": number + 1,
        "at": at,
        "action": action,
        "target": target,
        "outcome": outcome,
        "details": dict(details or {}),
        "request_id": request_id,
    }
    found = entry_hash(previous, entry)
    row = {**entry, "details": canonical(entry["details"]), "previous": previous, "hash": found}
    db.execute(
        f"INSERT INTO audit ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})",
        [row[name] for name in _COLUMNS],
    )
    return found


def entries(db: sqlite3.Connection, tenant: str, *, after: int = 0, limit: int = 100) -> list[dict[str, Any]]:
    """Return the tenant's entries with numbers above `after`, at most `limit`, in order; numbers start at 1."""
    rows = db.execute(
        f"SELECT {', '.join(_COLUMNS)} FROM audit WHERE tenant = ? AND number > ? ORDER BY number LIMIT ?",
        (tenant, after, limit),
    )
    return [{**values, "details": json.loads(values["details"])} for values in map(_named, rows)]


def verify(db: sqlite3.Connection, *, tenant: str | None = None) -> list[ChainReport]:
    """Check every chain, or one tenant's, by computing each hash anew; in the order of the tenants' names.

    What is not found: entries cut off the end, or a whole chain, unless `holds` is asked for a hash noted before.
    """
    columns = f"SELECT {', '.join(_COLUMNS)} FROM audit"
    with _any_text(db):
        if tenant is not None:
            return [_verified(tenant, db.execute(f"{columns} WHERE tenant = ? ORDER BY number", (tenant,)))]
        rows = db.execute(f"{columns} ORDER BY tenant, number")
        return [_verified(str(name), own) for name, own in groupby(rows, key=lambda row: row[0])]


def tenants(db: sqlite3.Connection) -> list[str]:
    """Return the names of the tenants that have entries, in order."""
    with _any_text(db):
        return [str(name) for (name,) in db.execute("SELECT DISTINCT tenant FROM audit ORDER BY tenant")]


def holds(db: sqlite3.Connection, head: str, *, tenant: str | None = None) -> bool:
    """Return whether an entry with this hash is in the log; with a whole chain, nothing before it is lost."""
    query = "SELECT 1 FROM audit WHERE hash = ? AND (? IS NULL OR tenant = ?)"
    return db.execute(query, (head.lower(), tenant, tenant)).fetchone() is not None


@contextmanager
def _any_text(db: sqlite3.Connection) -> Iterator[None]:
    """Texts that are no UTF-8, as tampering may leave them, are read with a stand-in for each byte."""
    before, db.text_factory = db.text_factory, lambda content: content.decode("utf-8", "surrogateescape")
    try:
        yield
    finally:
        db.text_factory = before


def _verified(tenant: str, rows: Iterable[tuple[Any, ...]]) -> ChainReport:
    problems: list[str] = []
    expected, previous, count = 1, FIRST, 0
    for row in map(_named, rows):
        problem = _problem(row, expected, previous)
        if problem is not None and len(problems) < _MOST_PROBLEMS:
            problems.append(problem)
        expected = row["number"] + 1 if isinstance(row["number"], int) else expected
        previous, count = row["hash"], count + 1
    return ChainReport(tenant=tenant, entries=count, head=previous, problems=tuple(problems))


def _problem(row: Mapping[str, Any], expected: int, previous: str) -> str | None:
    """What is wrong with one entry, given the number and the hash that it should follow."""
    number = row["number"]
    what = f"entry {number!r:.{MOST_SHOWN}} ({row['action']!r:.{MOST_SHOWN}} of {row['at']!r:.{MOST_SHOWN}})"
    if not isinstance(number, int) or number < expected:
        return f"{what} was changed: that is no number of an entry here."
    if number != expected:
        missing = f"entry {expected} is" if number == expected + 1 else f"entries {expected} to {number - 1} are"
        return f"{missing} missing before {what}."
    if row["hash"] != _computed(row):
        return f"{what} was changed: its hash is not that of its contents."
    if row["previous"] != previous:
        before = "the start" if number == 1 else f"entry {number - 1}"
        return f"{what} does not follow {before}: one of them was changed, inserted or swapped."
    return None


def _computed(row: Mapping[str, Any]) -> str | None:
    entry = {name: value for name, value in row.items() if name not in ("previous", "hash")}
    try:
        details = json.loads(row["details"])
        if canonical(details) != row["details"]:
            return None
        return entry_hash(row["previous"], {**entry, "details": details})
    except (TypeError, ValueError, RecursionError):  # what was put there is no JSON, or no text
        return None


def _named(row: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(_COLUMNS, row, strict=True))
