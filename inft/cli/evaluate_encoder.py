"""inft evaluate-encoder: what a stored text encoder is worth, each sub-command by one measure."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inft.cli.console import make_console, stderr_console
from inft.cli.embed import BatchTokens, PoolingOption, check_pooling, load_embedder, stored_model
from params.errors import UserError

if TYPE_CHECKING:
    from inft.encoders.embed import Embedder

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="The encoder: a stored one, such as outputs/neobert/model_checkpoints/100000, the output directory of a "
        "run (its newest model is taken), or a hub id.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE.json", help="Also write the figures, and the settings behind them, as JSON."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it exists.")]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Texts that go through the model at a time.")]
MaxLength = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=3,
        help="Tokens at which a longer text is cut (default as stored with the model, or what it can take).",
    ),
]
SEEDS = 2**32  # numpy takes none from here on
Figures = Mapping[str, Mapping[str, float]]  # file or directory -> metric -> value


def _example(*lines: str) -> str:
    """An epilog that keeps its lines."""
    return "\b\nExample:\n" + "\n".join(f"  inft evaluate-encoder {line}" for line in lines)


@app.callback()
def evaluate_encoder() -> None:
    """Measure a stored text encoder.

    GLUE, pseudo-perplexity, retrieval, semantic similarity (STS) and MTEB: each is a sub-command with its own --help.

    Local files, in common layouts, are enough for all but MTEB.
    """


@app.command(
    epilog=_example("glue outputs/neobert --task mrpc --task rte", "glue outputs/neobert --columns text --data my_task")
)
def glue(
    model: Model,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="cola|sst2|mrpc|qqp|stsb|mnli|qnli|rte|wnli",
            help="A task of GLUE; give it several times for several tasks (default all). With --data and --columns: "
            "any name for a task of your own.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A directory with the files train and validation (or dev), each .jsonl, .csv, .tsv or .parquet; with "
            "several tasks a directory of such directories, each named as its task (default: nyu-mll/glue of the hub).",
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME]",
            help="For a task of your own: the column with the text, or the two columns of a pair.",
        ),
    ] = None,
    label: Annotated[str, typer.Option(metavar="NAME", help="With --columns: the column with the labels.")] = "label",
    regression: Annotated[
        bool, typer.Option("--regression", help="With --columns: labels are numbers to predict, not classes.")
    ] = False,
    seeds: Annotated[
        str,
        typer.Option(
            metavar="N,…", help="Random seeds, from 0 to 4294967295: the model is fine-tuned once with each of them."
        ),
    ] = "0,1,2",
    epochs: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most passes over the rows that are trained on.")
    ] = 10,
    patience: Annotated[
        int, typer.Option(metavar="N", min=1, help="Passes without a better score after which a fine-tuning ends.")
    ] = 3,
    lr: Annotated[
        float, typer.Option(metavar="X", min=0, help="Highest learning rate, from which it falls to 0 in a line.")
    ] = 3e-5,
    batch_size: BatchSize = 32,
    max_length: Annotated[int, typer.Option(metavar="N", min=3, help="Tokens at which a longer row is cut.")] = 256,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune on tasks in GLUE's format.

    The encoder is fine-tuned once with each seed. What is printed are the figures on the validation rows, as mean ±
    standard deviation over the seeds; each seed counts with the epoch that was best on these rows. The stored encoder
    is not changed.

    Labels of GLUE's tasks are the names of their classes or the numbers from 0 in GLUE's order.
    """
    from inft.cli.extras import require_extras

    names = _tasks(task, columns, label, regression, data)
    own_columns = None if columns is None else _columns(columns)
    numbers = _seeds(seeds)
    _check_output(output, overwrite)
    require_extras("accelerate", *(() if data else ("datasets",)))
    from inft.encoders.evaluation.glue import GlueParams, glue_table, run_glue, save_results
    from inft.encoders.evaluation.glue_data import local_task, named_task, own_task, read_task
    from inft.training.quiet import quiet_libraries

    params = GlueParams(
        seeds=numbers, epochs=epochs, patience=patience, lr=lr, batch_size=batch_size, max_length=max_length
    )
    console, progress, found = make_console(), stderr_console(), []
    quiet_libraries(progress_bars=False)
    tasks = []
    for name in names:  # all are read before the first one is learned, which takes long
        place = data if data is None or len(names) == 1 else data / name
        one = named_task(name) if own_columns is None else own_task(name, own_columns, label, regression=regression)
        tasks.append(read_task(one if place is None else local_task(one, place), place))
    model = stored_model(model)
    for rows in tasks:
        found.append(run_glue(model, rows, params, say=lambda line: progress.print(line, markup=False)))
        if output is not None:
            save_results(output, found)
    console.print(glue_table(found))
    _say_where(output)


