"""What a data source yields: rows as it reads them, unchecked, and rows that it cannot read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from inft.sample import ImageRef
from params.errors import UserError


class MissingSplit(UserError):
    """The source has no split of that name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row as its source reads it, unchecked."""

    image: ImageRef | None
    title: str
    content: str
    caption: str
    language: str
    where: str  # "train.jsonl line 17"
    extra: Mapping[str, Any] = field(default_factory=dict)  # merged into Sample.meta


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that cannot be used, with the reason."""

    where: str
    reason: str
    language: str = ""  # "": unknown
    title: str = ""
