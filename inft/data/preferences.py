"""Rows with a better and a worse answer, and prompts that rows bring along: texts or conversations, as TRL has them.

A prompt is a text or ``[{"role": "user", "content": …}]``. An answer is a text, the same with the role assistant, or
both turns, whose second is the answer. Content is a text or a list of parts, of which the texts count.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inft.data.prompts import clean_line, keep_spacing, visible_line

_SHOWN = 60  # characters of a value that a reason quotes


class Unusable(ValueError):
    """Why a row cannot be used; the words follow its place: "its rejected is empty"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """What a row of preferences says, without control characters; lines and their spacing stay as they are."""

    prompt: str  # "": the row brings none along
    chosen: str
    rejected: str


def read_preference(values: Mapping[str, Any]) -> Preference:
    """Return the preference of a record's own prompt (where it has that column), chosen and rejected.

    Errors: Unusable for answers that are equal, empty or no text, for an empty prompt and for a conversation of more
    turns than a question and its answer.
    """
    told = read_prompt(values["prompt"]) if "prompt" in values else ""
    asked, chosen = read_answer(values["chosen"], "chosen")
    asked_too, rejected = read_answer(values.get("rejected"), "rejected")
    if clean_line(asked) != clean_line(asked_too):
        raise Unusable(f"its chosen answers {_quoted(asked)}, its rejected {_quoted(asked_too)}: they are no pair")
    if told and asked and clean_line(told) != clean_line(asked):
        raise Unusable(f"its prompt is {_quoted(told)}, but its answers are to {_quoted(asked)}")
    if chosen == rejected:
        raise Unusable(f"its chosen and its rejected are equal: {_quoted(chosen)}")
    return Preference(prompt=told or asked, chosen=chosen, rejected=rejected)


def read_prompt(value: Any) -> str:
    """Return the text of a prompt; Unusable for an empty one and for a conversation of more than one user turn."""
    if not isinstance(value, list | tuple):
        return _visible(value, "prompt")
    turns = _turns(value, "prompt")
    if [role for role, _ in turns] != ["user"]:
        raise Unusable(
            f"its prompt has the turns {', '.join(role for role, _ in turns) or 'none'}; here it is one user turn"
        )
    return turns[0][1]


def read_answer(value: Any, ours: str) -> tuple[str, str]:
    """Return what the answer is to ("" where it does not say) and the answer; Unusable for more than one of each."""
    if not isinstance(value, list | tuple):
        return "", _visible(value, ours)
    turns = _turns(value, ours)
    roles = [role for role, _ in turns]
    if roles not in (["assistant"], ["user", "assistant"]):
        raise Unusable(
            f"its {ours} has the turns {', '.join(roles) or 'none'}; here it is one assistant turn, or a user's and it"
        )
    return turns[0][1] if len(turns) > 1 else "", turns[-1][1]


def _turns(value: list[Any] | tuple[Any, ...], ours: str) -> list[tuple[str, str]]:
    """Role and text of each turn of a conversation."""
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise Unusable(f"its {ours} has the turn {_quoted(turn)}, which is no object with a role and a content")
        turns.append((turn["role"], _visible(_content(turn.get("content")), ours)))
    return turns


def _content(content: Any) -> Any:
    """The text of a turn: of its parts those that are text, since images come from the row's own column."""
    if not isinstance(content, list | tuple):
        return content
    parts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    return "\n".join(part for part in parts if isinstance(part, str))


def _visible(value: Any, ours: str) -> str:
    if not isinstance(value, str | None):
        raise Unusable(f"its {ours} is {type(value).__name__} {_quoted(value)}, not text")
    if not visible_line(value or ""):
        raise Unusable(f"its {ours} is empty")
    return keep_spacing(value or "")


def _quoted(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
