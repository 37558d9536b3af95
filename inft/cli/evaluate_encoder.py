"""inft evaluate-encoder: what a stored text encoder is worth, each sub-command by one measure."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from inft.cli.console import make_console, stderr_console
from params.errors import UserError

if TYPE_CHECKING:
    from craft.pooling import PoolingStrategy
    from inft.encoders.embed import Embedder

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A stored encoder, such as outputs/neobert/model_checkpoints/100000, or a hub id.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE.json", help="Figures and settings as JSON.")
]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Rows at a time.")]
MaxLength = Annotated[
    int | None, typer.Option(metavar="N", min=3, help="Tokens of a text (default as stored, or what the model takes).")
]
POOLINGS = ("mean", "cls", "last_token", "weighted_mean")
PoolingOption = Annotated[
    str | None,
    typer.Option(
        "--pooling", metavar="|".join(POOLINGS), help="Where the model does not say, or instead of what it says."
    ),
]
BatchTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of one pass.")]
Figures = Mapping[str, Mapping[str, float]]  # file or directory -> metric -> value


@app.callback()
def evaluate_encoder() -> None:
    """Measure a stored text encoder.

    GLUE, pseudo-perplexity, retrieval, semantic similarity (STS) and MTEB.

    Local files, in common layouts, are enough for all but MTEB.
    """


@app.command()
def glue(
    model: Model,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="cola|sst2|mrpc|qqp|stsb|mnli|qnli|rte|wnli",
            help="Of GLUE; repeatable (default all). With --data and --columns: any name for a task of your own.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="With train and validation (or dev) as .jsonl, .csv, .tsv or .parquet; with several tasks a directory "
            "of each (default: the hub's nyu-mll/glue).",
        ),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="NAME[,NAME]", help="The columns of one or two texts, for a task of your own.")
    ] = None,
    label: Annotated[str, typer.Option(metavar="NAME", help="The column of labels, with --columns.")] = "label",
    regression: Annotated[
        bool, typer.Option("--regression", help="With --columns: labels are numbers to predict, not classes.")
    ] = False,
    seeds: Annotated[str, typer.Option(metavar="N,…", help="One fine-tuning for each.")] = "0,1,2",
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Passes over the train rows, at most.")] = 10,
    patience: Annotated[
        int, typer.Option(metavar="N", min=1, help="Epochs without a better score before a fine-tuning ends.")
    ] = 3,
    lr: Annotated[float, typer.Option(metavar="X", min=0, help="Peak; decays to 0 linearly.")] = 3e-5,
    batch_size: BatchSize = 32,
    max_length: Annotated[int, typer.Option(metavar="N", min=3, help="Tokens of a row; longer ones are cut.")] = 256,
    output: Output = None,
) -> None:
    """Fine-tune on tasks in GLUE's format.

    Once for each seed; printed are the validation figures as mean ± standard deviation, each seed with its best epoch
    on the validation rows. The stored encoder is not changed.
    """
    from inft.cli.extras import require_extras

    names = _tasks(task, columns, label, regression, data)
    own_columns = None if columns is None else _columns(columns)
    numbers = _whole_numbers("--seeds", seeds)
    require_extras("accelerate", *(() if data else ("datasets",)))
    from inft.encoders.evaluation.glue import GlueParams, glue_table, run_glue, save_results
    from inft.encoders.evaluation.glue_data import local_task, named_task, own_task, read_task
    from inft.training.quiet import quiet_libraries

    params = GlueParams(
        seeds=numbers, epochs=epochs, patience=patience, lr=lr, batch_size=batch_size, max_length=max_length
    )
    console, progress, found = make_console(), stderr_console(), []
    quiet_libraries(progress_bars=False)
    for name in names:
        place = data if data is None or len(names) == 1 else data / name
        one = named_task(name) if own_columns is None else own_task(name, own_columns, label, regression=regression)
        rows = read_task(one if place is None else local_task(one, place), place)
        found.append(run_glue(model, rows, params, say=lambda line: progress.print(line, markup=False)))
        if output is not None:
            save_results(output, found)
    console.print(glue_table(found))
    _say_where(output)


@app.command()
def pseudo_perplexity(
    model: Model,
    texts: Annotated[
        Path,
        typer.Argument(
            metavar="TEXTS", help="A .jsonl, .csv, .tsv or .parquet file, or .txt with a text on each line."
        ),
    ],
    text_column: Annotated[str, typer.Option(metavar="NAME", help="Of the rows.")] = "text",
    language_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also show each language's figure.")
    ] = None,
    word_l2r: Annotated[
        bool, typer.Option("--word-l2r", help="Mask the later tokens of the same word too (Kauf and Ivanova 2023).")
    ] = False,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="The first N texts.")] = None,
    max_length: MaxLength = None,
    token_budget: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of masked copies at a time; more take more memory.")
    ] = 16_384,
    output: Output = None,
) -> None:
    """Pseudo-perplexity of texts.

    Every token is masked alone and predicted from all the others (Salazar et al. 2020), exactly: a text of n tokens
    takes n passes. For NeoBERT, whose copies go through unpadded.
    """
    from inft.encoders.evaluation.pseudo_perplexity import corpus_scores, evaluate_texts, perplexity_table, save_scores
    from inft.encoders.evaluation.tables import read_texts

    rows = read_texts(texts, text_column, language_column)[:limit]
    documents = evaluate_texts(model, rows, max_length=max_length, word_l2r=word_l2r, token_budget=token_budget)
    make_console().print(perplexity_table(corpus_scores(documents)))
    if output is not None:
        save_scores(output, documents, settings={"model": model, "texts": str(texts), "word_l2r": word_l2r})
    _say_where(output)


@app.command()
def retrieval(
    model: Model,
    data: Annotated[
        list[Path],
        typer.Option(metavar="DIR", help="In BEIR's layout: corpus.jsonl, queries.jsonl, qrels.tsv; repeatable."),
    ],
    split: Annotated[
        str, typer.Option(metavar="NAME", help="Of qrels/NAME.tsv, where there is no qrels.tsv.")
    ] = "test",
    pooling: PoolingOption = None,
    batch_tokens: BatchTokens = 16_384,
    max_length: MaxLength = None,
    output: Output = None,
) -> None:
    """Find the documents that answer queries.

    Recall@k, nDCG@k and MRR. All documents are compared with every query; pooling and prefixes are as stored with the
    encoder.
    """
    from inft.encoders.evaluation.retrieval import evaluate_retrieval

    embedder = _embedder(model, pooling, batch_tokens, max_length)
    figures = {str(place): evaluate_retrieval(embedder, place, split=split) for place in data}
    _show("Retrieval", model, figures, output)


@app.command()
def sts(
    model: Model,
    data: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="A .tsv or .jsonl file: sentence1, sentence2 and score; repeatable."),
    ],
    pooling: PoolingOption = None,
    batch_tokens: BatchTokens = 16_384,
    max_length: MaxLength = None,
    output: Output = None,
) -> None:
    """Compare cosines with people's scores.

    Spearman's correlation over pairs of texts; pooling and prefixes are those stored with the encoder.
    """
    from inft.encoders.evaluation.sts import evaluate_sts

    embedder = _embedder(model, pooling, batch_tokens, max_length)
    _show("STS", model, {str(file): evaluate_sts(embedder, file) for file in data}, output)


@app.command()
def mteb(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An exported encoder: a directory with modules.json.")],
    tasks: Annotated[
        list[str],
        typer.Option("--task", metavar="NAME", help='Of MTEB, or a benchmark such as "MTEB(eng, v2)"; repeatable.'),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The library's result files.")] = Path(
        "metrics/mteb"
    ),
    batch_size: BatchSize = 32,
) -> None:
    """Run tasks of MTEB (the extra mteb).

    Through its own library, which downloads their data. Results of the same model that are there already are
    not made again.
    """
    from inft.encoders.evaluation.mteb import SUMMARY, mteb_table, run_mteb

    make_console().print(mteb_table(run_mteb(model, tasks, output, batch_size=batch_size)))
    _say_where(output / SUMMARY)


def _embedder(model: str, pooling: str | None, batch_tokens: int, max_length: int | None) -> "Embedder":
    if pooling is not None and pooling not in POOLINGS:
        raise UserError(f"--pooling {pooling}: choose one of {', '.join(POOLINGS)}.")
    from inft.encoders.embed import open_embedder

    told = cast("PoolingStrategy | None", pooling)
    return open_embedder(model, pooling=told, batch_tokens=batch_tokens, max_length=max_length)


def _show(title: str, model: str, figures: Figures, output: Path | None) -> None:
    """A table with a row for each data set, and the same as JSON."""
    from rich.table import Table

    from inft.training.storage import write_text

    table = Table(title=f"{title}: {model}")
    names = list(next(iter(figures.values())))
    for heading in ("data", *names):
        table.add_column(heading, justify="left" if heading == "data" else "right")
    for place, found in figures.items():
        table.add_row(
            place, *(f"{found[name]:,}" if isinstance(found[name], int) else f"{found[name]:.4f}" for name in names)
        )
    make_console().print(table)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps({"model": model, "figures": figures}, indent=1) + "\n")
    _say_where(output)


def _tasks(task: list[str] | None, columns: str | None, label: str, regression: bool, data: Path | None) -> list[str]:
    """The names of the tasks; UserError for unknown ones and for options that would have no effect."""
    from inft.encoders.evaluation.glue_data import TASKS, named_task

    if columns is None and (label != "label" or regression):
        raise UserError("--label and --regression describe a task of your own: give --columns, too.")
    if columns is not None and task is not None and len(task) > 1:
        raise UserError("--columns describes one task: give one --task NAME, or none.")
    if columns is not None and data is None:
        raise UserError("--columns needs --data DIR: the hub's tasks have columns of their own.")
    for name in task or () if columns is None else ():
        named_task(name)
    return list(task or (TASKS if columns is None else ["own"]))


def _columns(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if len(names) > 2 or not all(names):
        raise UserError(f"--columns {text}: name one or two columns, such as sentence1,sentence2.")
    return names


def _whole_numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{option} {text}: give whole numbers, such as 0,1,2.") from error
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{option} {text}: a number stands there twice.")
    return numbers


def _say_where(path: Path | None) -> None:
    if path is not None:
        make_console().print(f"figures: {path}", markup=False, soft_wrap=True)
