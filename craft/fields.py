"""Checking the values of a dataclass against its annotations, and the mapping of roles to columns."""

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from params.bounds import Bounds

DEFAULT_KEYS: Mapping[str, str] = {
    "anchor_input_ids": "input_ids",
    "anchor_attention_mask": "attention_mask",
    "anchor_labels": "labels",
    "positive_input_ids": "input_ids_tgt",
    "positive_attention_mask": "attention_mask_tgt",
}
_ROLES = f"roles: {', '.join(DEFAULT_KEYS)}"


class ContrastiveKeys(dict[str, str]):
    """Role -> column of a batch, read as a mapping or by attribute: ``keys["anchor_labels"]``, ``keys.anchor_labels``.

    Made from a mapping, or from its JSON text as a command line gives it; roles left out keep their default column.
    A dict, so that it goes into JSON, pickles and copies as it is.
    Errors: ValueError for an unknown role and for a column that is no text.
    """

    def __init__(self, given: Mapping[str, str] | Iterable[tuple[str, str]] | str = ()) -> None:
        columns = dict(_from_json(given) if isinstance(given, str) else given)
        for role, column in columns.items():
            if role not in DEFAULT_KEYS:
                raise ValueError(f"has no role {role!r}{did_you_mean(role, DEFAULT_KEYS)}; {_ROLES}.")
            if not isinstance(column, str) or not column:
                raise ValueError(f"must give {role} the name of a column, got {column!r}.")
        super().__init__({**DEFAULT_KEYS, **columns})

    def __getattr__(self, role: str) -> str:
        if role not in DEFAULT_KEYS:
            raise AttributeError(f"craft_contrastive_keys has no role {role!r}; {_ROLES}.")
        return self[role]

    def __setattr__(self, role: str, column: str) -> None:
        if role not in DEFAULT_KEYS:
            raise AttributeError(f"craft_contrastive_keys has no role {role!r}; {_ROLES}.")
        self[role] = column


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for a word that is close to a known one, else nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def checked_fields(config: Any, cls: type, across: Callable[[Any], list[str]]) -> None:
    """Convert the fields of `config` that `cls` declares to their types, in place; `across` checks combinations.

    Errors: one ValueError with a line for every field that is wrong.
    """
    problems = []
    for name, hint in _hints(cls):
        try:
            setattr(config, name, _checked(getattr(config, name), hint))
        except ValueError as error:
            problems.append(f"{name}={getattr(config, name)!r} {error}")
    problems = problems or across(config)
    if problems:
        raise ValueError("\n".join(problems))


@cache
def _hints(cls: type) -> list[tuple[str, Any]]:
    hints = get_type_hints(cls, include_extras=True)
    return [(f.name, hints[f.name]) for f in fields(cls)]


def _checked(value: Any, hint: Any) -> Any:
    """The value as the annotation wants it; ValueError with the words that follow field and value."""
    arms, origin = get_args(hint), get_origin(hint)
    if NoneType in arms:
        return None if value is None else _checked(value, next(arm for arm in arms if arm is not NoneType))
    if origin is Annotated:
        return _number(value, arms[0], arms[1])
    if origin is Literal:
        return _word(value, arms)
    if origin is list:
        return _words(value, get_args(arms[0].__metadata__[0]))
    if hint is ContrastiveKeys:
        return _keys(value)
    if not isinstance(value, hint):
        raise ValueError(f"must be {'True or False' if hint is bool else 'text'}.")
    return value


def _number(value: Any, kind: type, bounds: Bounds) -> float | int:
    """An int or a float within its bounds; NumPy's numbers become Python's, which JSON can write."""
    abstract, words = (Integral, "a whole number") if kind is int else (Real, "a number")
    if isinstance(value, bool) or not isinstance(value, abstract):
        raise ValueError(f"must be {words}, {bounds.words}.")
    number: float | int = kind(value)
    if not bounds.holds(number):
        raise ValueError(f"must be {bounds.words}.")
    return number


def _word(value: Any, allowed: Sequence[str]) -> Any:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"must be one of {', '.join(allowed)}{did_you_mean(value, allowed)}.")
    return value


def _words(value: Any, allowed: Sequence[str]) -> list[str]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"must be a list of {', '.join(allowed)}.")
    return [_word(word, allowed) for word in value]


def _keys(value: Any) -> ContrastiveKeys:
    if not isinstance(value, Mapping | str):
        raise ValueError(f"must map {', '.join(DEFAULT_KEYS)} to column names.")
    return ContrastiveKeys(value)


def _from_json(text: str) -> dict[str, str]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError("must be a JSON object.")
    return found
