"""inft embed: texts to vectors with a stored encoder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from inft.cli.console import make_console, stderr_console
from params.errors import UserError

if TYPE_CHECKING:
    from craft.pooling import PoolingStrategy
    from inft.encoders.embed import Embedder, Prompt

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

PROMPTS = ("document", "query")
POOLINGS = ("mean", "cls", "last_token", "weighted_mean")
EXAMPLE = "\b\nExample:\n  inft embed outputs/neobert_contrastive texts.jsonl --column body -o vectors.parquet"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="The encoder: a directory that finetune-encoder or sentence-transformers stored, the output directory of "
        "a run (its newest model is taken), or a hub id.",
        show_default=False,
    ),
]
PoolingOption = Annotated[
    str | None,
    typer.Option(
        "--pooling",
        metavar="|".join(POOLINGS),
        help="How the vectors of a text's tokens become one: needed where the model does not say, and used instead of "
        "what it says.",
    ),
]
BatchTokens = Annotated[
    int,
    typer.Option(
        metavar="N", min=1, help="Tokens that go through the model at a time, padding counted; more take more memory."
    ),
]


@app.command(epilog=EXAMPLE)
def embed(
    model: Model,
    texts: Annotated[
        Path,
        typer.Argument(
            metavar="TEXTS",
            help="A .txt file with a text on each line, or a .jsonl file with one in a column of each (see --column).",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where the vectors go. *.npy: float32, one row for each text; *.parquet: the columns id and vector.",
        ),
    ],
    column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column of a .jsonl file that has the texts (default text).")
    ] = None,
    prompt: Annotated[
        str,
        typer.Option(
            metavar="|".join(PROMPTS),
            help="What the texts are: they get the prefix and the longest length that the model was trained with for "
            "these.",
        ),
    ] = "document",
    pooling: PoolingOption = None,
    batch_tokens: BatchTokens = 16_384,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize",
            help="Whether vectors are scaled to length 1 (default as stored with the model).",
            show_default=False,
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=3, help="Tokens at which a longer text is cut (default as stored with the model)."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it exists.")] = False,
) -> None:
    """Turn texts into vectors with a stored encoder.

    Pooling, prefixes, length and normalisation are those that the model was trained with. Ids in a .parquet file are
    those of the rows (id or _id), else their numbers from 0. Memory holds a few thousand texts at a time, whatever the
    size of the file. All texts are checked before the first one is embedded.
    """
    from inft.cli.extras import require_extras

    require_extras("pyarrow")
    if prompt not in PROMPTS:
        raise UserError(f"--prompt {prompt}: choose {' or '.join(PROMPTS)}.")
    check_pooling(pooling)
    if column is not None and texts.suffix != ".jsonl":
        raise UserError(f"--column is for .jsonl files, and {texts} is none: drop it.")
    from inft.encoders.embed import embed_texts
    from inft.encoders.outputs import check_output
    from inft.encoders.vectors import check_ending

    check_ending(output)
    check_output(output, overwrite=overwrite)
    embedder = load_embedder(model, pooling, batch_tokens, max_length, normalize)
    told = cast("Prompt", prompt)
    written = embed_texts(embedder, texts, output, column=column or "text", prompt=told, overwrite=overwrite)
    make_console().print(
        f"{written:,} vectors of {embedder.size} numbers in {output}", highlight=False, markup=False, soft_wrap=True
    )


def check_pooling(pooling: str | None) -> None:
    """UserError for a pooling that does not exist."""
    if pooling is not None and pooling not in POOLINGS:
        raise UserError(f"--pooling {pooling}: choose one of {', '.join(POOLINGS)}.")


def load_embedder(
    model: str, pooling: str | None, batch_tokens: int, max_length: int | None, normalize: bool | None = None
) -> "Embedder":
    """Load a model, of a run its newest; what is worth knowing of its settings goes to stderr."""
    from inft.encoders.embed import open_embedder

    embedder = open_embedder(
        stored_model(model),
        pooling=cast("PoolingStrategy | None", pooling),
        max_length=max_length,
        normalize=normalize,
        batch_tokens=batch_tokens,
    )
    for note in embedder.notes:
        stderr_console().print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    return embedder


def stored_model(model: str) -> str:
    """The newest model of a run's directory, which is told on stderr; any other model as it is."""
    from inft.encoders.stored import find_model

    found = find_model(model)
    if found != model:
        told = f"model: {found} (the newest of {model})"
        stderr_console().print(told, highlight=False, markup=False, soft_wrap=True)
    return found
