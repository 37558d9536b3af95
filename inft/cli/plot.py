"""The four curves of a run as one PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inft.cli.logfiles import Event
from params.errors import UserError

# panel title -> (event, key, logarithmic axis)
PANELS: Mapping[str, tuple[str, str, bool]] = {
    "training loss": ("log", "loss", False),
    "evaluation loss": ("eval", "loss", False),
    "learning rate": ("log", "learning_rate", False),
    "gradient norm": ("log", "grad_norm", True),
}


def points(events: Sequence[Event], *, event: str, key: str) -> tuple[list[int], list[float]]:
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

    curves = {name: points(events, event=event, key=key) for name, (event, key, _) in PANELS.items()}
    if not any(steps for steps, _ in curves.values()):
        raise UserError(f"{title}: no figures are logged yet; wait for the first log or eval event.")
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.5), layout="constrained", sharex=True)
    figure.suptitle(title)
    for axis, (name, (steps, values)) in zip(axes.flat, curves.items(), strict=True):
        _draw(axis, name, steps, values, logarithmic=PANELS[name][2])
    best = [event for event in events if event.get("event") == "best" and event.get("value") is not None]
    if best:
        _mark_best(axes.flat[1], best[-1])
    for axis in axes[1]:
        axis.set_xlabel("optimizer step")
    try:
        figure.savefig(target, dpi=120)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}.") from error
    finally:
        pyplot.close(figure)


def _draw(axis: Any, name: str, steps: list[int], values: list[float], *, logarithmic: bool) -> None:
    axis.set_title(name, fontsize=10)
    axis.grid(alpha=0.3)
    if not steps:
        axis.text(0.5, 0.5, "none yet", transform=axis.transAxes, ha="center", color="grey")
        return
    axis.plot(steps, values, marker="o" if len(steps) < 40 else None, markersize=3, linewidth=1.3)
    if logarithmic and all(value > 0 for value in values):
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
