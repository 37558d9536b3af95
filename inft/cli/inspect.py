"""inft inspect: what an adapter, a run, a checkpoint or a merged model is."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inft.cli.console import make_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from inft.evaluation.inspection import AdapterFacts, CheckpointFacts, Inspection

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
Fact = tuple[str, str]


@app.command()
def inspect(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="An adapter, a run, a checkpoint or a merged model.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False,
) -> None:
    """Show what an adapter or a run is.

    Base model, step, why that step was stored, size, checksums, and how large the change of the weights is: the
    Frobenius norm of s B A, by part of the model and for the layers with the largest. Reads files only; no base model
    is loaded.
    """
    from inft.evaluation.inspection import inspect_directory

    found = inspect_directory(directory)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2, ensure_ascii=False, allow_nan=False))
        return
    console = make_console()
    if found.kind != "adapter":
        show_facts(console, f"{found.kind} {found.directory}", general_facts(found))
    if found.checkpoints:
        console.print(checkpoints_table(found.checkpoints))
    if found.adapter is not None:
        show_facts(console, f"adapter {found.adapter.directory}", adapter_facts(found.adapter))
        console.print(parts_table(found.adapter))
        console.print(largest_table(found.adapter))
        for warning in warnings_of(found.adapter):
            console.print(warning, markup=False, soft_wrap=True)


def general_facts(found: "Inspection") -> Iterator[Fact]:
    """What there is to say of the directory as a whole."""
    if found.run is not None:
        run = found.run
        yield "task", run["task"]
        yield "model", f"{run['family']}, {run['mode']}, on {_base(run['base_model'], run['family'])}"
        yield "data", f"{run['data']}: {', '.join(run['languages'])}"
        yield "method", run["method"]
        yield "CRAFT", "on" if run["craft"] else "off"
    if found.merged is not None:
        yield from merged_facts(found.merged, found.damaged_files)
    if found.kind in ("run", "checkpoint") and found.adapter is None:
        yield "adapter", "none is stored" if found.kind == "run" else "not read: the checkpoint is damaged"
    yield "size", _megabytes(found.bytes)


def merged_facts(merged: Any, damaged: tuple[str, ...]) -> Iterator[Fact]:
    """What merge.json says, and whether its files are there."""
    difference = merged["difference"]
    yield "family", merged["family"]
    yield "base model", _base(merged["base_model"], merged["family"])
    yield "adapter", f"{merged['adapter']}, step {merged['step']}, sha256 {merged['adapter_sha256']}"
    yield "weights", f"{merged['parameters']:,} of {merged['dtype']}"
    yield "merged layers", ", ".join(f"{count} {part}" for part, count in merged["layers"].items())
    yield "difference", f"{100 * difference['logits']:.2g}% of the logits' spread, measured when it was merged"
    if merged["quantised"] is not None:
        gap = merged["quantised"]
        yield "QLoRA", f"KL {gap['kl']:.4f} nats per token, the same likeliest token for {gap['equal_top']:.1%}"
    yield "files", f"damaged: {', '.join(damaged)}" if damaged else f"all {len(merged['files'])} as they were written"


def adapter_facts(adapter: "AdapterFacts") -> Iterator[Fact]:
    """Where an adapter comes from and what it is."""
    yield "family", adapter.family or "not said: there is no best.json"
    yield "base model", _base(adapter.base_model, adapter.family)
    if adapter.method is not None:
        yield "method", adapter.method
    if adapter.mode is not None:
        yield "mode", f"{adapter.mode}{', on 4-bit weights' if adapter.quantised else ''}"
    if adapter.step is not None:
        value = "" if adapter.value is None else f", {adapter.metric} {adapter.value:.4f}"
        yield "step", f"{adapter.step:,}{value}"
    if adapter.why is not None:
        yield "stored because", adapter.why
    kinds = [name for name, on in (("DoRA", adapter.dora), ("rsLoRA", adapter.rslora)) if on]
    yield (
        "LoRA",
        f"r {adapter.r}, alpha {adapter.alpha:g}, dropout {adapter.dropout:g}, bias {adapter.bias}, "
        f"init {adapter.init}{''.join(f', {name}' for name in kinds)}",
    )
    yield "parameters", f"{adapter.parameters:,} ({', '.join(adapter.dtypes)})"
    yield "size", _megabytes(adapter.bytes)
    yield "sha256", adapter.sha256
    if adapter.listed_files:
        wrong = ", ".join(adapter.changed_files)
        yield "checksums", f"changed or missing: {wrong}" if wrong else f"all {adapter.listed_files} files hold"


def warnings_of(adapter: "AdapterFacts") -> Iterator[str]:
    """What is wrong with an adapter, and what its norms leave out."""
    if adapter.not_finite:
        yield f"NOT FINITE: {_few(adapter.not_finite)}. The training diverged; the adapter cannot be used."
    if adapter.untrained:
        yield f"NEVER TRAINED: B is all zero in {_few(adapter.untrained)}."
    if adapter.dora:
        yield "DoRA: the norms are those of s B A; the magnitudes' part of the change needs the base model."
    if adapter.init.startswith("pissa") and not adapter.listed_files:
        yield "PiSSA: the norms are those on a base without its principal components, which s B A holds as well."


def parts_table(adapter: "AdapterFacts") -> "Table":
    """A row per part: how many layers, how many parameters, and how far their weights are moved."""
    table = _table("part", right=("layers", "parameters", "mean ‖ΔW‖", "largest ‖ΔW‖"))
    table.title = "what it changes"
    for part in adapter.parts:
        table.add_row(
            part.part, f"{part.layers:,}", f"{part.parameters:,}", _norm(part.mean_norm), _norm(part.largest_norm)
        )
    return table


def largest_table(adapter: "AdapterFacts") -> "Table":
    """The layers whose weights are moved the furthest."""
    table = _table("layer", "part", right=("rank", "‖ΔW‖"))
    table.title = "largest changes"
    for layer in adapter.largest:
        table.add_row(layer.name, layer.part, str(layer.rank), _norm(layer.norm))
    return table


def checkpoints_table(found: "tuple[CheckpointFacts, ...]") -> "Table":
    """A row per checkpoint, the one written last first."""
    table = _table("checkpoint", "state", right=("step", "size"))
    for checkpoint in found:
        state = checkpoint.damage or "whole"
        step = "" if checkpoint.step is None else f"{checkpoint.step:,}"
        table.add_row(checkpoint.directory, state, step, _megabytes(checkpoint.bytes))
    return table


def show_facts(console: "Console", title: str, facts: Iterator[Fact]) -> None:
    """Print names and what is said of them, without lines between."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, words in facts:
        table.add_row(name, Text(words))
    console.print(title, style="bold", markup=False, soft_wrap=True)
    console.print(table)


def _table(*left: str, right: tuple[str, ...]) -> "Table":
    from rich.table import Table

    table = Table(header_style="bold", title_justify="left")
    for heading in left:
        table.add_column(heading, overflow="fold")
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def _base(name: str | None, family: str | None) -> str:
    from inft.training.stored import base_title

    return base_title(name, family)


def _few(names: tuple[str, ...]) -> str:
    from inft.training.stored import listed

    return listed(names)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"


def _norm(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
