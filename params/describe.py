"""What a field is, for help texts: its type and trailing comment from the source, its default."""

import inspect
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from params.check import SECTIONS

_FIELD = re.compile(r"    (?P<name>\w+): (?P<type>.+?) = .+?(?:  # (?P<help>.*))?")


class FieldText(NamedTuple):
    """One field in words."""

    name: str  # "sft.lr"
    type: str  # "Positive"
    default: str  # "0.00015"; "none" for None, lists with commas
    help: str  # "peak, per optimizer step"; "" without a comment


@cache
def describe(section: str) -> tuple[FieldText, ...]:
    """The fields of a section ("sft") in the order of its dataclass."""
    cls = SECTIONS[section]
    defaults = cls()
    matches = [match for line in inspect.getsource(cls).splitlines() if (match := _FIELD.fullmatch(line))]
    return tuple(
        FieldText(
            name=f"{section}.{match['name']}",
            type=match["type"],
            default=_words(getattr(defaults, match["name"])),
            help=match["help"] or "",
        )
        for match in matches
    )


def describe_field(key: str) -> FieldText:
    """The text of one field by its dotted name."""
    return next(text for text in describe(key.partition(".")[0]) if text.name == key)


def _words(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {entry}" for key, entry in value.items())
    if isinstance(value, tuple):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
