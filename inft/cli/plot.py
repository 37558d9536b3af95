"""The curves of a run as one PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from inft.cli.logfiles import Event
from params.errors import UserError


class Panel(NamedTuple):
    """One of the pictures: its title, where its figures come from, and its axis."""

    title: str
    event: str
    keys: tuple[str, ...]  # a curve each
    logarithmic: bool = False


PANELS = (
    Panel("training loss", "log", ("loss",)),
    Panel("evaluation loss", "eval", ("loss",)),
    Panel("learning rate", "log", ("learning_rate",)),
    Panel("gradient norm", "log", ("grad_norm",), logarithmic=True),
)
# Drawn below them for a run with CRAFT.
CRAFT_PANELS = (
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
)
Curve = tuple[list[int], list[float]]  # steps, values


def points(events: Sequence[Event], *, event: str, key: str) -> Curve:
    """Steps and values of one figure; of a step that was run again after a resume, the later value."""
    found = {
        item["step"]: float(item[key])
        for item in events
        if item.get("event") == event and item.get(key) is not None and item.get("step") is not None
    }
    return sorted(found), [found[step] for step in sorted(found)]


def plot_run(events: Sequence[Event], *, title: str, target: Path) -> None:
    """Draw the run into `target`; UserError when nothing has been logged yet or the file cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = [(panel, _curves(events, panel)) for panel in PANELS]
    if not any(drawn for _, drawn in curves):
        raise UserError(f"{title}: no figures are logged yet; wait for the first log or eval event.")
    of_craft = [(panel, _curves(events, panel)) for panel in CRAFT_PANELS]
    if any(drawn for _, drawn in of_craft):
        curves += of_craft
    rows = len(curves) // 2
    figure, axes = pyplot.subplots(rows, 2, figsize=(10, 3.25 * rows), layout="constrained", sharex=True)
    figure.suptitle(title)
    for axis, (panel, drawn) in zip(axes.flat, curves, strict=True):
        _draw(axis, panel, drawn)
    best = [event for event in events if event.get("event") == "best" and event.get("value") is not None]
    if best:
        _mark_best(axes.flat[1], best[-1])
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    try:
        figure.savefig(target, dpi=120)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}.") from error
    finally:
        pyplot.close(figure)


def _curves(events: Sequence[Event], panel: Panel) -> dict[str, Curve]:
    """The curves of a panel that have points, by key."""
    curves = {key: points(events, event=panel.event, key=key) for key in panel.keys}
    return {key: curve for key, curve in curves.items() if curve[0]}


def _draw(axis: Any, panel: Panel, curves: Mapping[str, Curve]) -> None:
    axis.set_title(panel.title, fontsize=10)
    axis.grid(alpha=0.3)
    if not curves:
        axis.text(0.5, 0.5, "none yet", transform=axis.transAxes, ha="center", color="grey")
        return
    for key, (steps, values) in curves.items():
        marker = "o" if len(steps) < 40 else None
        axis.plot(steps, values, marker=marker, markersize=3, linewidth=1.3, label=key)
    if len(panel.keys) > 1:
        axis.legend(fontsize=8)
    if panel.logarithmic and all(value > 0 for _, values in curves.values() for value in values):
        axis.set_yscale("log")


def _mark_best(axis: Any, best: Event) -> None:
    axis.axvline(best["step"], color="tab:green", linestyle="--", linewidth=1)
    first, last = axis.get_xlim()
    leftwards = best["step"] > (first + last) / 2
    axis.annotate(
        f"best {float(best['value']):.4g} @ {best['step']}",
        (best["step"], 0.96),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if leftwards else 4, 0),
        textcoords="offset points",
        ha="right" if leftwards else "left",
        va="top",
        fontsize=8,
        color="tab:green",
    )
