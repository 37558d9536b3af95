"""The gallery of a report as one figure: a row each of image, reference and captions, every script as it is written."""

import io
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from inft.evaluation.fonts import families
from inft.evaluation.report_gallery import Caption, Gallery, GalleryRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PER_LANGUAGE = 2  # rows of each
WIDTH, COLUMN = 11.0, 2.0  # inches: of the figure, and of a column of text, at least
DPI = 140  # of all figures; widths of text depend on it, since letters are fitted to pixels
ROW = 0.92  # inches
HEAD = 0.55  # inches
IMAGE = 1.25  # inches from the left edge to the first text, where there are images
LINES = 4  # of a caption at most
LONG_WORD = 12  # characters; shorter ones fit into every cell
JOINER = "\u200d"  # zero width: joins the letters around it
INK, PALE, GOOD, BAD = "#24292f", "#6b737c", "#116329", "#b42318"


class _Text(NamedTuple):
    """What a cell says and how."""

    text: str
    colour: str = INK
    tag: str = ""  # in small letters below it


def gallery_text(found: Gallery) -> str:
    """All that users and models wrote and the figure shows."""
    return "".join(
        f"{text}{'' if head is None else head.label}"
        for row in _rows(found)
        for head, (text, _, _) in zip([None, *found.systems], _texts(row), strict=True)
    )


def draw_gallery(found: Gallery) -> "Figure | None":
    """The first rows of each language; None when there are none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _rows(found)
    if not rows:
        return None
    first, columns = (IMAGE if found.with_images else 0.45), 1 + len(found.systems)
    width, height = max(WIDTH, first + COLUMN * columns), HEAD + ROW * len(rows)
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)  # which measures texts
    spans = [(left + 0.06, right - 0.06) for left, right in pairwise(_edges(first, width, columns))]
    for span, head in zip(spans, _heads(found), strict=True):
        _write(figure, head, span, height - 0.1, weight="bold", lines=2)
    for number, row in enumerate(rows):
        top = height - HEAD - ROW * number  # inches above the lower edge, as all heights here
        _line(figure, width, top)
        figure.text(0.06, top - ROW / 2, row.language, va="center", color=PALE, transform=figure.dpi_scale_trans)
        if found.with_images:
            _image(figure, row, (0.4, top - ROW + 0.05, 0.8, ROW - 0.1))
        for span, text in zip(spans, _texts(row), strict=True):
            _write(figure, text, span, top - 0.1, language=row.language)
    return figure


def _edges(first: float, width: float, columns: int) -> list[float]:
    """Where the columns of text begin, and the last one ends."""
    return [first + (width - first) * number / columns for number in range(columns + 1)]


def _rows(found: Gallery) -> list[GalleryRow]:
    return [row for rows in found.rows.values() for row in rows[:PER_LANGUAGE]]


def _texts(row: GalleryRow) -> list[_Text]:
    """The reference and then the captions."""
    return [_Text(row.references[0]), *(_said(caption) for caption in row.captions)]


def _said(caption: Caption) -> _Text:
    if caption.error:
        return _Text(f"not captioned: {caption.error}", BAD)
    if caption.absent or caption.empty:
        return _Text("not yet" if caption.absent else "(empty)", PALE)
    return _Text(caption.text, GOOD, "exact") if caption.exact else _Text(caption.text)


def _heads(found: Gallery) -> list[_Text]:
    after = [_Text(f"after: {one.label}", one.colour) for one in found.systems if one.run is not None]
    before = [_Text(f"before: {one.label}") for one in found.systems if one.run is None]
    return [_Text("reference"), *before, *after]


def _line(figure: "Figure", width: float, y: float) -> None:
    from matplotlib.lines import Line2D

    line = Line2D([0.05, width - 0.05], [y, y], color="#dfe3e8", linewidth=0.8, transform=figure.dpi_scale_trans)
    figure.add_artist(line)


def _image(figure: "Figure", row: GalleryRow, place: tuple[float, float, float, float]) -> None:
    """Put the row's image at (left, bottom, width, height) in inches."""
    from PIL import Image

    width, height = figure.get_size_inches()
    left, bottom, wide, high = place
    axis = figure.add_axes((left / width, bottom / height, wide / width, high / height))
    axis.set_axis_off()
    if row.image is None:
        axis.text(0.5, 0.5, "no image", ha="center", va="center", color=PALE, fontsize=7)
        return
    with Image.open(io.BytesIO(row.image)) as image:
        axis.imshow(image)


def _write(
    figure: "Figure",
    said: _Text,
    span: tuple[float, float],
    top: float,
    *,
    language: str | None = None,
    weight: str = "normal",
    lines: int = LINES,
) -> None:
    """Write between two places, from the right one where the text runs from right to left; in inches."""
    right_to_left = _right_to_left(said.text)
    x, side = (span[1], "right") if right_to_left else (span[0], "left")
    style: Any = {"fontfamily": families(language), "fontweight": weight}
    wide = partial(_inches, figure, style)
    broken = "\n".join(wrapped(said.text, wide, span[1] - span[0], lines=lines))
    place: Any = {"color": said.colour, "ha": side, "transform": figure.dpi_scale_trans}
    figure.text(x, top, broken, va="top", linespacing=1.25, **place, **style)
    if said.tag:
        figure.text(x, top - ROW + 0.26, said.tag, fontsize=6.5, **place)


def _inches(figure: "Figure", style: Mapping[str, Any], text: str) -> float:
    """How wide a text is at the size of a caption."""
    from matplotlib.font_manager import FontProperties

    canvas: Any = figure.canvas
    font = FontProperties(family=style["fontfamily"], weight=style["fontweight"])
    width: float = canvas.get_renderer().get_text_width_height_descent(text, font, False)[0]
    return width / figure.dpi


def _right_to_left(text: str) -> bool:
    """Whether the first letter that has a direction runs from right to left."""
    strong = (way for way in map(unicodedata.bidirectional, text) if way in ("L", "R", "AL"))
    return next(strong, "L") != "L"


def wrapped(text: str, width: Callable[[str], float], limit: float, *, lines: int = LINES) -> list[str]:
    """Break a text into so many lines at most, none wider than the limit; the last ends with an ellipsis if cut."""
    found, line = [], ""
    for unit in _units(" ".join(text.split()), width, limit):
        if line and width((line + unit).rstrip()) > limit:
            found.append(line.rstrip())
            line = ""
        line += unit
    found.append(line.rstrip())
    if len(found) <= lines:
        return found
    last = found[lines - 1]
    while last and width(f"{last}…") > limit:
        last = last[:-1]
    return [*found[: lines - 1], f"{last}…"]


def _units(text: str, width: Callable[[str], float], limit: float) -> Iterator[str]:
    """What stays on one line: a word with the space after it, a wide character, a part of a word above the limit."""
    unit = ""
    for character in text:
        too_long = len(unit) >= LONG_WORD and width(unit + character) > limit
        if unit and _may_break(unit[-1], character, too_long=too_long):
            yield unit
            unit = ""
        unit += character
    if unit:
        yield unit


def _may_break(before: str, after: str, *, too_long: bool) -> bool:
    """Whether a line may end between two characters; never before a mark, nor before a stop at the end of a word."""
    if after == " " or unicodedata.category(after)[0] == "M" or JOINER in (before, after):
        return False
    if before == " ":
        return True
    hangs = unicodedata.category(after)[0] == "P"
    return too_long or (not hangs and (_wide(before) or _wide(after)))


def _wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"
