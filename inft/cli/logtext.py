"""Events and runs as text for a terminal."""

from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from inft.training.logfiles import Event, Run, run_status

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

STYLES = {"error": "bold red", "best": "green", "run_start": "bold", "run_end": "bold", "eval": "cyan"}
HIDDEN = ("schema", "event", "time", "run", "params", "versions", "hardware", "data")  # too long for a line


def event_line(event: Event) -> "Text":
    """One event: its time, its name, and its fields as name=value."""
    from rich.text import Text

    name = str(event.get("event", "?"))
    fields = " ".join(f"{key}={_value(value)}" for key, value in event.items() if key not in HIDDEN)
    return Text.assemble((_clock(event, "%H:%M:%S"), "dim"), " ", (f"{name:<10}", STYLES.get(name, "")), " ", fields)


def runs_table(runs: Iterable[tuple[str, Run]]) -> "Table":
    """A row per task and run of it: start, task, model, data, steps, last loss, best evaluation loss, how it ended."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("started", "task", "model", "data", "steps", "loss", "best eval", "status"):
        right = heading in ("steps", "loss", "best eval")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for task, run in runs:
        table.add_row(*run_row(task, run))
    return table


def run_row(task: str, run: Run) -> tuple[str, ...]:
    """The cells of one run in the order of runs_table's columns; an attempt that failed before run_start has few."""
    params = run[0].get("params")
    model, data = "?", "?"
    if params is not None:
        model, data = _encoder(params) if "dataset" in params else _captioner(params)
    logs = [event for event in run if event.get("event") == "log"]
    best = [event for event in run if event.get("event") == "best" and event.get("value") is not None]
    steps = [event["step"] for event in run if isinstance(event.get("step"), int)]
    return (
        _clock(run[0], "%Y-%m-%d %H:%M"),
        task,
        model,
        data,
        str(max(steps)) if steps else "0",
        _value(logs[-1].get("loss")) if logs else "",
        _best(best[-1]) if best else "",
        run_status(run),
    )


def _captioner(params: Event) -> tuple[str, str]:
    """Model and data of a run of inft train."""
    return params.get("model_name") or "embedded", params.get("data", {}).get("data") or "munichus"


def _encoder(params: Event) -> tuple[str, str]:
    """Model and data of a run of a text encoder."""
    model, data = params.get("model", {}), params["dataset"]
    new = f"new, {model.get('num_hidden_layers')} x {model.get('hidden_size')}"
    return model.get("name") or new, data.get("path") or data.get("name") or ", ".join(data.get("sources") or ["?"])


def _clock(event: Event, pattern: str) -> str:
    seconds = event.get("time")
    return datetime.fromtimestamp(seconds).strftime(pattern) if isinstance(seconds, (int, float)) else "?"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_value(entry)}" for key, entry in value.items()) + "}"
    return str(value)


def _best(event: Event) -> str:
    """ "0.4321 @ 300"; of a metric other than the loss with its name, "chrf 63.21 @ 300"."""
    name = str(event.get("metric") or "").removeprefix("eval_")
    prefix = f"{name} " if name not in ("loss", "") else ""
    return f"{prefix}{_value(event.get('value'))} @ {event.get('step')}"
