"""Fonts for captions in any of the ten languages: for matplotlib's figures, and cut down to what a page shows.

The fonts are those of the package weblate-fonts (Kurinto Sans, SIL Open Font License), which the extra `eval` installs:
Latin, Arabic with Urdu's letters, Devanagari and Sinhala in one file, Han characters in a file per country. Nothing is
downloaded and no font of the system is needed.
"""

import base64
import io
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

FONTS_EXTRA = "pip install 'inft[eval]'"
PACKAGE = "weblate_fonts"
FOLDER = "static/weblate_fonts/kurinto/ttf"
MATPLOTLIBS = "DejaVu Sans"  # comes with matplotlib; has Latin and Arabic
EVERYWHERE = ("", "SC", "JP", "TC", "KR")  # the files, by their suffix, in the order in which a character is looked up
# The shapes of Han characters differ by country: these languages ask another file first.
FIRST = {"ja": "JP", "zh": "SC", "yue": "TC", "zh-hant": "TC", "zh-tw": "TC", "zh-hk": "TC", "ko": "KR"}
SHAPED = (0x0590, 0x2000)  # code points of the scripts, Hebrew to Greek Extended, whose signs may be shaped as several
CODE = re.compile(r"[A-Za-z]+(-[A-Za-z0-9]+)*")  # a language that may stand in a style sheet
LICENCE_NAMES = [0, 13, 14]  # entries of a font's name table: copyright, licence and where to read it


class WebFont(NamedTuple):
    """A font with the characters of one page only."""

    family: str  # a name of ours: the licence reserves the original one for unchanged fonts
    woff: str  # WOFF 1.0 in base64


class PageFonts(NamedTuple):
    """What a page needs to show its text on a machine without fonts."""

    fonts: tuple[WebFont, ...]
    families: tuple[str, ...]  # in the order in which a browser asks them
    by_language: dict[str, tuple[str, ...]]  # where the order is another one


@cache
def installed_fonts() -> dict[str, Path]:
    """Suffix -> file of the fonts of weblate-fonts; empty when it is not installed."""
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        return {}
    folder = Path(found.origin).parent / FOLDER
    files = {suffix: folder / f"KurintoSans{suffix}-Rg.ttf" for suffix in EVERYWHERE}
    return {suffix: file for suffix, file in files.items() if file.is_file()}


def rc_fonts(language: str | None = None) -> dict[str, list[str]]:
    """Settings for matplotlib's rc_context under which every script is drawn, as the language writes it.

    The fonts are made known to matplotlib; its settings outside of the context stay as they are.
    """
    return {"font.family": families(language)}


def families(language: str | None = None) -> list[str]:
    """The families that matplotlib asks for a character, one after the other."""
    _register(tuple(installed_fonts().values()))
    return [MATPLOTLIBS, *(_family(suffix) for suffix in _order(language) if suffix in installed_fonts())]


def missing_characters(text: str) -> str:
    """The characters of a text that no available font shows, each once; spaces and controls are not shown anyway."""
    files = [_matplotlibs_file(), *installed_fonts().values()]
    visible = (one for one in dict.fromkeys(text) if unicodedata.category(one) not in ("Cc", "Cf", "Zs", "Zl", "Zp"))
    return "".join(one for one in visible if not any(ord(one) in _covered(file) for file in files))


def page_fonts(texts: Iterable[tuple[str | None, str]]) -> PageFonts:
    """Cut the fonts down to the texts, given as (language, text); nothing without weblate-fonts."""
    fonts = installed_fonts()
    wanted: dict[str, set[str]] = defaultdict(set)
    languages = set()
    for language, text in texts:
        order = [suffix for suffix in _order(language) if suffix in fonts]
        languages.add(language)
        for character in set(text):
            suffix = next((suffix for suffix in order if ord(character) in _covered(fonts[suffix])), None)
            if suffix is not None:
                wanted[suffix].update(_with_parts(character))
    used = [suffix for suffix in EVERYWHERE if suffix in wanted]
    return PageFonts(
        fonts=tuple(WebFont(_page_family(suffix), _subset(suffix, wanted[suffix])) for suffix in used),
        families=tuple(_page_family(suffix) for suffix in used),
        by_language={
            language: tuple(_page_family(suffix) for suffix in _order(language) if suffix in used)
            for language in sorted(language for language in languages if language is not None)
            if used and _order(language) != EVERYWHERE and CODE.fullmatch(language)
        },
    )


def _with_parts(character: str) -> Iterator[str]:
    """A character with those that shaping may put in its place: the two halves of a Sinhala or Bengali vowel sign.

    They are of its own script, so of the alphabets and syllabaries between Hebrew and the punctuation whole blocks of
    128 code points are taken.
    """
    yield character
    if SHAPED[0] <= ord(character) < SHAPED[1]:
        first = ord(character) - ord(character) % 128
        yield from map(chr, range(first, first + 128))


def _order(language: str | None) -> Sequence[str]:
    """The suffixes in the order in which a language asks them."""
    code = (language or "").casefold().replace("_", "-")
    first = FIRST.get(code) or FIRST.get(code.partition("-")[0])
    if first is None:
        return EVERYWHERE
    return (first, *(suffix for suffix in EVERYWHERE if suffix != first))


def _family(suffix: str) -> str:
    return f"Kurinto Sans {suffix}".strip()


def _page_family(suffix: str) -> str:
    return f"Report Sans {suffix}".strip()


@cache
def _register(files: Sequence[Path]) -> None:
    """Make the fonts known to matplotlib, bold ones too, once a process."""
    from matplotlib.font_manager import fontManager

    for regular in files:
        bold = regular.with_name(regular.name.replace("-Rg", "-Bd"))
        for file in (regular, bold):
            if file.is_file():
                fontManager.addfont(file)


def _matplotlibs_file() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _covered(file: Path) -> frozenset[int]:
    """The code points that a font file has glyphs for."""
    from fontTools.ttLib import TTFont

    with TTFont(file, lazy=True) as font:
        return frozenset(font.getBestCmap())


def _subset(suffix: str, characters: Iterable[str]) -> str:
    """The font with these characters, what shapes and places them, and its licence, as WOFF in base64."""
    from fontTools import subset
    from fontTools.ttLib import TTFont

    options: Any = subset.Options(hinting=False, name_IDs=LICENCE_NAMES, notdef_outline=True)
    cutter = subset.Subsetter(options)
    cutter.populate(text="".join(sorted(characters)))
    packed = io.BytesIO()
    with TTFont(installed_fonts()[suffix], lazy=True, recalcTimestamp=False) as font:
        cutter.subset(font)
        font["name"].setName(_page_family(suffix), 1, 3, 1, 0x409)
        font.flavor = "woff"
        font.save(packed)
    return base64.b64encode(packed.getvalue()).decode("ascii")
