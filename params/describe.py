"""What a field is, for help texts: the values it takes, its default, its trailing comment from the source."""

import inspect
import re
from collections.abc import Mapping
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from params.check import TRAIN
from params.schema import Schema

_FIELD = re.compile(r"    (?P<name>\w+): .+? = .+?(?:  # (?P<help>.*))?")
_KINDS = {bool: "true|false", int: "whole number", float: "number", str: "text"}


class FieldText(NamedTuple):
    """One field in words."""

    name: str  # "sft.lr"
    type: str  # "number, above 0", "none|all|lora_only", "list of text"
    default: str  # "0.00015"; "none" for None, lists with commas
    help: str  # "peak, per optimizer step"; "" without a comment


@cache
def describe(section: str, schema: Schema = TRAIN) -> tuple[FieldText, ...]:
    """The fields of a section ("sft") in the order of its dataclass."""
    cls = schema.sections[section]
    defaults = cls()
    matches = [match for line in inspect.getsource(cls).splitlines() if (match := _FIELD.fullmatch(line))]
    return tuple(
        FieldText(
            name=f"{section}.{match['name']}",
            type=_kind(schema.field_types[f"{section}.{match['name']}"]),
            default=_words(getattr(defaults, match["name"])),
            help=match["help"] or "",
        )
        for match in matches
    )


def describe_field(key: str) -> FieldText:
    """The text of one field by its dotted name."""
    return next(text for text in describe(key.partition(".")[0]) if text.name == key)


def _kind(hint: Any) -> str:
    """The values that an annotation admits, in words."""
    arms = get_args(hint)
    if get_origin(hint) is Annotated:
        kind, bounds = arms
        return f"{_kind(kind)}, {bounds.words}"
    if get_origin(hint) is Literal:
        return "|".join(arms)
    if get_origin(hint) is tuple:
        return f"list of {_kind(arms[0])}"
    if get_origin(hint) is Mapping:
        return f"mapping of {_kind(arms[0])} to {_kind(arms[1])}"
    if NoneType in arms:
        return f"{_kind(next(arm for arm in arms if arm is not NoneType))}; or none"
    return _KINDS[hint]


def _words(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {entry}" for key, entry in value.items())
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
