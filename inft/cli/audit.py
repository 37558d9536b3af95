"""inft audit: whether the audit log of a training service is as it was written."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from params.client import EngineParams
from params.errors import UserError

if TYPE_CHECKING:
    from inft.client.audit import ChainReport

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)
DATABASE = "client.sqlite"  # in the state directory
TAMPERED = 1  # exit status
SHOWN = 80  # characters of a text of the log: it may have been tampered with to look like a line of ours
MOST_NAMES = 20  # of tenants that are listed


@app.callback()
def audit() -> None:
    """Check the audit log of a training service.

    The log is in the service's state directory and lists what each tenant did and was refused.
    """


@app.command()
def verify(
    state_dir: Annotated[
        Path, typer.Argument(metavar="STATE_DIR", help="The service's state directory.", show_default=True)
    ] = Path(EngineParams.state_dir),
    tenant: Annotated[str | None, typer.Option(metavar="NAME", help="This tenant's chain alone.")] = None,
    heads: Annotated[
        list[str] | None,
        typer.Option("--head", metavar="HASH", help="A head noted earlier, which must still be there; repeatable."),
    ] = None,
) -> None:
    """Check that no entry was changed, removed, inserted or swapped.

    Each tenant's entries form a chain: an entry's hash covers the entry and the hash before it. Each chain's head, the
    hash of its last entry, is printed: note it elsewhere, and give it with --head later, since entries cut off the end
    can be seen in no other way. The log is opened read-only, also while the service runs. Exit status 0: whole; 1: not
    whole, and what is wrong is named; 2: it could not be read.
    """
    from inft.client.audit import holds, tenants
    from inft.client.audit import verify as verify_chains

    wanted = [head_of(head) for head in heads or []]
    path = state_dir.expanduser() / DATABASE
    with closing(opened(path)) as db:
        try:
            db.execute("BEGIN")  # one view of the log for all that is read, while a service may write to it
            reports = verify_chains(db, tenant=tenant)
            lost = [head for head in wanted if not holds(db, head, tenant=tenant)]
            known = tenants(db)
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path} could not be read: {error}. Is it the database of a training service?") from error
    if tenant is not None and tenant not in known:
        if not lost:
            raise UserError(f"--tenant {tenant!r:.{SHOWN}}: there is no such tenant in the log; {_names(known)}.")
        reports = []
    for line in lines_of(reports, lost):
        typer.echo(line)
    if lost or not all(report.whole for report in reports):
        raise typer.Exit(TAMPERED)


def opened(path: Path) -> sqlite3.Connection:
    """Open the database to be read only; UserError where there is none."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the directory that inft serve was given as --state-dir.")
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)


def head_of(text: str) -> str:
    """The hash in lower case; UserError for what is no SHA-256."""
    head = text.strip().lower()
    if not is_hash(head):
        raise UserError(f"--head {text!r:.80} is not a hash: give 64 hexadecimal digits, as inft audit verify prints.")
    return head


def is_hash(text: object) -> bool:
    """Whether it is a SHA-256 in lower case."""
    return isinstance(text, str) and len(text) == 64 and not set(text) - set("0123456789abcdef")


def _names(tenants: list[str]) -> str:
    more = f" and {len(tenants) - MOST_NAMES} more" if len(tenants) > MOST_NAMES else ""
    listed = ", ".join(f"{name!r:.{SHOWN}}" for name in tenants[:MOST_NAMES])
    return f"it has {listed}{more}" if tenants else "it is empty"


def lines_of(reports: "list[ChainReport]", lost: list[str]) -> Iterator[str]:
    """What a user is told, line by line."""
    for report in reports:
        state = "whole" if report.whole else "NOT WHOLE"
        head = report.head if is_hash(report.head) else f"{report.head!r:.{SHOWN}}"
        yield f"{report.tenant!r:.{SHOWN}}: {state}, {report.entries:,} entries, head {head}"
        yield from (f"  {problem}" for problem in report.problems)
    if not reports and not lost:
        yield "the log is empty"
    for head in lost:
        yield f"head {head} is not in the log: entries were cut off its end, or it is another log's."
