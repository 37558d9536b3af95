"""evaluate(): one evaluation from resolved parameters to its directory of predictions, scores and tables.

adapter → rows → model → captions → scores → forgetting → drift
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from inft.data.batches import load_samples
from inft.data.heldout import spread, unit_hash
from inft.data.rows import RowKind
from inft.evaluation.captioner import Captioner, load_captioner
from inft.evaluation.drift import LEAST_ROWS, measure_drift
from inft.evaluation.fewshot import CANDIDATES, random_shots, refuse_no_room, similar_shots
from inft.evaluation.forgetting import ForgettingTask, measure_forgetting
from inft.evaluation.loss import fitting
from inft.evaluation.metrics.scores import check_scoring, score_captions
from inft.evaluation.metrics.tables import scores_csv, scores_latex
from inft.evaluation.predict import Captioning, OnImage, Shots, predict
from inft.evaluation.progress import RowProgress
from inft.evaluation.records import (
    DRIFT_FILE,
    EVALUATION_FILE,
    FORGETTING_DIR,
    FORGETTING_FILE,
    GALLERY_DIR,
    PREDICTIONS_FILE,
    SCORES_FILE,
    Evaluation,
    Prediction,
    Stored,
    is_evaluation,
    read_evaluation,
    read_predictions,
    read_stored,
    scores_to_json,
    to_json,
)
from inft.evaluation.rows import EvalRow, EvalRows, fingerprint_of, load_rows
from inft.models import load_spec
from inft.training.callbacks import sigterm_interrupts
from inft.training.storage import STAGING, disk_trouble, locked, write_text
from inft.training.stored import StoredAdapter, read_adapter
from params.errors import UserError
from params.evaluation import EvalParams
from params.munichus import MUNIChusLoadConfig

if TYPE_CHECKING:
    from PIL.Image import Image

GALLERY_ROWS = 4  # of each language
GALLERY_PIXELS = 320  # longer side of a small copy


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One evaluation: what is asked for, and where it goes."""

    params: EvalParams
    directory: Path
    stored: StoredAdapter | None
    rows: EvalRows
    forgetting_rows: EvalRows | None
    console: Console


def evaluate(params: EvalParams, directory: Path, *, overwrite: bool = False, console: Console | None = None) -> Stored:
    """Do what ``params`` say, writing to ``directory``, and return what lies there afterwards.

    Rows, forgetting and drift that are there already are kept: a killed evaluation goes on. Errors: UserError for
    everything that the user can mend, such as a directory that holds an evaluation of other settings.
    """
    console = console or Console()
    stored = read_adapter(Path(params.adapter)) if params.adapter is not None else None
    takes_images = load_spec(params.model).takes_images

    def load(config: MUNIChusLoadConfig) -> EvalRows:
        return load_rows(
            config,
            limit=params.limit,
            with_images=takes_images,
            trained=params.trained,
            method=params.method,
            rewards=params.rewards,
        )

    job = _Job(
        params=params,
        directory=directory,
        stored=stored,
        rows=load(params.data),
        forgetting_rows=load(params.forgetting) if params.forgetting is not None else None,
        console=console,
    )
    _refuse_unscorable(job)
    _tell_left_out(job)
    with ExitStack() as stack:
        stack.enter_context(sigterm_interrupts())
        stack.enter_context(_full_disk_told(directory))
        _make_directory(directory)
        stack.enter_context(locked(directory, doing="evaluating into"))
        _claim(job, overwrite=overwrite)
        try:
            _work(job)
        except KeyboardInterrupt:
            done, without = len(read_predictions(directory)), " without --overwrite" if overwrite else ""
            console.print(
                f"stopped: {done:,} of {len(job.rows.rows):,} rows are done; the same command{without} goes on."
            )
            raise
    return read_stored(directory)


def _refuse_unscorable(job: _Job) -> None:
    for rows in (job.rows, job.forgetting_rows):
        if rows is not None:
            references = [row.references for row in rows.rows]
            languages = [row.sample.language for row in rows.rows]
            check_scoring(references, languages, cjk_tokens=job.params.data.cjk_tokens)


@contextmanager
def _full_disk_told(directory: Path) -> Iterator[None]:
    """Turn a write that failed for want of space or permission into a message; other errors go on."""
    try:
        yield
    except OSError as error:
        reason = disk_trouble(error)
        if reason is None:
            raise
        raise UserError(
            f"{directory} cannot be written: {reason}. Free space there; then the same command goes on."
        ) from error


