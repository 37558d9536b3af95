"""A tree of parameter dataclasses as dotted names: type, range, and the names of fields that do not exist."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from params.bounds import Bounds
from params.yamlfile import Given


@dataclass(frozen=True, eq=False)
class Schema:
    """A dataclass of plain fields and of sections, which are dataclasses themselves."""

    root: type
    sections: Mapping[str, type]
    setting: str  # how a command line sets a field: "--set sft.lr=2e-4"; for messages

    @cached_property
    def field_types(self) -> Mapping[str, Any]:
        """The annotation of every field: "sft.lr" of a section, "model" of the root itself."""
        plain = {
            name: hint
            for name, hint in get_type_hints(self.root, include_extras=True).items()
            if name not in self.sections
        }
        fields = {
            f"{section}.{name}": hint
            for section, cls in self.sections.items()
            for name, hint in get_type_hints(cls, include_extras=True).items()
        }
        return {**plain, **fields}

    def is_mapping(self, key: str) -> bool:
        """Whether a field of that dotted name exists and holds a mapping, such as "data.columns"."""
        return get_origin(self.field_types.get(key)) is Mapping

    def checked(self, given: Mapping[str, Given], problems: list[str]) -> dict[str, Any]:
        """The values of known fields, converted and in range; what is wrong is appended to `problems`."""
        values: dict[str, Any] = {}
        for key, (value, origin, is_text) in given.items():
            if key in self.sections and not value and not is_text:  # `sft:` with nothing below it
                continue
            if key not in self.field_types:
                problems.append(f"{origin}: {self._unknown(key)}")
                continue
            hint = self.field_types[key]
            try:
                values[key] = _converted(_meant(value, hint) if is_text else value, hint)
            except ValueError as error:
                problems.append(f"{origin}: {key} {error}")
        return values

    def sections_of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """One dataclass per section from dotted values; fields that are not given keep their defaults."""
        return {section: cls(**fields_of(values, section)) for section, cls in self.sections.items()}

    def _unknown(self, key: str) -> str:
        """The message for a key that no field has, with the nearest ones that exist."""
        if key in self.sections:
            return f"{key} is a section: its fields stand below it, or as {self.setting.format(key)}."
        section, _, field = key.rpartition(".")
        plain = [name for name in self.field_types if "." not in name]
        if not section and (like := difflib.get_close_matches(key, [*plain, *self.sections], n=1, cutoff=0.8)):
            return f"{key} is not a parameter; did you mean {like[0]}?"
        if near := self._nearest(section, field):
            return f"{key} is not a parameter; did you mean {' or '.join(near)}?"
        if section in self.sections:
            known = ", ".join(name.partition(".")[2] for name in self.field_types if name.startswith(f"{section}."))
            return f"{key} is not a parameter; {section} has {known}."
        return f"{key} is not a parameter; the sections are {', '.join(self.sections)}."

    def _nearest(self, section: str, field: str) -> list[str]:
        """Existing names like this one: the same field elsewhere, else a like one in its section, else a like one."""
        names = [name for name in self.field_types if "." in name]
        same = [name for name in names if name.partition(".")[2] == field]
        here = {name.partition(".")[2]: name for name in names if name.startswith(f"{section}.")}
        anywhere = {name.partition(".")[2]: name for name in names}
        for fields in (here, anywhere):
            same = same or [fields[like] for like in difflib.get_close_matches(field, fields, n=2)]
        return same


def fields_of(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The values of one section, without its name."""
    return {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{section}.")}


def _converted(value: Any, hint: Any) -> Any:
    """The value as the annotation wants it; ValueError with the words that follow the field's name."""
    from pydantic import TypeAdapter, ValidationError

    if value is False and "no" in get_args(hint):  # `mixed_precision: no` in YAML
        return "no"
    if isinstance(value, bool) and bool not in _alternatives(hint):
        raise ValueError(f"must not be true or false (a word such as no or on needs quotes in YAML), got {value}.")
    try:
        result = TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{first['msg'].replace('Input should', 'should')}, got {first['input']!r}.") from error
    for bounds in _bounds(hint):
        if result is not None and not bounds.holds(result):
            raise ValueError(f"must be {bounds.words}, got {value}.")
    return result


def _meant(text: str, hint: Any) -> Any:
    """What the text of a command line means for a field of this type: None, a list, a mapping, or itself."""
    import yaml

    kinds = {get_origin(kind) or kind for kind in _alternatives(hint)}
    if NoneType in kinds and text.lower() in ("none", "null"):
        return None
    if tuple in kinds and not (text.startswith("[") and text.endswith("]")):
        return tuple(part.strip() for part in _split(text) if part.strip())
    if kinds & {tuple, Mapping}:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"is not valid YAML: {text!r}.") from error
    return text


def _split(text: str) -> list[str]:
    """The parts between the commas that stand in no brackets: those of a pattern such as x{0,1} belong to it."""
    parts, depth = [""], 0
    for sign in re.findall(r"\\.|.", text, re.DOTALL):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _alternatives(hint: Any) -> list[Any]:
    """The types that a value may have: [int, NoneType] of ``Count | None``."""
    if get_origin(hint) is Annotated:
        return _alternatives(get_args(hint)[0])
    if NoneType in get_args(hint):
        return [kind for arm in get_args(hint) for kind in _alternatives(arm)]
    return [hint]


def _bounds(hint: Any) -> list[Bounds]:
    if get_origin(hint) is Annotated:
        return [item for item in get_args(hint) if isinstance(item, Bounds)]
    if NoneType in get_args(hint):
        return [bounds for arm in get_args(hint) for bounds in _bounds(arm)]
    return []
