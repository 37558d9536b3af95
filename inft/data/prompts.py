"""The user's turn of a row: the instruction in the language that is asked for, and the news text it quotes."""

import re
import unicodedata

from inft.sample import Prompt
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig

_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
_SPACING_CONTROL = re.compile(r"[\t\x0b\x0c\x1c-\x1f\x85]")  # vertical tab, form feed, separators: they part words
# Control codes, and lone surrogates, which no tokenizer can encode. Joiners and direction marks stay: they shape
# Sinhala, Hindi and Urdu.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x9f\ud800-\udfff]")
_INVISIBLE = ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp")  # Unicode's control, format, surrogate and separator characters
_WORD_BOUNDARY_SHARE = 0.75  # a boundary before this share of the limit would throw too much text away


def build_prompt(config: MUNIChusLoadConfig, *, language: str, title: str, content: str, own: str = "") -> Prompt:
    """Return the prompt of one row; the text that ``config.context`` names is its news, ``own`` its own instruction.

    Errors: UserError for a language without a name and for a placeholder other than {language}.
    """
    context = {"content": content, "title": title, "none": ""}[config.context]
    return Prompt(
        instruction=own or instruction(config, language),
        news=cut_at_word(clean_text(context), config.max_context_chars),
    )


def instruction(config: MUNIChusLoadConfig, language: str) -> str:
    """Return the instruction with {language} replaced by the name of the language."""
    unknown = [name for name in _PLACEHOLDER.findall(config.instruction) if name != "language"]
    if unknown:
        raise UserError(
            f"data.instruction has the unknown placeholder {{{unknown[0]}}}. The only one is {{language}}: "
            "take it out or write it without braces."
        )
    if language not in config.language_names:
        raise UserError(
            f"language {language!r} has no name for the prompt. Known: {', '.join(config.language_names)}. "
            f"Add one with --set data.language_names.{language}=NAME."
        )
    return config.instruction.replace("{language}", config.language_names[language])


def clean_text(text: str) -> str:
    """Return the text without control characters, with single spaces and at most one empty line in a row."""
    text = _CONTROL.sub("", _SPACING_CONTROL.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n")))
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def keep_spacing(text: str) -> str:
    """Return the text without control characters and without whitespace around it; its lines keep their spacing."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROL.sub("", _SPACING_CONTROL.sub(lambda found: "\t" if found[0] == "\t" else " ", text)).strip()


def clean_line(text: str) -> str:
    """Return the text as one line: no control characters, every run of whitespace a single space."""
    return " ".join(clean_text(text).split())


def visible_line(text: str) -> str:
    """Return the text as clean_line does; empty when no character of it can be seen."""
    line = clean_line(text)
    return line if any(unicodedata.category(character) not in _INVISIBLE for character in line) else ""


def cut_at_word(text: str, limit: int) -> str:
    """Return at most ``limit`` characters, cut at a space where one is near, never inside a combined character."""
    if len(text) <= limit:
        return text
    if limit == 0:
        return ""
    cut = limit
    if not text[cut].isspace():
        boundary = max(text.rfind(" ", 0, cut), text.rfind("\n", 0, cut))
        cut = boundary if boundary >= _WORD_BOUNDARY_SHARE * limit else _before_combined(text, cut)
    return text[:cut].rstrip()


def _before_combined(text: str, cut: int) -> int:
    """Move a cut back to before the character that the marks behind it belong to."""
    joiner = "\u200d"
    while cut > 0 and (unicodedata.category(text[cut]) in ("Mn", "Mc", "Me", "Cf") or text[cut - 1] == joiner):
        cut -= 1
    return cut
