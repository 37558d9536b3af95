"""inft evaluate: caption a held-out split and score it per language; what fine-tuning cost elsewhere."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inft.cli.console import make_console
from inft.cli.fields import field_option
from params.errors import UserError
from params.presets import MODEL_NAMES

if TYPE_CHECKING:
    from rich.console import Console

    from inft.evaluation.records import Stored
    from params.evaluation import EvalParams

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

FORMATS = ("table", "json", "csv", "latex")
Model = Annotated[str, typer.Argument(metavar="|".join(MODEL_NAMES), help="Model family.")]
Adapter = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A stored adapter, such as outputs/llama32_basic/best, or its run's directory."),
]
BaseOnly = Annotated[bool, typer.Option("--base", help="The base model without an adapter.")]
ModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="ID|PATH", help="The base model's place (default: as the adapter's run says)."),
]
Demo = Annotated[
    bool, typer.Option("--demo", help="The embedded tiny model; an adapter trained on it needs no --demo.")
]
NoQuantize = Annotated[
    bool, typer.Option("--no-quantize", help="Unquantised base weights (default: as the adapter was trained).")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Any parameter of basic, data and qlora; repeatable."),
]


@app.command()
def evaluate(
    model: Model,
    adapter: Adapter = None,
    base: BaseOnly = False,
    demo: Demo = False,
    model_name: ModelName = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="SOURCE|PATH", help="As for inft train (default: what the adapter was trained on)."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of the data (default test, or heldout: what the adapter's run held out)."),
    ] = None,
    languages: Annotated[
        str | None,
        typer.Option(metavar="CODE,…|all", help="Default: the run's on its own data, on any other all that it has."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Rows at most, spread evenly over the languages.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", min=1, help="Rows captioned at a time (8).")] = None,
    max_new_tokens: Annotated[str | None, field_option("basic.gen_max_new_tokens", metavar="N")] = None,
    shots: Annotated[
        int, typer.Option(metavar="N", min=0, help="Examples of the train split before each row: a few-shot baseline.")
    ] = 0,
    shot_choice: Annotated[
        str, typer.Option(metavar="random|similar", help="similar: nearest images by the model's own vision features.")
    ] = "random",
    forgetting: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE|PATH",
            help="Also score base and adapter on these rows, in every language that they have: what fine-tuning cost.",
        ),
    ] = None,
    forgetting_split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Split of that data (default test, validation or train).")
    ] = None,
    drift: Annotated[
        int, typer.Option(metavar="N", min=0, help="Also compare N rows' hidden states, base to adapter, by layer.")
    ] = 0,
    no_quantize: NoQuantize = False,
    overrides: Set = None,
    output_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Predictions, scores and tables (default metrics/…).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the evaluation that is there.")] = False,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR", help="Print this evaluation in the same table: a baseline, another run; repeatable."
        ),
    ] = None,
    shown: Annotated[
        str, typer.Option("--format", metavar="|".join(FORMATS), help="What is printed; all are written to files.")
    ] = "table",
) -> None:
    """Caption a held-out split and score it.

    BLEU-4, chrF, CIDEr, exact captions, length and script, per language and overall, with bootstrap 95 % intervals.
    Greedy. Each row's caption is a line of predictions.jsonl; a killed evaluation goes on by the same command.
    """
    from inft.cli.extras import SCORING, require_extras
    from params.evaluation import evaluation_name

    if shown not in FORMATS:
        raise UserError(f"--format {shown}: choose one of {', '.join(FORMATS)}.")
    if shot_choice not in ("random", "similar"):
        raise UserError(f"--shot-choice {shot_choice}: choose random or similar.")
    if adapter is None and (forgetting or drift):
        raise UserError("--forgetting and --drift compare a base model with its adapter: give --adapter.")
    require_base_or_adapter(adapter, base)
    require_extras("peft", "accelerate", "datasets", *SCORING)
    flags: dict[str, Any] = {"data": data, "split": split, "languages": languages, "max_new_tokens": max_new_tokens}
    flags["quantize"] = False if no_quantize else None
    params = resolve(
        model,
        adapter,
        flags,
        demo=demo,
        model_name=model_name,
        overrides=overrides or (),
        limit=limit,
        batch_size=batch_size,
        shots=shots,
        shot_choice=shot_choice,
        drift=drift,
        forgetting=(forgetting, forgetting_split) if forgetting else None,
    )
    refuse_early(params)
    from inft.evaluation.records import read_stored
    from inft.evaluation.splits import settled_split

    params = params if split else settled_split(params)

    others = [read_stored(place) for place in beside or ()]
    console = make_console()
    directory = output_dir or Path(params.basic.metric_dir) / evaluation_name(params)
    from inft.evaluation.evaluate import evaluate as run

    stored = run(params, directory, overwrite=overwrite, console=console if shown == "table" else stderr_console())
    show([*others, stored], shown, console)


def require_base_or_adapter(adapter: Path | None, base: bool) -> None:
    """UserError unless one of the two is asked for."""
    if (adapter is None) == (not base):
        raise UserError("give one of --adapter DIR and --base: what is to be evaluated?")


def resolve(
    model: str,
    adapter: Path | None,
    flags: dict[str, Any],
    *,
    forgetting: tuple[str, str | None] | None = None,
    overrides: Any = (),
    **own: Any,
) -> "EvalParams":
    """The parameters of an evaluation, from what best.json beside the adapter says onwards."""
    from dataclasses import replace

    from params.evaluation import resolve_eval

    common = {**recorded(adapter, model), **{name: value for name, value in own.items() if value is not None}}
    params = resolve_eval(model, flags=flags, overrides=overrides, **common)
    if forgetting is None:
        return params
    data, split = forgetting
    other = {**flags, "data": data, "split": split, "languages": "all"}
    found = resolve_eval(model, flags=other, overrides=overrides, **common).data
    if split is None:
        from inft.evaluation.splits import first_split

        found = first_split(found)
    return replace(params, forgetting=found)


def recorded(adapter: Path | None, model: str) -> dict[str, Any]:
    """What is told by the adapter: its own directory, its run's parameters, else the base model that it names."""
    if adapter is None:
        return {}
    from inft.training.stored import read_adapter, refuse_other_family

    stored = read_adapter(adapter)
    refuse_other_family(stored, model)
    if stored.record is None:
        return {"adapter": str(stored.directory), "model_name": stored.base_model}
    return {"adapter": str(stored.directory), "trained": stored.record.get("params")}


