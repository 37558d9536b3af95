"""inft pretrain: a text encoder, by masked tokens."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inft.cli import INTERRUPTED
from inft.cli.console import make_console
from inft.cli.dotted import EPILOG, GIVEN, DottedCommand, Overwrite, Resume, Seed, config_argument
from params.errors import UserError

if TYPE_CHECKING:
    from params.encoder import EncoderParams

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

ENCODERS = ("neobert",)
Model = Annotated[str, typer.Argument(metavar="|".join(ENCODERS), help="Architecture.")]
Config = Annotated[
    Path | None,
    config_argument("Parameters by section; one that ships by its name: configs/pretraining/pretrain_neobert.yaml."),
]
Demo = Annotated[
    bool,
    typer.Option("--demo", help="A small encoder on text that ships: ten languages, some 3 minutes on two CPU cores."),
]
ContinueFrom = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN_DIR",
        help="Start a new run from the newest weights of another, with its parameters: for a longer context, "
        "--dataset.max_seq_length 4096.",
    ),
]


@app.command(cls=DottedCommand, epilog=EPILOG)
def pretrain(
    ctx: typer.Context,
    model: Model,
    config: Config = None,
    demo: Demo = False,
    continue_from: ContinueFrom = None,
    seed: Seed = None,
    resume: Resume = None,
    overwrite: Overwrite = False,
) -> None:
    """Pretrain a text encoder by masked tokens.

    Documents are packed without padding and never see each other; a run that was stopped goes on exactly where it was.
    """
    from inft.cli.extras import require_extras

    if model not in ENCODERS:
        raise UserError(f"unknown encoder {model!r}; known: {', '.join(ENCODERS)}.")
    if demo and (config or continue_from):
        raise UserError("--demo brings its own parameters and text: leave CONFIG and --continue-from out.")
    if config and continue_from:
        raise UserError("--continue-from takes the parameters of the other run: leave CONFIG out.")
    require_extras("accelerate", "datasets")
    flags = {"seed": seed, "trainer.resume_from_checkpoint": resume}
    params = _params(ctx.meta[GIVEN], config, flags, demo=demo, continue_from=continue_from)
    from inft.encoders.lowprecision.convert import check_low_precision

    check_low_precision(params)
    from inft.encoders.pretrain import pretrain as run

    console = make_console()
    result = run(params, overwrite=overwrite, demo=demo, console=console)
    if result.outcome.status == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _params(
    arguments: list[str], config: Path | None, flags: dict[str, Any], *, demo: bool, continue_from: Path | None
) -> "EncoderParams":
    """The run's parameters; the demo's and another run's lie below what the command line says."""
    from params.encoder_resolve import resolve_encoder

    base = None
    if demo:
        from inft.encoders.demo import demo_overrides

        base = demo_overrides()
    elif continue_from is not None:
        from inft.encoders.continued import continued_parameters

        base = continued_parameters(continue_from)
    return resolve_encoder("pretraining", config_file=config, arguments=arguments, flags=flags, base=base)
