"""inft list-params: every parameter with its type, default and meaning."""

from typing import Annotated

import typer

from inft.cli.console import make_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def list_params(
    sections: Annotated[
        list[str] | None,
        typer.Argument(metavar="basic|data|qlora|lora|sft|preference|rl|craft", help="Only these."),
    ] = None,
    encoder: Annotated[
        bool, typer.Option("--encoder", help="Those of text encoders: inft pretrain, finetune-encoder, preprocess.")
    ] = False,
) -> None:
    """Show every parameter of --set and --config.

    Each with the values it takes, its default and its meaning.
    """
    from rich.table import Table

    from params.check import TRAIN
    from params.describe import describe
    from params.encoder_resolve import ENCODER
    from params.errors import UserError

    schema = ENCODER if encoder else TRAIN
    unknown = [section for section in sections or () if section not in schema.sections]
    if unknown:
        other = "" if encoder or unknown[0] not in ENCODER.sections else " It is one of --encoder."
        raise UserError(f"unknown section {unknown[0]!r}; known: {', '.join(schema.sections)}.{other}")
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("parameter", no_wrap=True)
    table.add_column("values", overflow="fold")
    table.add_column("default", overflow="fold")
    table.add_column("meaning")
    for name in dict.fromkeys(sections or schema.sections):
        for text in describe(name, schema):
            table.add_row(text.name, text.type, text.default, text.help)
    make_console().print(table, markup=False)
