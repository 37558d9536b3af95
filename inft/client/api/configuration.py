"""A client's configuration as a JSON schema, made of params/client.py: types, ranges, defaults and comments."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter

from inft.client.api.errors import finite
from params.bounds import Bounds
from params.client import TrainingConfig
from params.client_resolve import SECTIONS

_COMMENT = re.compile(r"    (\w+): .+?  # (.+)")


@cache
def configuration_schema() -> dict[str, Any]:
    """Return the schema of TrainingConfig; a configuration that fits it can still contradict itself."""
    schema = _section(TrainingConfig)
    schema["examples"] = [{"model_ref": "embedded/text", "lora_config": {"rank": 8}, "batch_size": 4, "seed": 0}]
    return schema


def _section(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    lines = inspect.getsource(kind).splitlines()
    comments = {match[1]: match[2] for line in lines if (match := _COMMENT.match(line))}
    properties = {field.name: _field(field, hints[field.name], comments.get(field.name)) for field in fields(kind)}
    return {
        "type": "object",
        "title": kind.__name__,
        "description": str(inspect.getdoc(kind)),
        "properties": properties,
        "required": [name for name, schema in properties.items() if "default" not in schema and name not in SECTIONS],
        "additionalProperties": False,
    }


def _field(field: "Field[Any]", hint: Any, comment: str | None) -> dict[str, Any]:
    if field.name in SECTIONS:
        section = _section(SECTIONS[field.name])
        return {"anyOf": [section, {"type": "null"}]} if NoneType in get_args(hint) else section
    schema = _type(hint)
    if comment is not None:
        schema["description"] = comment
    if field.default is not MISSING:
        schema["default"] = finite(field.default)
    elif field.default_factory is not MISSING:
        schema["default"] = field.default_factory()
    return schema


def _type(hint: Any) -> dict[str, Any]:
    """A value's schema, with its range; sequences of a fixed length as lists of that length."""
    arms = get_args(hint)
    if get_origin(hint) is Annotated:
        return _bounded(_type(arms[0]), next(item for item in arms[1:] if isinstance(item, Bounds)))
    if NoneType in arms:
        return {"anyOf": [_type(next(arm for arm in arms if arm is not NoneType)), {"type": "null"}]}
    if get_origin(hint) is tuple:
        length = {} if arms[-1] is Ellipsis else {"minItems": len(arms), "maxItems": len(arms)}
        return {"type": "array", "items": _type(arms[0])} | length
    if get_origin(hint) is Mapping:
        return {"type": "object", "additionalProperties": TypeAdapter(arms[1]).json_schema()}
    return TypeAdapter(hint).json_schema()


def _bounded(schema: dict[str, Any], bounds: Bounds) -> dict[str, Any]:
    schema["minimum" if bounds.low_included else "exclusiveMinimum"] = bounds.low
    if bounds.high != float("inf"):
        schema["maximum" if bounds.high_included else "exclusiveMaximum"] = bounds.high
    return schema