def _work(job: _Job) -> None:
    """Everything that needs a model, unless all of it is there."""
    directory, params = job.directory, job.params
    captioned = {prediction.row for prediction in read_predictions(directory) if not prediction.error}
    missing = {row.key for row in job.rows.rows} - captioned  # rows that failed are tried again: they may be mended
    to_forget = job.forgetting_rows is not None and not (directory / FORGETTING_FILE).is_file()
    to_drift = bool(params.drift) and not (directory / DRIFT_FILE).is_file()
    if missing or to_forget or to_drift:
        with job.console.status("loading the model"):
            captioner = load_captioner(params, job.stored)
        captioning = Captioning(
            model=captioner.model,
            collator=captioner.collator,
            max_new_tokens=params.basic.gen_max_new_tokens,
            batch_size=params.batch_size,
            shots=_shots(job, captioner) if missing else None,
        )
        with RowProgress(job.console) as progress:
            _predict(job, captioning, progress)
            _score(job)
            if to_forget:
                _measure_forgetting(job, captioner, captioning, progress)
        if to_drift:
            with job.console.status("comparing hidden states"):
                _measure_drift(job, captioner)
    elif not (directory / SCORES_FILE).is_file():
        _score(job)


def _record(job: _Job) -> Evaluation:
    params, rows, stored = job.params, job.rows, job.stored
    record: Mapping[str, Any] = (stored.record if stored is not None else None) or {}
    return Evaluation(
        model=params.model,
        base_model=params.model_name,
        adapter=params.adapter,
        adapter_sha256=stored.sha256 if stored is not None else None,
        step=record.get("step"),
        task=record.get("params", {}).get("task"),
        setting=f"{params.shot_choice} {params.shots}-shot" if params.shots else "zero-shot",
        data=params.data.data or "munichus",
        split=params.data.split,
        fingerprint=rows.fingerprint,
        languages=rows.languages,
        language_names={code: params.data.language_names[code] for code in rows.languages},
        rows=len(rows.rows),
        without_reference=rows.without_reference,
        limit=params.limit,
        generation={
            "max_new_tokens": params.basic.gen_max_new_tokens,
            "max_length": params.basic.max_length,
            "max_image_tiles": params.basic.max_image_tiles,
            "dtype": params.basic.dtype,
            "in_4bit": params.qlora.load_in_4bit,
            "seed": params.basic.seed,
            "cjk_tokens": list(params.data.cjk_tokens),
        },
    )


def _make_directory(directory: Path) -> None:
    """Make sure that the directory is there, and is empty or holds an evaluation."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory} cannot be made: {error.strerror}. Choose another --output-dir.") from error
    if not is_evaluation(directory) and any(not path.name.startswith(STAGING) for path in directory.iterdir()):
        raise UserError(f"{directory} is not empty and holds no evaluation: choose another --output-dir.")


def _claim(job: _Job, *, overwrite: bool) -> None:
    """Write what the directory holds from now on; UserError when that is another evaluation not to be replaced."""
    directory, record = job.directory, _record(job)
    if is_evaluation(directory) and overwrite:
        for name in (PREDICTIONS_FILE, SCORES_FILE, FORGETTING_FILE, DRIFT_FILE, EVALUATION_FILE):
            (directory / name).unlink(missing_ok=True)
        for name in (GALLERY_DIR, FORGETTING_DIR):
            shutil.rmtree(directory / name, ignore_errors=True)
    elif is_evaluation(directory):
        changed = _changed(asdict(read_evaluation(directory)), asdict(record)) + _measured_otherwise(job)
        if changed:
            raise UserError(
                f"{directory} holds an evaluation of other settings ({'; '.join(changed)[:600]}). Replace it with "
                "--overwrite, or choose another --output-dir."
            )
        return
    write_text(directory / EVALUATION_FILE, to_json(record))


def _changed(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ, but for where the adapter lies."""
    return [f"{name}: {was[name]} → {now[name]}" for name in now if name != "adapter" and was[name] != now[name]]


def _measured_otherwise(job: _Job) -> list[str]:
    """In what forgetting and drift that are there differ from those that are asked for."""
    found, asked, config = read_stored(job.directory), job.forgetting_rows, job.params.forgetting
    differing = []
    forgotten = found.forgetting
    if (
        forgotten is not None
        and asked is not None
        and config is not None
        and forgotten.fingerprint != asked.fingerprint
    ):
        was = f"{forgotten.data}, {forgotten.split}, {forgotten.rows} rows"
        differing.append(f"forgetting: {was} → {config.data}, {config.split}, {len(asked.rows)} rows")
    if found.drift is not None and job.params.drift:
        rows = _drift_rows(job)
        if found.drift.fingerprint != fingerprint_of(rows):
            differing.append(f"drift: {found.drift.rows} rows → {len(rows)} rows")
    return differing


def _shots(job: _Job, captioner: Captioner) -> Shots | None:
    """The examples of each row; UserError when prompts have room for none."""
    params = job.params
    if not params.shots:
        return None
    # A bad example is left out, however many there are: it is no row of the evaluation.
    config = replace(params.data, split="train", eval_fraction=0.0, max_rows_per_lang=CANDIDATES, max_bad_fraction=1.0)
    kind: RowKind = "captions" if params.method == "sft" else "references"
    examples = load_samples(config, quarantine_file=None, with_images=captioner.spec.takes_images, kind=kind).train
    if params.shot_choice == "similar":
        shots = similar_shots(captioner, examples, count=params.shots)
    else:
        shots = random_shots(examples, count=params.shots, seed=params.basic.seed)
    refuse_no_room(captioner.collator, job.rows.rows, shots)
    return shots


