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
    from inft.client.audit import holds
    from inft.client.audit import verify as verify_chains

    wanted = [head_of(head) for head in heads or []]
    path = state_dir.expanduser() / DATABASE
    with closing(opened(path)) as db:
        try:
            db.execute("BEGIN")  # one view of the log for all that is read, while a service may write to it
            reports = verify_chains(db, tenant=tenant)
            lost = [head for head in wanted if not holds(db, head, tenant=tenant)]
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path} could not be read: {error}. Is it the database of a training service?") from error
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
    if len(head) != 64 or set(head) - set("0123456789abcdef"):
        raise UserError(f"--head {text!r:.80} is not a hash: give 64 hexadecimal digits, as inft audit verify prints.")
    return head


def lines_of(reports: "list[ChainReport]", lost: list[str]) -> Iterator[str]:
    """What a user is told, line by line."""
    for report in reports:
        state = "whole" if report.whole else "NOT WHOLE"
        yield f"{report.tenant!r}: {state}, {report.entries:,} entries, head {report.head}"
        yield from (f"  {problem}" for problem in report.problems)
    if not reports:
        yield "the log is empty"
    for head in lost:
        yield f"head {head} is not in the log: entries were cut off its end, or it is another log's."
