"""Options that take their help and default from a parameter's field."""

from typing import Any

import typer

from params.describe import describe_field


def field_option(key: str, *, metavar: str, default: str | None = None) -> Any:
    """An option for the field, such as "sft.lr"; its text is converted and checked by params.resolve, not here."""
    text = describe_field(key)
    assert text.help, f"{key} has no comment on its line"
    default = default or text.default
    shown = "" if default == "none" else f"(default {default})"
    words = f"{text.help[:1].upper()}{text.help[1:]} {shown}".strip()
    return typer.Option(metavar=metavar, help=words, show_default=False)