def refuse_early(params: "EvalParams") -> None:
    """UserError for what can be found wrong without torch."""
    from inft.data.locate import find_source
    from inft.models.loading import local_source

    find_source(params.data)
    if params.forgetting is not None:
        find_source(params.forgetting)
    if "/" in params.model_name:
        local_source(params.model_name)


def stderr_console() -> "Console":
    """Where progress goes when stdout is for a program to read."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def show(evaluations: "Sequence[Stored]", shown: str, console: "Console") -> None:
    """Print the scores of all of them, and what else was measured in the last one."""
    from inft.evaluation.metrics.tables import scores_csv, scores_latex, scores_table
    from inft.evaluation.records import scores_to_json

    stored, systems = evaluations[-1], {one.name: one.scores for one in evaluations}
    if shown == "table":
        names = {code: name for one in evaluations for code, name in one.evaluation.language_names.items()}
        console.print(scores_table(systems, language_names=names))
        show_more(stored, console)
        print_line(console, f"captions, scores and tables: {stored.directory}")
    elif shown == "json":
        texts = [json.loads(scores_to_json(one.scores)) | {"system": one.name} for one in evaluations]
        typer.echo(json.dumps(texts if len(texts) > 1 else texts[0], indent=2, ensure_ascii=False))
    else:
        typer.echo(scores_csv(systems) if shown == "csv" else scores_latex(systems), nl=False)


def show_more(stored: "Stored", console: "Console") -> None:
    """Unreadable rows, forgetting and drift."""
    from inft.cli.evaltext import drift_table, forgetting_table
    from inft.evaluation.verdict import Verdict

    failed = [prediction for prediction in stored.predictions if prediction.error]
    if failed:
        first = failed[0]
        text = f"{len(failed):,} rows have no caption and count as wrong, the first: {first.where}: {first.error}"
        console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
    if stored.forgetting is not None:
        console.print(forgetting_table(stored.forgetting))
        for line in Verdict(label=stored.name, forgetting=stored.forgetting).sentences:
            print_line(console, line)
    if stored.drift is not None:
        console.print(drift_table(stored.drift))


def print_line(console: "Console", text: str) -> None:
    """One line of plain text, whatever its length."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
