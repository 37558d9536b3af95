"""Layers of given values: what each says, laid over one another, and the sections they make."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from params.check import TRAIN
from params.errors import UserError
from params.munichus import LANGUAGE_NAMES
from params.schema import Schema
from params.yamlfile import Given

Layer = dict[str, Given]
ALL_LANGUAGES = "all"  # in data.languages: every one that has a name


def set_layers(overrides: Sequence[str], problems: list[str], *, identity: Sequence[str] = ()) -> list[Layer]:
    """One layer of values that replace, and one for each mapping or entry of it, since these add up."""
    layer: Layer = {}
    mappings: list[Layer] = []
    for text in overrides:
        key, equals, value = (part.strip() for part in text.partition("="))
        whole, entry = ".".join(key.split(".")[:2]), ".".join(key.split(".")[2:])  # data.columns, caption
        if not equals:
            problems.append(f"--set {text}: expected section.field=value, such as sft.lr=2e-4.")
        elif key in identity:
            problems.append(
                f"--set {key}: say it on the command line instead (inft train MODEL --training-mode --method --demo)."
            )
        elif TRAIN.is_mapping(key):
            mappings.append({key: Given(value, "--set", is_text=True)})
        elif entry and TRAIN.is_mapping(whole):
            mappings.append({whole: Given({entry: value}, "--set")})
        else:
            layer[key] = Given(value, "--set", is_text=True)
    return [layer, *mappings]


def directories(layer: Layer, problems: list[str]) -> Layer:
    """The layer with ~ expanded in directories, as a shell would; an empty one is a mistake, not the current one."""
    found = dict(layer)
    for key, given in layer.items():
        if key.endswith("_dir") and isinstance(given.value, str):
            if not given.value.strip():
                problems.append(f"{given.origin}: {key} is empty: name a directory.")
            found[key] = given._replace(value=os.path.expanduser(given.value))
    return found


def merged(layers: Sequence[Layer], problems: list[str], schema: Schema = TRAIN) -> dict[str, Any]:
    """The checked values of the layers; later ones win, and mappings gain entries, from the default's onwards."""
    values: dict[str, Any] = {}
    for layer in layers:
        for key, value in schema.checked(layer, problems).items():
            if isinstance(value, Mapping):
                section, _, name = key.partition(".")
                value = {**values.get(key, getattr(schema.sections[section](), name)), **value}
            values[key] = value
    if values.get("data.languages") == (ALL_LANGUAGES,):
        values["data.languages"] = tuple(values.get("data.language_names", LANGUAGE_NAMES))
    return values


def user_error(problems: Sequence[str]) -> UserError:
    """One error that lists everything wrong."""
    if len(problems) == 1:
        return UserError(problems[0])
    return UserError(
        f"{len(problems)} errors in the parameters:\n" + "\n".join(f"  - {problem}" for problem in problems)
    )
