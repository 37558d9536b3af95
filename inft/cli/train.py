"""inft train: teach a model by captions, preferences or rewards, and keep the best adapter."""

from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from inft.cli import INTERRUPTED
from inft.cli.console import make_console
from inft.cli.fields import field_option
from params.craft import CRAFT_PRESETS, CraftParams
from params.methods import RL_METHODS
from params.presets import METHODS, MODEL_NAMES, TRAINING_MODES

if TYPE_CHECKING:
    from typer._click import Context

    from inft.training.run import RunResult
    from params import TrainParams

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _text(*name: str, metavar: str, words: str) -> Any:
    return typer.Option(*name, metavar=metavar, help=words)


def _switch(name: str, words: str) -> Any:
    return typer.Option(name, help=words)


Model = Annotated[str, typer.Argument(metavar="|".join(MODEL_NAMES), help="Model family.")]
Mode = Annotated[str | None, _text(metavar="|".join(TRAINING_MODES), words="What gets adapters (default basic).")]
Method = Annotated[
    str | None,
    _text(
        metavar="|".join(METHODS),
        words="How it learns. sft: the captions, word by word. dpo, orpo: from rows with a chosen and a rejected "
        "answer, to prefer the one (dpo against the base model, orpo while it learns the chosen answer). grpo, ppo: "
        "from rewards of the model's own answers, see --rewards (default sft).",
    ),
]
Rewards = Annotated[str | None, field_option("rl.rewards", metavar="NAME,…|MODULE:FUNCTION")]
ModelName = Annotated[
    str | None, _text("--model", metavar="ID|PATH", words="Another model of the family: hub id or local path.")
]
Data = Annotated[str | None, field_option("data.data", metavar="SOURCE|PATH", default="munichus")]
Languages = Annotated[str | None, field_option("data.languages", metavar="CODE,…|all")]
RowsPerLanguage = Annotated[str | None, field_option("data.max_rows_per_lang", metavar="N")]
EvalFraction = Annotated[str | None, field_option("data.eval_fraction", metavar="SHARE")]
BadFraction = Annotated[str | None, field_option("data.max_bad_fraction", metavar="SHARE")]
Epochs = Annotated[str | None, field_option("sft.num_epochs", metavar="N")]
MaxSteps = Annotated[str | None, field_option("sft.max_steps", metavar="N")]
EvalCaptions = Annotated[str | None, field_option("sft.eval_captions", metavar="N")]
BestMetric = Annotated[str | None, field_option("sft.best_metric", metavar="NAME")]
Seed = Annotated[str | None, field_option("basic.seed", metavar="N")]
Craft = Annotated[
    bool | None,
    typer.Option(
        "--craft/--no-craft",
        help="Add the contrastive term (CRAFT): by default each row's image and prompt are contrasted with the answers "
        "of the other rows. --no-craft turns off what a file says of it, too "
        f"(default {'on' if CraftParams.enabled else 'off'}).",
        show_default=False,
    ),
]
CraftPreset = Annotated[
    str | None,
    _text(metavar="NAME", words=f"Turn CRAFT on with the values of a preset: {', '.join(CRAFT_PRESETS)}."),
]
CraftPairs = Annotated[
    str | None,
    _text(
        metavar="translations|PATH|hub:ID",
        words="Turn CRAFT on with pairs of texts instead: the captions of one image in different languages, or a data "
        "set with columns text and text_tgt.",
    ),
]
NoQuantize = Annotated[bool, _switch("--no-quantize", "Train LoRA on unquantised weights.")]
Demo = Annotated[bool, _switch("--demo", "The embedded tiny model; on the drawn sample set unless --data is given.")]
Config = Annotated[Path | None, _text(metavar="FILE.yaml", words="Parameters by section.")]
Set = Annotated[
    list[str] | None,
    _text("--set", metavar="SECTION.FIELD=VALUE", words="Any parameter of `inft list-params`; repeatable."),
]
OutputDir = Annotated[str | None, _text(metavar="DIR", words="Checkpoints and the best adapter (default outputs/…).")]
Task = Annotated[
    str | None, _text(metavar="NAME", words="Name of the log, trainer_NAME.jsonl (default MODEL_MODE, with _demo).")
]
Resume = Annotated[
    str | None, _text(metavar="[latest|PATH]", words="Go on from the latest complete checkpoint, or from this one.")
]
Overwrite = Annotated[bool, _switch("--overwrite", "Replace the run in the output directory.")]
DryRun = Annotated[bool, _switch("--dry-run", "Do all but train: load, check, and print the plan.")]


