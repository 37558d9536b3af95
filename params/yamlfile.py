"""YAML parameter files: each value read with the line it stands on, for messages; written so that it reads back."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from params.errors import UserError

if TYPE_CHECKING:
    import yaml


class Given(NamedTuple):
    """A value somebody gave, and where: "--set sft.lr", "run.yaml line 4"."""

    value: Any
    origin: str
    is_text: bool = False  # from a command line, where "none" and "a,b" stand for None and a list


def read_yaml(path: Path) -> tuple[dict[str, Given], list[str]]:
    """Read a file of sections into ``{"sft.lr": Given(...)}``; keys outside a section keep their plain name.

    Returns the values and the problems found (repeated keys); raises UserError when the file cannot be read at all.
    """
    import yaml

    values: dict[str, Given] = {}
    problems: list[str] = []
    try:
        loader = yaml.SafeLoader(_text(path))
        root = loader.get_single_node()
        if root is None:
            return {}, []
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path} line 1: expected sections such as `sft:` with fields below them.")
        loader.construct_document(root)  # finds tags and keys that plain data does not have
        for key, node in _items(root, path, problems, prefix=""):
            if isinstance(node, yaml.MappingNode) and node.value:
                for name, leaf in _items(node, path, problems, prefix=f"{key}."):
                    values[name] = Given(loader.construct_object(leaf, deep=True), _place(path, leaf))
            else:
                values[key] = Given(loader.construct_object(node, deep=True), _place(path, node))
    except yaml.YAMLError as error:
        raise UserError(_syntax_message(path, error)) from error
    return values, problems


def write_yaml(data: Any) -> str:
    """Plain data as YAML text that reads back equal; text in any script stays legible."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes text with line separators, which a plain scalar would lose."""

    def represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        style = None if text.replace("\n", "").isprintable() else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, represent_text)
    return yaml.dump(_plain(data), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    """Tuples as lists and mappings as dicts."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}).") from error


def _items(
    mapping: "yaml.MappingNode", path: Path, problems: list[str], *, prefix: str
) -> list[tuple[str, "yaml.Node"]]:
    items: dict[str, yaml.Node] = {}
    for key_node, value_node in mapping.value:
        key = f"{prefix}{key_node.value}"
        if key in items:
            problems.append(f"{_place(path, key_node)}: {key} is given twice.")
        items[key] = value_node
    return list(items.items())


def _place(path: Path, node: "yaml.Node") -> str:
    return f"{path} line {node.start_mark.line + 1}"


def _syntax_message(path: Path, error: "yaml.YAMLError") -> str:
    import yaml

    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{path} line {mark.line + 1}, column {mark.column + 1}: not valid YAML: {error.problem}."
    return f"{path}: not valid YAML: {error}."
