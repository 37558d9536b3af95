"""The curves of runs: which figures of a log are drawn, each in which panel, one run alone or several together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from inft.training.logfiles import Event
from params.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Panel(NamedTuple):
    """One of the pictures: its title, where its figures come from, and its axis."""

    title: str
    event: str
    keys: tuple[str, ...]  # a curve each; "captions/chrf" is also the entry chrf of a mapping captions
    logarithmic: bool = False


PANELS = (
    Panel("training loss", "log", ("loss",)),
    Panel("evaluation loss", "eval", ("loss",)),
    Panel("learning rate", "log", ("learning_rate",)),
    Panel("gradient norm", "log", ("grad_norm",), logarithmic=True),
)
# Drawn below them where a run has them, each group a row: CRAFT, --eval-captions, the methods, text encoders.
MORE_PANELS = (
    (
        Panel("losses of CRAFT", "log", ("loss/craft_contrast", "loss/craft_sft", "loss/craft_total")),
        Panel(
            "metrics of CRAFT",
            "log",
            (
                "metrics/craft_contrastive_accuracy",
                "metrics/craft_representation_consistency",
                "metrics/craft_temperature",
            ),
        ),
    ),
    (
        Panel("captions during training", "eval", ("captions/chrf", "captions/bleu4", "captions/exact")),
        Panel("CIDEr during training", "eval", ("captions/cider",)),
    ),
    (
        Panel("held-out preferences ranked right", "eval", ("rewards/accuracies",)),
        Panel("reward of the chosen answer less that of the rejected", "eval", ("rewards/margins",)),
    ),
    (
        Panel("reward of sampled answers", "log", ("reward",)),
        Panel("reward of held-out answers", "eval", ("reward",)),
    ),
    (
        Panel("masked tokens predicted in training", "log", ("accuracy",)),
        Panel("masked tokens predicted in held-out documents", "eval", ("accuracy",)),
    ),
    (
        Panel("positives found in their batch", "log", ("in_batch_accuracy",)),
        Panel("held-out retrieval", "eval", ("recall_at_1", "recall_at_10", "ndcg_at_10", "mrr")),
    ),
)
STYLES = ("-", "--", ":", "-.")  # of a panel's keys, where the colour says the run
Curve = tuple[list[int], list[float]]  # steps, values
Curves = Mapping[str, Mapping[str, Curve]]  # run -> key -> curve


def points(events: Sequence[Event], *, event: str, key: str) -> Curve:
    """Steps and values of one figure; of a step that was run again after a resume, the later value."""
    found = {
        item["step"]: float(value)
        for item in events
        if item.get("event") == event and (value := _figure(item, key)) is not None and item.get("step") is not None
    }
    return sorted(found), [found[step] for step in sorted(found)]


def plot_run(events: Sequence[Event], *, title: str, target: Path) -> None:
    """Draw the run into `target`; UserError when nothing has been logged yet or the file cannot be written."""
    figure = draw_runs({title: events})
    if figure is None:
        raise UserError(f"{title}: no figures are logged yet; wait for the first log or eval event.")
    figure.suptitle(title)
    try:
        figure.savefig(target, dpi=120)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}.") from error


def draw_runs(runs: Mapping[str, Sequence[Event]], *, colours: Mapping[str, str] | None = None) -> "Figure | None":
    """The curves of the runs, by their names, in the same axes; None when none of them has logged a figure.

    With several runs a curve has its run's colour, by default one of matplotlib's cycle, and its key's line style.
    """
    from matplotlib.figure import Figure

    if not any(_curves(runs, panel) for panel in PANELS):
        return None
    panels = [*PANELS, *(panel for row in MORE_PANELS if any(_curves(runs, one) for one in row) for panel in row)]
    colours = colours or {name: f"C{number}" for number, name in enumerate(runs)}
    rows = len(panels) // 2
    figure = Figure(figsize=(10, 3.25 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, sharex=True)
    for axis, panel in zip(axes.flat, panels, strict=True):
        _draw(axis, panel, _curves(runs, panel), colours=colours, several=len(runs) > 1)
    for name, events in runs.items():
        _mark_best(axes.flat[1], events, colour=colours[name] if len(runs) > 1 else "tab:green", told=len(runs) == 1)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
        axis.xaxis.get_major_locator().set_params(integer=True)
    if len(runs) > 1:
        _legend_of_runs(figure, colours)
    return figure


def _figure(event: Event, key: str) -> Any:
    """The figure of an event, or of a mapping in it, by its key; None when it has none."""
    outer, _, inner = key.partition("/")
    nested = event.get(outer)
    return event.get(key, nested.get(inner) if isinstance(nested, Mapping) else None)


def _curves(runs: Mapping[str, Sequence[Event]], panel: Panel) -> dict[str, dict[str, Curve]]:
    """The curves of a panel that have points, by run and key; without the runs that have none."""
    found = {}
    for name, events in runs.items():
        curves = {key: points(events, event=panel.event, key=key) for key in panel.keys}
        curves = {key: curve for key, curve in curves.items() if curve[0]}
        if curves:
            found[name] = curves
    return found


def _draw(axis: Any, panel: Panel, runs: Curves, *, colours: Mapping[str, str], several: bool) -> None:
    axis.set_title(panel.title, fontsize=10)
    axis.grid(alpha=0.3)
    if not runs:
        axis.text(0.5, 0.5, "none yet", transform=axis.transAxes, ha="center", color="grey")
        return
    for name, curves in runs.items():
        for key, (steps, values) in curves.items():
            line = {"label": key, "marker": "o" if len(steps) < 40 else None, "markersize": 3, "linewidth": 1.3}
            if several or len(panel.keys) == 1:
                line["color"] = colours[name]
            if several:
                line["linestyle"] = STYLES[panel.keys.index(key) % len(STYLES)]
            axis.plot(steps, values, **line)
    if len(panel.keys) > 1:
        _legend_of_keys(axis, panel, runs, several=several)
    if panel.logarithmic and all(v > 0 for curves in runs.values() for _, values in curves.values() for v in values):
        _logarithmic(axis)


def _logarithmic(axis: Any) -> None:
    """A logarithmic axis with plain numbers: formulas need a setting that a caller may have turned off."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _legend_of_keys(axis: Any, panel: Panel, runs: Curves, *, several: bool) -> None:
    if not several:
        axis.legend(fontsize=8)
        return
    from matplotlib.lines import Line2D

    drawn = [key for key in panel.keys if any(key in curves for curves in runs.values())]
    styles = [STYLES[panel.keys.index(key) % len(STYLES)] for key in drawn]
    lines = [Line2D([], [], color="0.3", linewidth=1.3, linestyle=style) for style in styles]
    axis.legend(lines, drawn, fontsize=8, handlelength=3)


def _legend_of_runs(figure: "Figure", colours: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colour, linewidth=2.5) for colour in colours.values()]
    figure.legend(lines, list(colours), loc="outside upper left", ncols=min(4, len(lines)), frameon=False)


def _mark_best(axis: Any, events: Sequence[Event], *, colour: str, told: bool) -> None:
    """A line at the step of the stored adapter, with its figure when there is room to tell it."""
    best = [event for event in events if event.get("event") == "best" and event.get("value") is not None]
    if not best:
        return
    step, value, metric = best[-1]["step"], float(best[-1]["value"]), best[-1].get("metric")
    axis.axvline(step, color=colour, linestyle="--", linewidth=1)
    if not told:
        return
    first, last = axis.get_xlim()
    leftwards = step > (first + last) / 2
    axis.annotate(
        f"best {'' if metric in (None, 'eval_loss') else f'{metric} '}{value:.4g} @ {step}",
        (step, 0.96),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if leftwards else 4, 0),
        textcoords="offset points",
        ha="right" if leftwards else "left",
        va="top",
        fontsize=8,
        color=colour,
    )
