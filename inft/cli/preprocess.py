"""inft preprocess: tokenise a data set once, for pretraining or contrastive fine-tuning."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inft.cli.console import make_console
from inft.cli.dotted import EPILOG, GIVEN, DottedCommand, Overwrite, config_argument
from params.errors import UserError

if TYPE_CHECKING:
    from params.encoder import EncoderTask

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Config = Annotated[
    Path | None,
    config_argument("That of the training; its task says what the rows are: documents, or queries with positives."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="DIR", help="Where it goes (default dataset.pre_tokenized_dir, or below output_dir)."
    ),
]
Task = Annotated[
    str | None,
    typer.Option(metavar="pretraining|contrastive", help="What the rows are (default as CONFIG says, else documents)."),
]


@app.command(cls=DottedCommand, epilog=EPILOG)
def preprocess(
    ctx: typer.Context, config: Config = None, output: Output = None, task: Task = None, overwrite: Overwrite = False
) -> None:
    """Tokenise a data set once and save it.

    Point dataset.path at the result.
    """
    from inft.cli.extras import require_extras
    from params.encoder_resolve import resolve_encoder, task_of

    require_extras("accelerate", "datasets")
    tasks: dict[str, EncoderTask] = {"pretraining": "pretraining", "contrastive": "contrastive"}
    if task is not None and task not in tasks:
        raise UserError(f"--task {task}: choose {' or '.join(tasks)}.")
    params = resolve_encoder(
        task_of(config) if task is None else tasks[task], config_file=config, arguments=ctx.meta[GIVEN]
    )
    told = output or params.dataset.pre_tokenized_dir
    directory = Path(told) if told else Path(params.trainer.output_dir) / "pre_tokenized"
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file: name a directory with --output.")
    if directory.exists() and any(directory.iterdir()) and not overwrite:
        raise UserError(f"{directory} exists: give --overwrite to replace it, or another --output.")
    console = make_console()
    if params.task == "contrastive":
        from inft.encoders.contrastive.preprocess import preprocess_contrastive

        preprocess_contrastive(params, directory, console)
    else:
        from inft.encoders.data.preprocess import preprocess as run

        run(params, directory, console)
