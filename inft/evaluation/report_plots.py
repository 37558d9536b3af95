"""The figures of a report, drawn by matplotlib for the page and as PNG files; none changes matplotlib's settings."""

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inft.evaluation.fonts import missing_characters, rc_fonts
from inft.evaluation.metrics import ALL, METRICS, Score, Scores
from inft.evaluation.report_compare import BASE_COLOURS, Comparison, System, colours_of
from inft.evaluation.report_forgetting import Forgotten
from inft.evaluation.report_gallery import Gallery, data_uri
from inft.evaluation.report_runs import Run
from inft.evaluation.report_sheet import DPI, draw_gallery, gallery_text
from inft.evaluation.verdict import JUDGE
from inft.training.curves import draw_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FALL = "#24292f", "#b42318"
BARS = ("bleu4", "chrf", "cider", "exact")
STYLE: Mapping[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa1a9",
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "xtick.color": "#3c4249",
    "ytick.color": "#3c4249",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "text.parse_math": False,  # a caption or a name may hold dollar signs
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawn figure."""

    name: str  # "curves": of its PNG file
    alt: str  # what it shows, for those who do not see it
    png: bytes

    @property
    def uri(self) -> str:
        """The picture as a data: address."""
        return data_uri(self.png, "image/png")


def curves(runs: Sequence[Run]) -> Picture | None:
    """Training curves of all runs that have a log."""
    events = {run.label: run.training.events for run in runs if run.training is not None and run.training.events}
    colours = {label: colour for label, colour in colours_of(runs).items() if label in events}
    alt = f"Training curves of {', '.join(events)}: losses, learning rate and gradient norm by optimizer step."
    return _picture("curves", alt, lambda: draw_runs(events, colours=colours))


def languages(comparison: Comparison) -> Picture | None:
    """Bars of the metrics per language with 95 % intervals, one panel a metric."""
    alt = f"BLEU-4, chrF, CIDEr and exact match per language on {comparison.title}; the table has the figures."
    return _picture("languages", alt, lambda: _languages(comparison))


def forgetting(found: Sequence[Forgotten]) -> Picture | None:
    """Base against adapter per language, and their differences."""
    alt = f"{METRICS[JUDGE].title} of base and adapter per language and their difference; the tables have the figures."
    return _picture("forgetting", alt, lambda: _forgetting(found))


def drift(systems: Sequence[System]) -> Picture | None:
    """CKA and cosine between base and adapter per layer."""
    alt = "CKA and cosine similarity of base and adapter per layer; the table has the figures."
    return _picture("drift", alt, lambda: _drift([one for one in systems if one.stored.drift is not None]))


def gallery(found: Gallery) -> Picture | None:
    """The first rows of each language: image, reference, and what each system wrote."""
    alt = f"Held-out rows of {found.title} with reference and captions."
    return _picture("gallery", alt, lambda: draw_gallery(found), text=gallery_text(found))


def _picture(name: str, alt: str, draw: "Callable[[], Figure | None]", *, text: str = "") -> Picture | None:
    """Draw in our own style; None when there is nothing to draw. ``text`` is what users wrote and is drawn."""
    from matplotlib import rc_context

    with rc_context({**STYLE, **rc_fonts()}), warnings.catch_warnings():
        if missing_characters(text):  # which the report tells once, instead of a warning for each
            warnings.filterwarnings("ignore", r"Glyph \d+")
        figure = draw()
        if figure is None:
            return None
        packed = io.BytesIO()
        figure.savefig(packed, dpi=DPI, format="png")
    return Picture(name=name, alt=alt, png=packed.getvalue())


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _languages(comparison: Comparison) -> "Figure | None":
    systems = comparison.scored
    shown = [name for name in BARS if any(name in of for one in systems for of in one.stored.scores.values())]
    if not shown:
        return None
    columns = 2 if len(comparison.languages) * len(systems) <= 40 else 1
    rows = math.ceil(len(shown) / columns)
    figure = _figure(11, 2.5 * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False)
    places = [*comparison.languages, ALL]
    for axis, name in zip(axes.flat, shown, strict=False):
        bars = {system.label: (system.colour, _of_metric(system.stored.scores, name)) for system in systems}
        _grouped_bars(axis, places, bars)
        axis.set_title(_with_unit(name))
        axis.axvline(len(places) - 1.5, color="#c3c8ce", linewidth=0.8)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    _legend(figure, [(system.label, system.colour) for system in systems])
    return figure


def _of_metric(scores: Scores, name: str) -> dict[str, Score]:
    return {language: of[name] for language, of in scores.items() if name in of}


def _with_unit(name: str) -> str:
    metric = METRICS[name]
    return f"{metric.title}, {metric.unit}" if metric.unit else metric.title


def _grouped_bars(axis: Any, places: Sequence[str], bars: Mapping[str, tuple[str, Mapping[str, Score]]]) -> None:
    """A group of bars with error bars at each place; a bar's colour is its system's."""
    width = 0.8 / max(len(bars), 1)
    for number, (colour, scores) in enumerate(bars.values()):
        here = [(place, scores[language]) for place, language in enumerate(places) if language in scores]
        middles = [place - 0.4 + width * (number + 0.5) for place, _ in here]
        _bars(axis, middles, [score for _, score in here], width=width * 0.92, colours=[colour] * len(here))
    _places(axis, places)


def _bars(
    axis: Any, middles: Sequence[float], scores: Sequence[Score], *, width: float, colours: Sequence[str]
) -> None:
    below = [max(0.0, score.value - score.low) for score in scores]
    above = [max(0.0, score.high - score.value) for score in scores]
    values = [score.value for score in scores]
    axis.bar(middles, values, width, color=colours)
    cap = min(2.0, 8 * width)
    axis.errorbar(middles, values, [below, above], fmt="none", ecolor=INK, elinewidth=0.8, capsize=cap)


def _places(axis: Any, places: Sequence[str]) -> None:
    """A language at each place of the horizontal axis."""
    axis.set_xticks(range(len(places)), places)
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(-0.6, len(places) - 0.4)
    axis.grid(axis="y")


def _legend(figure: "Figure", entries: Sequence[tuple[str, str]], *, more: Sequence[Any] = ()) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=label) for label, colour in entries]
    figure.legend(handles=[*handles, *more], loc="outside upper left", ncols=5, frameon=False)


def _forgetting(found: Sequence[Forgotten]) -> "Figure | None":
    if not found:
        return None
    figure = _figure(11, 2.7 * len(found) + 0.4)
    axes = figure.subplots(len(found), 2, squeeze=False, width_ratios=(3, 2))
    for (scores, difference), one in zip(axes, found, strict=True):
        _before_after(scores, one)
        _differences(difference, one)
    from matplotlib.lines import Line2D

    control = Line2D([], [], color=INK, marker="_", markersize=9, linestyle="none", label="with shuffled inputs")
    systems = [("base", BASE_COLOURS[0]), *((one.label, one.colour) for one in found)]
    _legend(figure, systems, more=[control])
    return figure


def _before_after(axis: Any, one: Forgotten) -> None:
    """Base and adapter side by side, and a stroke at what each scores with other rows' inputs."""
    of = one.forgetting
    pairs = {"base": (BASE_COLOURS[0], of.base), "adapter": (one.colour, of.adapter)}
    bars = {label: (colour, _of_metric(scores, JUDGE)) for label, (colour, scores) in pairs.items()}
    _grouped_bars(axis, one.languages, bars)
    for offset, scores in ((-0.2, of.base_shuffled), (0.2, of.adapter_shuffled)):
        values = [scores[language][JUDGE].value for language in one.languages]
        places = [place + offset for place in range(len(values))]
        axis.scatter(places, values, marker="_", s=120, color=INK, linewidth=1.6, zorder=3)
    _mark_could_do(axis, one)
    axis.set_title(f"{METRICS[JUDGE].title}, {one.label} (bold: the base could do)")


def _differences(axis: Any, one: Forgotten) -> None:
    """Adapter minus base; what was lost in red."""
    scores = _of_metric(one.forgetting.difference, JUDGE)
    colours = [FALL if language in one.worse_or_lost else BASE_COLOURS[0] for language in one.languages]
    _bars(axis, range(len(colours)), [scores[language] for language in one.languages], width=0.6, colours=colours)
    axis.axhline(0, color=INK, linewidth=0.8)
    _places(axis, one.languages)
    _mark_could_do(axis, one)
    axis.set_title("adapter − base (red: lost or worse)")


def _mark_could_do(axis: Any, one: Forgotten) -> None:
    for label, language in zip(axis.get_xticklabels(), one.languages, strict=True):
        could = language in one.forgetting.could_do
        label.set(fontweight="bold" if could else "normal", color=INK if could else "#7a828b")


def _drift(systems: Sequence[System]) -> "Figure | None":
    if not systems:
        return None
    figure = _figure(11, 3.0)
    axes = figure.subplots(1, 2, sharex=True)
    for axis, title in zip(axes, ("CKA (debiased, linear)", "mean cosine over tokens"), strict=True):
        for system in systems:
            of = system.stored.drift
            assert of is not None
            values = of.cka if title.startswith("CKA") else of.cosine
            axis.plot(of.layers, values, marker="o", markersize=3.5, color=system.colour, linewidth=1.5)
        axis.axhline(1, color="#9aa1a9", linewidth=0.8, linestyle=":")
        axis.set_title(title)
        axis.set_xlabel("layer (0: embeddings)")
        axis.grid()
        axis.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, [(system.label, system.colour) for system in systems])
    return figure