def _predict(job: _Job, captioning: Captioning, progress: RowProgress) -> list[Prediction]:
    return predict(
        captioning,
        job.rows.rows,
        job.directory / PREDICTIONS_FILE,
        on_progress=lambda done, total: progress("captions", done, total),
        on_image=_gallery(job.rows.rows, job.directory / GALLERY_DIR),
    )


def _gallery(rows: Sequence[EvalRow], directory: Path) -> OnImage:
    """What keeps a small copy of the first images of each language and returns its place."""
    shown: set[str] = set()
    for language in {row.sample.language for row in rows}:
        shown |= {row.key for row in [row for row in rows if row.sample.language == language][:GALLERY_ROWS]}

    def keep(row: EvalRow, image: "Image") -> str | None:
        if row.key not in shown:
            return None
        directory.mkdir(exist_ok=True)
        small = image.copy()
        small.thumbnail((GALLERY_PIXELS, GALLERY_PIXELS))
        small.save(directory / f"{row.key}.png")
        return f"{directory.name}/{row.key}.png"

    return keep


def _score(job: _Job) -> None:
    """Write scores.json, scores.csv and scores.tex, each row of the evaluation counted."""
    params, directory = job.params, job.directory
    predictions = read_stored(directory).predictions_of(row.key for row in job.rows.rows)
    scores = score_captions(
        [prediction.generated_caption for prediction in predictions],
        [prediction.all_references for prediction in predictions],
        [prediction.lang for prediction in predictions],
        cjk_tokens=params.data.cjk_tokens,
        resamples=params.resamples,
        seed=params.basic.seed,
    )
    systems = {directory.name: scores}
    write_text(directory / "scores.csv", scores_csv(systems))
    write_text(directory / "scores.tex", scores_latex(systems))
    write_text(directory / SCORES_FILE, scores_to_json(scores))


def _measure_forgetting(job: _Job, captioner: Captioner, captioning: Captioning, progress: RowProgress) -> None:
    """Write forgetting.json: zero-shot, whatever the captions before were prompted with."""
    params, rows = job.params, job.forgetting_rows
    assert params.forgetting is not None
    assert rows is not None
    directory = job.directory / FORGETTING_DIR
    directory.mkdir(exist_ok=True)
    task = ForgettingTask(
        rows=rows,
        data=params.forgetting.data or "munichus",
        split=params.forgetting.split,
        language_names=params.forgetting.language_names,
        cjk_tokens=params.forgetting.cjk_tokens,
        resamples=params.resamples,
        seed=params.basic.seed,
    )
    measured = measure_forgetting(
        captioner,
        replace(captioning, shots=None),
        task,
        directory,
        on_progress=lambda what, done, total: progress(f"forgetting, {what}", done, total),
    )
    write_text(job.directory / FORGETTING_FILE, to_json(measured))


def _drift_rows(job: _Job) -> list[EvalRow]:
    """The rows whose hidden states are compared: as even over the languages as they allow, readable ones alone."""
    failed = {prediction.row for prediction in read_predictions(job.directory) if prediction.error}
    rows = [row for row in job.rows.rows if row.key not in failed]
    ranks = [unit_hash(job.params.data.seed, "drift", row.key) for row in rows]
    return [rows[i] for i in spread([row.sample.language for row in rows], ranks, job.params.drift)]


def _measure_drift(job: _Job, captioner: Captioner) -> None:
    rows = _drift_rows(job)
    samples = fitting(captioner.collator, [row.sample for row in rows])
    if len(samples) < LEAST_ROWS:
        raise UserError(
            f"--drift needs {LEAST_ROWS} rows at least, and {len(samples)} of {len(job.rows.rows)} can be read and fit "
            "into basic.max_length: raise --drift and --limit, or leave it out."
        )
    data = job.params.data
    drift = measure_drift(
        captioner, samples, data=data.data or "munichus", split=data.split, fingerprint=fingerprint_of(rows)
    )
    write_text(job.directory / DRIFT_FILE, to_json(drift))


def _tell_left_out(job: _Job) -> None:
    rows, words = job.rows, []
    if rows.without_reference:
        words.append(f"{rows.without_reference:,} rows have no reference caption and are left out")
    if rows.bad:
        first = rows.bad[0]
        words.append(f"{len(rows.bad):,} lines are no rows, the first: {first.where}: {first.reason}")
    if rows.other_languages:
        counts = ", ".join(f"{count:,} in {code or '?'}" for code, count in rows.other_languages.items())
        words.append(f"rows in other languages are left out: {counts} (--languages; a code needs a name in the prompt)")
    for text in words:
        job.console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
