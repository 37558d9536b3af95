"""inft evaluate: caption a held-out split and score it per language; what fine-tuning cost elsewhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from inft.cli.adapted import Adapter, Demo, Model, ModelName, NoQuantize, Set, refuse_early, resolve
from inft.cli.console import make_console, stderr_console
from inft.cli.evaltext import show
from inft.cli.fields import field_option
from params.errors import UserError
from params.evaluation import ShotChoice as ShotChoices

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

FORMATS = ("table", "json", "csv", "latex")
SHOT_CHOICES = get_args(ShotChoices)
LEAST_DRIFT = 4  # rows: below, the unbiased estimate behind CKA does not exist
SAMPLING = ("basic.gen_do_sample", "basic.gen_top_p", "basic.gen_temperature", "basic.gen_num_beams")
BaseOnly = Annotated[
    bool, typer.Option("--base", help="The base model; with --adapter on that adapter's rows and prompts, without it.")
]
Data = Annotated[
    str | None,
    typer.Option(metavar="SOURCE|PATH", help="As for inft train (default: what the adapter was trained on)."),
]
Split = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Of the data (default test, or heldout: what the adapter's run held out)."),
]
Languages = Annotated[
    str | None,
    typer.Option(metavar="CODE,…|all", help="Default: the run's on its own data, on any other all that it has."),
]
Limit = Annotated[int | None, typer.Option(metavar="N", min=1, help="Rows at most, spread evenly over the languages.")]
BatchSize = Annotated[int | None, typer.Option(metavar="N", min=1, help="Rows captioned at a time (8).")]
MaxNewTokens = Annotated[str | None, field_option("basic.gen_max_new_tokens", metavar="N")]
Shots = Annotated[
    int, typer.Option(metavar="N", min=0, help="Examples of the train split before each row: a few-shot baseline.")
]
ShotChoice = Annotated[
    str | None,
    typer.Option(
        metavar="random|similar", help="similar: nearest images by the model's own vision features (default random)."
    ),
]
ForgettingData = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE|PATH",
        help="Also score base and adapter on these rows, in every language that they have: what fine-tuning cost.",
    ),
]
ForgettingSplit = Annotated[
    str | None, typer.Option(metavar="NAME", help="Split of that data (default test, validation or train).")
]
DriftRows = Annotated[
    int, typer.Option(metavar="N", min=0, help="Also compare N rows' hidden states, base to adapter, by layer.")
]
OutputDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Predictions, scores and tables (default metrics/…).")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the evaluation that is there.")]
Beside = Annotated[
    list[Path] | None,
    typer.Option(metavar="DIR", help="Print this evaluation in the same table: a baseline, another run; repeatable."),
]
Shown = Annotated[
    str, typer.Option("--format", metavar="|".join(FORMATS), help="What is printed; all are written to files.")
]


@app.command()
def evaluate(
    model: Model,
    adapter: Adapter = None,
    base: BaseOnly = False,
    demo: Demo = False,
    model_name: ModelName = None,
    data: Data = None,
    split: Split = None,
    languages: Languages = None,
    limit: Limit = None,
    batch_size: BatchSize = None,
    max_new_tokens: MaxNewTokens = None,
    shots: Shots = 0,
    shot_choice: ShotChoice = None,
    forgetting: ForgettingData = None,
    forgetting_split: ForgettingSplit = None,
    drift: DriftRows = 0,
    no_quantize: NoQuantize = False,
    overrides: Set = None,
    output_dir: OutputDir = None,
    overwrite: Overwrite = False,
    beside: Beside = None,
    shown: Shown = "table",
) -> None:
    """Caption a held-out split and score it.

    BLEU-4, chrF, CIDEr, exact captions, length and script, per language and overall, with bootstrap 95 % intervals.
    Greedy. Each row's caption is a line of predictions.jsonl; a killed evaluation goes on by the same command.
    """
    from inft.cli.extras import SCORING, require_extras
    from params.evaluation import evaluation_name

    if adapter is None and not base:
        raise UserError("what is to be evaluated? Give --adapter DIR, or --base for the base model.")
    refuse_unknown("--format", shown, FORMATS)
    refuse_unknown("--shot-choice", shot_choice, SHOT_CHOICES)
    refuse_ignored(base, shots, shot_choice, forgetting, forgetting_split, drift)
    refuse_ignored_fields(overrides or ())
    require_extras("peft", "accelerate", "datasets", *SCORING)
    flags: dict[str, Any] = {"data": data, "split": split, "languages": languages, "max_new_tokens": max_new_tokens}
    flags["quantize"] = False if no_quantize else None
    params = resolve(
        model,
        adapter,
        flags,
        base=base,
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

    told_split = split or any(text.startswith("data.split") for text in overrides or ())
    params = params if told_split else settled_split(params)
    others = [read_stored(place) for place in beside or ()]
    console = make_console()
    directory = output_dir or Path(params.basic.metric_dir) / evaluation_name(params)
    from inft.evaluation.evaluate import evaluate as run

    progress = console if shown == "table" else stderr_console()
    stored = run(params, directory, overwrite=overwrite, console=progress)
    show([*others, stored], shown, console, progress)


def refuse_unknown(option: str, word: str | None, words: Sequence[str]) -> None:
    """UserError for a word that an option does not know."""
    if word is not None and word not in words:
        raise UserError(f"{option} {word}: choose one of {', '.join(words)}.")


def refuse_ignored(
    base: bool, shots: int, shot_choice: str | None, forgetting: str | None, forgetting_split: str | None, drift: int
) -> None:
    """UserError for options that would have no effect."""
    if base and (forgetting or drift):
        raise UserError("--forgetting and --drift compare a base model with its adapter: leave --base out.")
    if forgetting_split and not forgetting:
        raise UserError("--forgetting-split has no effect without --forgetting.")
    if shot_choice and not shots:
        raise UserError("--shot-choice has no effect without --shots N.")
    if 0 < drift < LEAST_DRIFT:
        raise UserError(f"--drift {drift}: CKA needs {LEAST_DRIFT} rows at least.")


def refuse_ignored_fields(overrides: Sequence[str]) -> None:
    """UserError for parameters that would have no effect."""
    for text in overrides:
        key = text.partition("=")[0].strip()
        if key in SAMPLING:
            raise UserError(f"--set {key} has no effect: evaluations are greedy. inft caption samples.")
        if key == "data.max_rows_per_lang":
            raise UserError(f"--set {key} has no effect: --limit N takes rows evenly from the languages.")