@app.command(epilog=_example("pseudo-perplexity outputs/neobert texts.jsonl --language-column language -o scores.json"))
def pseudo_perplexity(
    model: Model,
    texts: Annotated[
        Path,
        typer.Argument(
            metavar="TEXTS",
            help="A .jsonl, .csv, .tsv or .parquet file, or a .txt file with a text on each line.",
            show_default=False,
        ),
    ],
    text_column: Annotated[str, typer.Option(metavar="NAME", help="The column that has the texts.")] = "text",
    language_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The column that names each text's language: also show a figure for each."),
    ] = None,
    word_l2r: Annotated[
        bool,
        typer.Option("--word-l2r", help="Mask with a token the later ones of its word, too (Kauf and Ivanova 2023)."),
    ] = False,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Score only the first N texts.")] = None,
    max_length: MaxLength = None,
    token_budget: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of masked copies at a time; more take more memory.")
    ] = 16_384,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Pseudo-perplexity of texts.

    Every token is masked alone and predicted from all the others (Salazar et al. 2020), exactly: a text of n tokens
    takes n passes. For NeoBERT with its masked-LM head, whose copies go through unpadded.

    Special tokens written in a text, such as [MASK], are letters as any others. "unknown" is the share of the tokens
    that stand for what the vocabulary does not have: they are easy to predict, so compare only figures with few.
    """
    from inft.encoders.evaluation.pseudo_perplexity import corpus_scores, evaluate_texts, perplexity_table, save_scores
    from inft.encoders.evaluation.tables import read_texts

    _check_output(output, overwrite)
    rows = read_texts(texts, text_column, language_column)[:limit]
    model = stored_model(model)
    documents = evaluate_texts(model, rows, max_length=max_length, word_l2r=word_l2r, token_budget=token_budget)
    make_console().print(perplexity_table(corpus_scores(documents)))
    if output is not None:
        settings = {"model": model, "texts": str(texts), "word_l2r": word_l2r, "max_length": max_length}
        save_scores(output, documents, settings=settings)
    _say_where(output)


@app.command(epilog=_example("retrieval outputs/neobert_contrastive --data my_corpus -o retrieval.json"))
def retrieval(
    model: Model,
    data: Annotated[
        list[Path],
        typer.Option(
            metavar="DIR",
            help="A directory in BEIR's layout, with corpus.jsonl, queries.jsonl and qrels.tsv (or qrels/SPLIT.tsv); "
            "give it several times for several.",
        ),
    ],
    split: Annotated[
        str, typer.Option(metavar="NAME", help="Where there is no qrels.tsv, judgements are those of qrels/NAME.tsv.")
    ] = "test",
    pooling: PoolingOption = None,
    batch_tokens: BatchTokens = 16_384,
    max_length: MaxLength = None,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Find the documents that answer queries.

    The figures are recall@k, nDCG@k and MRR, means over the queries with a relevant document. All documents are
    compared with every query; one with the query's own id is left out of its ranking. Pooling and prefixes are as
    stored with the encoder.

    Recall@k is the share of a query's relevant documents that are among the first k: it cannot exceed k divided by
    their number, and nDCG@k can.
    """
    from inft.encoders.evaluation.retrieval import open_retrieval, score_retrieval

    check_pooling(pooling)
    _check_output(output, overwrite)
    tasks = {str(place): open_retrieval(place, split) for place in data}  # all are read before the first is embedded
    model = stored_model(model)
    embedder = load_embedder(model, pooling, batch_tokens, max_length)
    figures = {place: score_retrieval(embedder, task) for place, task in tasks.items()}
    _show("Retrieval", model, figures)
    _save(output, model, figures, {**_settings(embedder), "split": split})