class TrainCommand(TyperCommand):
    """`--resume` may stand alone; it then means `--resume latest`."""

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
        """Give a lone --resume its value, then parse as ever."""
        return super().parse_args(ctx, with_resume_value(args))


def with_resume_value(args: list[str]) -> list[str]:
    """The arguments with "latest" after each --resume that is followed by a flag, a model's name or nothing."""
    filled: list[str] = []
    for arg, following in zip_longest(args, args[1:]):
        filled.append(arg)
        if arg == "--resume" and (following is None or following.startswith("-") or following in MODEL_NAMES):
            filled.append("latest")
    return filled


@app.command(cls=TrainCommand)
def train(
    model: Model,
    training_mode: Mode = None,
    method: Method = None,
    rewards: Rewards = None,
    model_name: ModelName = None,
    data: Data = None,
    languages: Languages = None,
    max_rows_per_lang: RowsPerLanguage = None,
    eval_fraction: EvalFraction = None,
    max_bad_fraction: BadFraction = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    eval_captions: EvalCaptions = None,
    best_metric: BestMetric = None,
    seed: Seed = None,
    craft: Craft = None,
    craft_preset: CraftPreset = None,
    craft_pairs: CraftPairs = None,
    no_quantize: NoQuantize = False,
    demo: Demo = False,
    config: Config = None,
    overrides: Set = None,
    output_dir: OutputDir = None,
    task: Task = None,
    resume: Resume = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune a model, keep the best adapter."""
    from params.resolve import resolve_train

    flags = {
        "model": model_name,
        "data": data,
        "languages": languages,
        "max_rows_per_lang": max_rows_per_lang,
        "eval_fraction": eval_fraction,
        "max_bad_fraction": max_bad_fraction,
        "epochs": epochs,
        "max_steps": max_steps,
        "eval_captions": eval_captions,
        "best_metric": best_metric,
        "rewards": rewards,
        "seed": seed,
        "craft": craft,
        "craft_preset": craft_preset,
        "craft_pairs": craft_pairs,
        "quantize": False if no_quantize else None,
        "output_dir": output_dir,
        "task": task,
    }
    params = resolve_train(
        model,
        training_mode=training_mode,
        method=method,
        demo=demo or None,
        config_file=config,
        overrides=overrides or (),
        flags=flags,
    )
    result = run(params, resume=resume, overwrite=overwrite, dry_run=dry_run)
    if result.status == "interrupted":
        raise typer.Exit(INTERRUPTED)


def run(params: "TrainParams", *, resume: str | None, overwrite: bool, dry_run: bool) -> "RunResult":
    """Train; a demo on the drawn sample set also shows what was learnt of held-out scenes."""
    refuse_early(params, resume=resume, overwrite=overwrite, dry_run=dry_run)
    console = make_console()
    if params.demo and params.data.data == "sample" and not dry_run:
        from inft.evaluation.demo import run_demo

        return run_demo(params, console, resume=resume, overwrite=overwrite)
    from inft.training.run import fit

    return fit(params, resume=resume, overwrite=overwrite, dry_run=dry_run, console=console)


def refuse_early(params: "TrainParams", *, resume: str | None, overwrite: bool, dry_run: bool) -> None:
    """UserError for what can be found wrong without torch, whose import takes seconds."""
    from inft.cli.extras import SCORING, require_extras
    from inft.data.locate import find_source
    from inft.models.loading import local_source
    from inft.training.resume import refuse_foreign_output

    find_source(params.data)
    if params.craft.pairs:
        from inft.data.pairs import refuse_no_pairs

        refuse_no_pairs(params.craft.pairs, params.data)
    if params.method in RL_METHODS:
        from inft.rewards.load import load_rewards

        load_rewards(params.rl.rewards)
    if "/" in params.model_name:
        local_source(params.model_name)
    if not dry_run:
        refuse_foreign_output(params, resume=resume is not None, overwrite=overwrite)
    needed = ["trl", "peft", "accelerate", "datasets", *(["bitsandbytes"] if params.qlora.load_in_4bit else [])]
    scored = params.sft.eval_captions or (params.method in RL_METHODS and "chrf" in params.rl.rewards)
    require_extras(*needed, *(SCORING if scored else ()))
