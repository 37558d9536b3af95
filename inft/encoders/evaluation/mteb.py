"""MTEB (Muennighoff et al. 2023) through its own library: an exported encoder on its tasks and benchmarks.

The library is the extra `mteb`; it downloads the data of its tasks.
"""

import hashlib
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inft.encoders.outputs import check_output, write_json
from inft.training.storage import file_sha256
from params.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

INSTALL = "pip install 'inft[mteb]'"
SUMMARY = "scores.json"  # below the output directory
MODULES = "modules.json"  # by which an exported encoder is told


class MissingTask(UserError):
    """MTEB has no task or benchmark of that name."""


def run_mteb(
    model_dir: Path, tasks: Sequence[Any], output: Path, *, batch_size: int = 32, overwrite: bool = False
) -> dict[str, float]:
    """Evaluate an exported encoder on tasks and return the main score of each, from 0 to 1.

    `tasks` are names of tasks or benchmarks, or task objects of the library. Its result files go below `output`; those
    of the same model are not made again. The scores are written to SUMMARY, which `overwrite` lets replace another
    model's.
    Errors: UserError without the library, for an unknown name, a directory that is no exported encoder, data out of
    reach, and scores of another model that are there.
    """
    _check_summary(output / SUMMARY, model_dir, overwrite)
    library = _library()
    chosen = [task for entry in tasks for task in _tasks(library, entry)]
    model = exported_encoder(model_dir)
    try:
        found = library.evaluate(
            model,
            chosen,
            cache=library.ResultCache(output),
            encode_kwargs={"batch_size": batch_size},
            co2_tracker=False,
            show_progress_bar=False,
        )
    except ConnectionError as error:
        raise UserError(f"the data of MTEB's tasks cannot be downloaded: {error}. Go online, or try again.") from error
    scores = {result.task_name: float(result.get_score()) for result in found.task_results}
    write_json(output / SUMMARY, {"model": str(model_dir), "scores": scores})
    return scores


def exported_encoder(directory: Path) -> Any:
    """Return MTEB's wrapper of an exported encoder, which bears the directory's name and the hash of its files.

    Errors: UserError for a directory that sentence-transformers cannot load.
    """
    if not (directory / MODULES).is_file():
        raise UserError(
            f"{directory} has no {MODULES}: it is no exported encoder. Write one with inft finetune-encoder."
        )
    import inft.models.neobert  # noqa: F401 -- registers NeoBERT with the Auto classes

    _library()
    from mteb.models import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(str(directory), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: cannot be loaded: {str(error).splitlines()[0]}") from error
    wrapped = SentenceTransformerEncoderWrapper(model)
    # Results are kept under these two: without them those of one local model would be taken for another's.
    names = {"name": f"local/{directory.resolve().name}", "revision": _fingerprint(directory)}
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update=names)
    return wrapped


def mteb_table(scores: Mapping[str, float]) -> "Table":
    """A row for each task, times 100, and their mean."""
    from rich.table import Table

    table = Table(title="MTEB, main scores × 100")
    table.add_column("task")
    table.add_column("score", justify="right")
    for name, score in scores.items():
        table.add_row(name, f"{100 * score:.2f}")
    if len(scores) > 1:
        table.caption = f"mean of the tasks: {100 * statistics.fmean(scores.values()):.2f}"
    return table


def _check_summary(summary: Path, model_dir: Path, overwrite: bool) -> None:
    check_output(summary, overwrite=True)
    if not summary.exists() or overwrite:
        return
    try:
        other = json.loads(summary.read_text(encoding="utf-8"))["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{summary} is no summary of scores: give --overwrite to replace it, or another -o.") from error
    if other != str(model_dir):
        raise UserError(f"{summary} holds the scores of {other}: give --overwrite to replace it, or another -o.")


def _library() -> Any:
    try:
        import mteb
    except ModuleNotFoundError as error:
        if error.name != "mteb":
            raise
        raise UserError(f"MTEB is not installed here: {INSTALL}.") from error
    return mteb


def _tasks(library: Any, entry: Any) -> Iterator[Any]:
    """The tasks of a name; a task object is itself."""
    if not isinstance(entry, str):
        yield entry
        return
    reasons = []
    for find in (lambda: library.get_benchmark(entry).tasks, lambda: library.get_tasks(tasks=[entry])):
        try:
            yield from find()
        except KeyError as error:
            reasons.append(str(error.args[0]).removeprefix("KeyError: "))
        else:
            return
    raise MissingTask(f"MTEB has no task or benchmark {entry!r}: {' '.join(reasons)}")


def _fingerprint(directory: Path) -> str:
    """Tells weights, tokenizer, pooling and prompts from any others."""
    files = sorted(path for path in directory.rglob("*") if path.suffix in (".json", ".safetensors"))
    return hashlib.sha256("".join(file_sha256(file) for file in files).encode()).hexdigest()[:16]
