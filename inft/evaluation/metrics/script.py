"""Scripts: which one a text is written in, and which one its language asks for."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache

CJK = "CJK"  # Unicode's name of Han characters

SCRIPTS: Mapping[str, frozenset[str]] = {
    "ar": frozenset({"ARABIC"}),
    "en": frozenset({"LATIN"}),
    "fr": frozenset({"LATIN"}),
    "hi": frozenset({"DEVANAGARI"}),
    "id": frozenset({"LATIN"}),
    "ja": frozenset({"HIRAGANA", "KATAKANA", CJK}),
    "si": frozenset({"SINHALA"}),
    "ur": frozenset({"ARABIC"}),
    "yue": frozenset({CJK}),
    "zh": frozenset({CJK}),
}
# For other languages: the commonest scripts of the references that together hold this share of their letters.
# A share nearer to one would let the Latin names in a text pass for its script.
MAIN_SHARE = 0.75
RENAMED: Mapping[str, str | None] = {
    "IDEOGRAPHIC": CJK,  # 々 and 〆
    "KATAKANA-HIRAGANA": "KATAKANA",  # ー, which both use
    "MODIFIER": None,  # ʼ and ʻ, which many scripts use
}


@cache
def script_of(character: str) -> str | None:
    """The script of a letter by its Unicode name, such as LATIN; None for what is no letter of one script."""
    if not unicodedata.category(character).startswith("L"):
        return None
    plain = unicodedata.normalize("NFKC", character)[0]  # halfwidth, fullwidth and mathematical letters
    first = unicodedata.name(plain, "").split(" ")[0]
    return RENAMED.get(first, first) if unicodedata.category(plain).startswith("L") else None


def script_counts(text: str) -> Counter[str]:
    """How many letters of a text are of which script; marks, digits and punctuation are no letters."""
    found: Counter[str] = Counter()
    for character, count in Counter(text).items():
        script = script_of(character)
        if script is not None:
            found[script] += count
    return found


def base_code(language: str) -> str:
    """A language code without region and script: zh of zh-Hant_TW."""
    return re.split("[-_]", language.casefold())[0]


def expected_scripts(language: str, references: Iterable[str]) -> frozenset[str]:
    """The scripts that captions in a language are written in.

    Those of SCRIPTS; for a language that is not there, and for a code that names its script (hi-Latn), the commonest
    scripts of the references that together hold MAIN_SHARE of their letters.
    """
    names_script = any(len(part) == 4 and part.isalpha() for part in re.split("[-_]", language)[1:])
    if base_code(language) in SCRIPTS and not names_script:
        return SCRIPTS[base_code(language)]
    counts = script_counts("".join(references))
    main: set[str] = set()
    for script, _ in counts.most_common():
        if sum(counts[found] for found in main) < MAIN_SHARE * counts.total():
            main.add(script)
    return frozenset(main)


def in_wrong_script(caption: str, references: Iterable[str], expected: frozenset[str]) -> bool:
    """Whether less than half of a caption's letters are of the expected scripts.

    A caption without letters, an empty one too, is wrong unless its references have none either.
    """
    counts = script_counts(caption)
    if not counts:
        return any(script_counts(reference) for reference in references)
    return 2 * sum(counts[script] for script in expected) < counts.total()
