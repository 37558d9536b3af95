"""What a data source yields: rows as it reads them, unchecked, and rows that it cannot read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from inft.sample import ImageRef
from params.errors import UserError

# What is read of a row. captions: the caption, to be learnt under our instruction. references: the caption, which
# answers are compared with, and the row's own prompt where it has one. prompts: the same, and the caption may be
# missing. preferences: a chosen and a rejected answer, and the row's own prompt where it has one.
RowKind = Literal["captions", "references", "prompts", "preferences"]


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
    prompt: str = ""  # the row's own instruction; "": that of the configuration
    rejected: str | None = None  # the worse answer of a preference, whose better one is the caption
    extra: Mapping[str, Any] = field(default_factory=dict)  # merged into Sample.meta


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that cannot be used, with the reason."""

    where: str
    reason: str
    language: str = ""  # "": unknown
    title: str = ""