@app.command(epilog=_example("sts outputs/neobert_contrastive --data pairs.tsv -o sts.json"))
def sts(
    model: Model,
    data: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            help="A .tsv, .csv, .jsonl or .parquet file with the columns sentence1, sentence2 and score; give it "
            "several times for several.",
        ),
    ],
    pooling: PoolingOption = None,
    batch_tokens: BatchTokens = 16_384,
    max_length: MaxLength = None,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare cosines with people's scores.

    The figure is Spearman's correlation over pairs of texts. Pooling and prefixes are those stored with the encoder.
    """
    from inft.encoders.evaluation.sts import read_pairs, score_pairs

    check_pooling(pooling)
    _check_output(output, overwrite)
    files = {str(file): read_pairs(file) for file in data}  # all are read before the first is embedded
    model = stored_model(model)
    embedder = load_embedder(model, pooling, batch_tokens, max_length)
    figures = {file: score_pairs(embedder, pairs) for file, pairs in files.items()}
    _show("STS", model, figures)
    _save(output, model, figures, _settings(embedder))


@app.command(epilog=_example("mteb outputs/neobert_contrastive --task STS12 -o metrics/mteb"))
def mteb(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="An exported encoder, a directory with modules.json, or the output directory of a contrastive run "
            "(its newest model is taken).",
            show_default=False,
        ),
    ],
    tasks: Annotated[
        list[str],
        typer.Option(
            "--task",
            metavar="NAME",
            help='A task of MTEB, or a benchmark such as "MTEB(eng, v2)"; give it several times for several.',
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where scores.json and the library's results go.")
    ] = Path("metrics/mteb"),
    batch_size: BatchSize = 32,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the scores.json of another model if it is there.")
    ] = False,
) -> None:
    """Run tasks of MTEB (the extra mteb).

    They are run by MTEB's own library, which downloads their data. Results of the same model that are there already
    are not made again.
    """
    from inft.encoders.evaluation.mteb import SUMMARY, mteb_table, run_mteb

    directory = Path(stored_model(model))
    make_console().print(mteb_table(run_mteb(directory, tasks, output, batch_size=batch_size, overwrite=overwrite)))
    _say_where(output / SUMMARY)


def _check_output(output: Path | None, overwrite: bool) -> None:
    """UserError before the work for an output that could not be written after it."""
    from inft.encoders.outputs import check_output

    if output is not None:
        check_output(output, overwrite=overwrite)
    elif overwrite:
        raise UserError("--overwrite replaces a file: name it by -o, or drop --overwrite.")


def _settings(embedder: "Embedder") -> dict[str, Any]:
    return {name: value for name, value in asdict(embedder.settings).items() if name != "notes"}


def _show(title: str, model: str, figures: Figures) -> None:
    """A table with a column for each data set."""
    from rich.table import Table

    table = Table(title=f"{title}: {model}")
    table.add_column("figure")
    for place in figures:
        table.add_column(place, justify="right", overflow="fold")
    for name in next(iter(figures.values())):
        values = [found[name] for found in figures.values()]
        table.add_row(name, *(f"{value:,}" if isinstance(value, int) else f"{value:.4f}" for value in values))
    make_console().print(table)


def _save(output: Path | None, model: str, figures: Figures, settings: Mapping[str, Any]) -> None:
    from inft.encoders.outputs import write_json

    if output is not None:
        write_json(output, {"model": model, "settings": settings, "figures": figures})
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


def _seeds(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--seeds {text}: give whole numbers, such as 0,1,2.") from error
    if any(not 0 <= number < SEEDS for number in numbers):
        raise UserError(f"--seeds {text}: give numbers from 0 to {SEEDS - 1}.")
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds {text}: a number stands there twice.")
    return numbers


def _say_where(path: Path | None) -> None:
    if path is not None:
        make_console().print(f"figures: {path}", markup=False, soft_wrap=True)
