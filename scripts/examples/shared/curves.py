"""Curves of training runs as a PNG, each panel with its axes named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from shared.options import in_notebook

STYLES = ("-", "--", ":")  # of the runs: curves that coincide stay visible
History = Sequence[Mapping[str, Any]]  # trainer.state.log_history


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture: its title, the name and unit of its y axis, and log key -> what the curve is called."""

    title: str
    y: str
    curves: Mapping[str, str]
    limits: tuple[float, float] | None = None
    logarithmic: bool = False


def draw(path: Path, panels: Sequence[Panel], runs: Mapping[str, History]) -> None:
    """Write the panels side by side, two in a row; several runs share each panel. In a notebook, show them too."""
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.6 * columns, 3.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel, runs)
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.savefig(path, dpi=110)
    print(f"plot: {path}")
    if in_notebook():
        from IPython.display import Image, display

        display(Image(filename=str(path)))


def _draw_panel(axis: Any, panel: Panel, runs: Mapping[str, History]) -> None:
    for style, (run, history) in zip(cycle(STYLES), runs.items(), strict=False):
        for key, label in panel.curves.items():
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                name = ", ".join(part for part in (run if len(runs) > 1 else "", label) if part)
                axis.plot(*zip(*points, strict=True), style, label=name, marker="o" if len(points) < 15 else None)
    if not axis.lines:
        raise ValueError(f"no log entry has {' or '.join(panel.curves)}: the panel {panel.title!r} would be empty.")
    axis.set(title=panel.title, xlabel="optimizer step", ylabel=panel.y)
    if panel.logarithmic:
        axis.set_yscale("log")
    if panel.limits:
        axis.set_ylim(*panel.limits)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    if len(axis.lines) > 1:
        axis.legend()
