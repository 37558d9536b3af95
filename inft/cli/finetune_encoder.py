"""inft finetune-encoder: teach a text encoder to place what belongs together close together."""

from pathlib import Path
from typing import Annotated

import typer

from inft.cli import INTERRUPTED
from inft.cli.console import make_console
from inft.cli.dotted import EPILOG, GIVEN, DottedCommand, Overwrite, Resume, Seed, config_argument

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Config = Annotated[
    Path | None,
    config_argument("Parameters by section; one that ships by its name: configs/contrastive/contrastive_neobert.yaml."),
]


@app.command(cls=DottedCommand, epilog=EPILOG)
def finetune_encoder(
    ctx: typer.Context, config: Config = None, seed: Seed = None, resume: Resume = None, overwrite: Overwrite = False
) -> None:
    """Fine-tune a text encoder by contrast.

    Rows are {"query": …, "pos": …, "neg": […]}; the stored model loads in sentence-transformers, too.
    """
    from inft.cli.extras import require_extras
    from params.encoder_resolve import resolve_encoder

    require_extras("accelerate", "datasets")
    flags = {"seed": seed, "trainer.resume_from_checkpoint": resume}
    params = resolve_encoder("contrastive", config_file=config, arguments=ctx.meta[GIVEN], flags=flags)
    from inft.encoders.contrastive.finetune import finetune

    result = finetune(params, overwrite=overwrite, console=make_console())
    if result.outcome.status == "interrupted":
        raise typer.Exit(INTERRUPTED)
