"""Captions of many rows: in batches, long ones first, one line of JSON a row, going on where a killed run stopped."""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import IO, TYPE_CHECKING, Any

from inft.data.images import ImageError, peek_size
from inft.evaluation.generate import Search, generate_captions
from inft.evaluation.halving import halving
from inft.evaluation.records import Prediction, read_predictions
from inft.evaluation.rows import EvalRow
from inft.models.collate import CaptionCollator
from inft.sample import Sample
from inft.training.storage import disk_trouble, write_text
from params.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Shots = Callable[[EvalRow], Sequence[Sample]]  # the examples that a row's prompt follows
OnImage = Callable[[EvalRow, "Image"], str | None]  # sees an image that was read; may name a file that shows it


@dataclass(frozen=True, kw_only=True)
class Captioning:
    """With what rows are captioned."""

    model: Any
    collator: CaptionCollator
    max_new_tokens: int
    batch_size: int  # rows at the same time; halved for as long as the GPU's memory does not suffice
    search: Search | None = None  # greedy
    shots: Shots | None = None


@dataclass(frozen=True, slots=True)
class ReadImage:
    """An image that is in memory."""

    image: "Image"

    def load(self) -> "Image":
        """Return it."""
        return self.image


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A row whose image was read, or the reason why it could not be."""

    row: EvalRow
    sample: Sample | None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What came of a row."""

    caption: str = ""
    error: str | None = None  # why there is no caption
    shots: int | None = None  # examples that its prompt had room for


def predict(
    captioning: Captioning,
    rows: Sequence[EvalRow],
    file: Path,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    on_image: OnImage | None = None,
) -> list[Prediction]:
    """Caption the rows that ``file`` does not have yet, adding a line for each; return all of them in rows' order.

    A row whose image cannot be read, or whose prompt does not fit, gets an empty caption and the reason: it counts as
    wrong, the others go on, and the next call tries it again. ``on_progress`` hears how many rows of how many are done,
    ``on_image`` sees each image and may name a file that shows it. Errors: UserError when the disk is full; all lines
    written before stay.
    """
    wanted = {row.key for row in rows}
    written = read_predictions(file.parent, name=file.name)
    done = {prediction.row: prediction for prediction in written if prediction.row in wanted and not prediction.error}
    with _appending(file, list(done.values())) as lines:
        if on_progress is not None:
            on_progress(len(done), len(rows))
        todo = [row for row in rows if row.key not in done]
        for predictions in predict_rows(captioning, todo, on_image=on_image):
            lines.writelines(_line(prediction) for prediction in predictions)
            lines.flush()
            done.update((prediction.row, prediction) for prediction in predictions)
            if on_progress is not None:
                on_progress(len(done), len(rows))
    return [done[row.key] for row in rows]


def predict_rows(
    captioning: Captioning, rows: Sequence[EvalRow], *, on_image: OnImage | None = None
) -> Iterator[list[Prediction]]:
    """Yield the predictions of a batch of rows at a time, those with long prompts first."""
    todo = sorted(rows, key=lambda row: _turn(captioning.collator, row))
    with ThreadPoolExecutor(1) as reader:
        for batch in _read_ahead(reader, todo, captioning.batch_size):
            began = perf_counter()
            captions = _captions(captioning, [ready for ready in batch if ready.sample is not None])
            seconds = (perf_counter() - began) / len(batch)
            yield [_prediction(ready, captions, seconds=seconds, image=_shown(ready, on_image)) for ready in batch]


def _turn(collator: CaptionCollator, row: EvalRow) -> tuple[int, str, str]:
    """Long prompts first, so that memory runs out at once or never; a language's rows, alike in length, together."""
    size = None if row.sample.image is None else peek_size(row.sample.image)
    return -collator.rough_length(row.sample, size), row.sample.language, row.key


def _read_ahead(reader: ThreadPoolExecutor, rows: Sequence[EvalRow], size: int) -> Iterator[list[_Ready]]:
    """Batches of rows with their images; the next one is read while this one is captioned."""
    coming: Future[list[_Ready]] | None = None
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        following = reader.submit(_read, part)
        if coming is not None:
            yield coming.result()
        coming = following
    if coming is not None:
        yield coming.result()


