"""inft list-models: the model families, their modes, released sizes and embedded models."""

import typer

from inft.cli.console import make_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def list_models() -> None:
    """Show model families and their sizes.

    For each its modes, default model, released sizes and embedded model.
    """
    from inft.cli.modeltext import models_table

    make_console().print(models_table())
