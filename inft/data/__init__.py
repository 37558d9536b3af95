"""Data sources: one file each, found by name in SOURCES."""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING

from params.errors import UserError

if TYPE_CHECKING:
    from inft.data.batches import BadRow, Row

SOURCES = {
    "munichus": "inft.data.munichus:rows",
    "hub": "inft.data.hub:rows",
    "jsonl": "inft.data.jsonl:rows",
    "folder": "inft.data.folder:rows",
    "sample": "inft.data.sample:rows",
}


def load_source(name: str) -> "Callable[..., Iterator[Row | BadRow]]":
    """Return the ``rows(config, *, location, split, kind)`` function of a source by its name in SOURCES.

    Errors: UserError for an unknown name.
    """
    if name not in SOURCES:
        raise UserError(f"unknown data source {name!r}. Known sources: {', '.join(SOURCES)}.")
    module, attribute = SOURCES[name].split(":")
    rows: Callable[..., Iterator[Row | BadRow]] = getattr(import_module(module), attribute)
    return rows
