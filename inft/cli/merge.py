"""inft merge: an adapter and its base model written as one model."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inft.cli.console import make_console
from inft.evaluation.merged import DTYPES
from params.errors import UserError
from params.presets import MODEL_NAMES

if TYPE_CHECKING:
    from inft.evaluation.merged import Merged
    from inft.training.stored import StoredAdapter

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Option(metavar="DIR", help="A stored adapter, or the directory of its run.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Directory of the merged model.")],
    dtype: Annotated[
        str | None, typer.Option(metavar="|".join(DTYPES), help="Of the weights (default: the run's basic.dtype).")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option("--model", metavar="ID|PATH", help="Where the adapter's base model lies now.")
    ] = None,
    family: Annotated[
        str | None, typer.Option(metavar="|".join(MODEL_NAMES), help="Of an adapter without best.json.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model merged earlier.")] = False,
) -> None:
    """Write base and adapter as one model.

    The base is loaded unquantised, the adapter is added in float32 and each weight is rounded once. What was written
    is loaded again and compared with base and adapter on a few rows: when the logits, or one layer's outputs, differ
    by more than the dtype explains, nothing is kept. An adapter trained on 4-bit weights (QLoRA) is merged into the
    unquantised ones, and how much that changes is measured and printed.
    """
    from inft.cli.extras import require_extras
    from inft.evaluation.merged import refuse_taken
    from inft.training.stored import read_adapter, with_family

    wanted = next((known for known in DTYPES if known == dtype), None)
    if dtype is not None and wanted is None:
        raise UserError(f"--dtype {dtype} is not known: use {', '.join(DTYPES)}.")
    output = output.expanduser()
    refuse_taken(output, overwrite=overwrite)
    stored = with_family(read_adapter(adapter), family)
    refuse_base(stored, model_name, output)
    require_extras("peft", "accelerate", *(["bitsandbytes"] if stored.quantised else []))
    from inft.evaluation.merge import merge_adapter
    from inft.training.quiet import quiet_libraries

    console = make_console()
    quiet_libraries(progress_bars=sys.stderr.isatty() and stored.base_model != "")
    merged = merge_adapter(
        stored,
        output,
        model_name=model_name,
        dtype=wanted,
        tell=lambda text: console.print(text, markup=False, soft_wrap=True),
    )
    for line in merged_lines(merged, stored, output):
        console.print(line, markup=False, soft_wrap=True)


def refuse_base(stored: "StoredAdapter", model_name: str | None, output: Path) -> None:
    """UserError for a base that is not where it is said to be, or that the merged model would replace."""
    from inft.models.loading import local_source

    name = stored.base_model if model_name is None else model_name
    if not name:
        return
    try:
        source = local_source(name)
    except UserError as error:
        if model_name is not None:
            raise
        raise UserError(f"{error} The adapter names it as its base: say with --model where that lies now.") from error
    if source is not None and Path(source.name).resolve() == output.resolve():
        raise UserError(f"{output} is the base model itself, and it is kept: choose another -o.")


def merged_lines(merged: "Merged", stored: "StoredAdapter", output: Path) -> Iterator[str]:
    """What a user is told of a merged model, line by line."""
    from inft.training.stored import base_title

    layers = ", ".join(f"{count} {part}" for part, count in merged.layers.items())
    difference, size = merged.difference, sum(merged.files.values())
    step = "" if merged.step is None else f", step {merged.step}"
    yield f"merged      {stored.directory}{step}, {stored.parameters:,} parameters, sha256 {stored.sha256[:12]}…"
    yield f"into        {base_title(merged.base_model, merged.family)}, {merged.parameters:,} parameters"
    yield f"layers      {sum(merged.layers.values())}: {layers}"
    yield (
        f"difference  layers by {percent(difference.layer)} of their weights at the most "
        f"({percent(difference.layer_tolerance)} allowed), logits by {percent(difference.logits)} of their spread "
        f"({percent(difference.logits_tolerance)} allowed; the adapter moved them by {percent(difference.effect)})"
    )
    if merged.quantised is not None:
        yield (
            "QLoRA       trained on 4-bit weights and merged into unquantised ones: KL "
            f"{merged.quantised.kl:.4f} nats per token, the same likeliest token for {merged.quantised.equal_top:.1%}"
        )
    yield f"written     {output}: {len(merged.files)} files, {size / 1e6:,.1f} MB, {merged.dtype}"
    yield from usage_lines(merged, output)


def percent(share: float) -> str:
    """A share to two digits, however small: "0.0072%"."""
    return f"{100 * share:.2g}%"


def usage_lines(merged: "Merged", output: Path) -> Iterator[str]:
    """How the merged model is loaded."""
    from inft.models import load_spec

    spec = load_spec(merged.family)
    processor = "AutoProcessor" if spec.takes_images else "AutoTokenizer"
    name = "processor" if spec.takes_images else "tokenizer"
    yield "load it with"
    yield f"    from transformers import {spec.auto_class}, {processor}"
    yield f'    model = {spec.auto_class}.from_pretrained("{output}", dtype="auto")'
    yield f'    {name} = {processor}.from_pretrained("{output}")'
    yield f"or train it further with: inft train {merged.family} --model {output}"
    if merged.mended:
        yield f"note: {spec.plain_differs}"