def _read(rows: Sequence[EvalRow]) -> list[_Ready]:
    found = []
    for row in rows:
        if row.sample.image is None:
            found.append(_Ready(row=row, sample=row.sample))
            continue
        try:
            image = row.sample.image.load()
        except ImageError as error:
            found.append(_Ready(row=row, sample=None, error=str(error)))
        else:
            found.append(_Ready(row=row, sample=replace(row.sample, image=ReadImage(image))))
    return found


def _captions(captioning: Captioning, batch: Sequence[_Ready]) -> dict[str, _Written]:
    """What was written for each row key; what one row lacks does not stop the others."""
    if not batch:
        return {}
    parts = halving(batch, lambda part: _captions_of(captioning, part))
    return {key: written for part in parts for key, written in part.items()}


def _captions_of(captioning: Captioning, batch: Sequence[_Ready]) -> dict[str, _Written]:
    collator, shots = captioning.collator, captioning.shots
    samples = [ready.sample for ready in batch if ready.sample is not None]
    try:
        before = [list(shots(ready.row)) for ready in batch] if shots is not None else []
        before = collator.fitting_shots(samples, before) if before else []
        texts = generate_captions(
            captioning.model,
            collator,
            samples,
            max_new_tokens=captioning.max_new_tokens,
            batch_size=len(samples),
            search=_search_of(captioning, batch),
            shots=before,
        )
    except UserError as error:
        if len(batch) > 1:  # whose mistake it is shows row by row
            parts = [_captions_of(captioning, [ready]) for ready in batch]
            return {key: written for part in parts for key, written in part.items()}
        return {batch[0].row.key: _Written(error=str(error))}
    used: list[int | None] = [len(row) for row in before] if before else [None] * len(batch)
    return {
        ready.row.key: _Written(caption=text, shots=count)
        for ready, text, count in zip(batch, texts, used, strict=True)
    }


def _search_of(captioning: Captioning, batch: Sequence[_Ready]) -> Search | None:
    """The search with a seed of the batch's own: two rows of the same picture are two draws."""
    search = captioning.search
    if search is None or not search.do_sample:
        return search
    return replace(search, seed=search.seed + zlib.crc32(batch[0].row.key.encode()))


def _halves(captioning: Captioning, batch: Sequence[_Ready]) -> dict[str, _Written]:
    half = len(batch) // 2
    return {**_captions(captioning, batch[:half]), **_captions(captioning, batch[half:])}


def _prediction(ready: _Ready, captions: dict[str, _Written], *, seconds: float, image: str | None) -> Prediction:
    row, written = ready.row, captions.get(ready.row.key, _Written(error=ready.error))
    return Prediction(
        row=row.key,
        lang=row.sample.language,
        generated_caption=written.caption,
        reference_caption=row.references[0],
        title=str(row.sample.meta.get("title", "")),
        where=row.where,
        references=row.references if len(row.references) > 1 else (),
        image=image,
        error=written.error,
        shots=written.shots,
        seconds=round(seconds, 4),
    )


def _shown(ready: _Ready, on_image: OnImage | None) -> str | None:
    if on_image is None or ready.sample is None or ready.sample.image is None:
        return None
    return on_image(ready.row, ready.sample.image.load())


def _line(prediction: Prediction) -> str:
    """A prediction as a line of JSON without what is empty; caption, reference, language and title always."""
    always = ("row", "lang", "generated_caption", "reference_caption", "title")
    values = {key: value for key, value in asdict(prediction).items() if value or key in always or value == 0}
    return json.dumps(values, ensure_ascii=False) + "\n"


@contextmanager
def _appending(file: Path, done: Sequence[Prediction]) -> Iterator[IO[str]]:
    """The file of predictions with the whole lines that it has, open for more; a full disk is a UserError."""
    try:
        write_text(file, "".join(map(_line, done)))
        with file.open("a", encoding="utf-8") as lines:
            yield lines
    except OSError as error:
        reason = disk_trouble(error)
        if reason is None:
            raise
        raise UserError(
            f"{file} cannot be written: {reason}. Free space there; the same command then goes on after the last row "
            "that was written."
        ) from error
