"""inft embed: texts to vectors with a stored encoder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from inft.cli.console import make_console
from params.errors import UserError

if TYPE_CHECKING:
    from craft.pooling import PoolingStrategy
    from inft.encoders.embed import Prompt

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

PROMPTS = ("document", "query")
POOLINGS = ("mean", "cls", "last_token", "weighted_mean")


@app.command()
def embed(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Directory that finetune-encoder or sentence-transformers stored, or a hub id of an encoder.",
        ),
    ],
    texts: Annotated[Path, typer.Argument(metavar="TEXTS", help="A .txt file, a text a line, or .jsonl (--column).")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help=".npy: float32, a row a text; .parquet: columns id and vector."
        ),
    ],
    column: Annotated[str | None, typer.Option(metavar="NAME", help="Of .jsonl rows (default text).")] = None,
    prompt: Annotated[
        str, typer.Option(metavar="query|document", help="Whose stored prefix and length the texts get.")
    ] = "document",
    pooling: Annotated[
        str | None,
        typer.Option(metavar="|".join(POOLINGS), help="Where the model does not say, or instead of what it says."),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of one pass.")] = 16_384,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="To unit length (default as stored).", show_default=False),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", min=3, help="Tokens at which texts are cut (default as stored).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Turn texts into vectors with a stored encoder.

    Pooling, prefixes, length and normalisation are those that the model was trained with. Ids in a .parquet file are
    those of the rows (id or _id), else their numbers from 0. Memory holds a few thousand texts at a time, whatever the
    size of the file.
    """
    from inft.cli.extras import require_extras

    require_extras("pyarrow")
    if prompt not in PROMPTS:
        raise UserError(f"--prompt {prompt}: choose {' or '.join(PROMPTS)}.")
    if pooling is not None and pooling not in POOLINGS:
        raise UserError(f"--pooling {pooling}: choose one of {', '.join(POOLINGS)}.")
    if column is not None and texts.suffix != ".jsonl":
        raise UserError(f"--column is for .jsonl files, and {texts} is none: drop it.")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists: give --overwrite to replace it, or another -o.")
    from inft.encoders.embed import embed_texts, open_embedder
    from inft.encoders.vectors import check_ending

    check_ending(output)
    embedder = open_embedder(
        model,
        pooling=cast("PoolingStrategy | None", pooling),
        max_length=max_length,
        normalize=normalize,
        batch_tokens=batch_tokens,
    )
    told = cast("Prompt", prompt)
    written = embed_texts(embedder, texts, output, column=column or "text", prompt=told, overwrite=overwrite)
    make_console().print(
        f"{written:,} vectors of {embedder.size} numbers in {output}", highlight=False, markup=False, soft_wrap=True
    )
