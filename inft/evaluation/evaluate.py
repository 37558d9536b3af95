"""evaluate(): one evaluation from resolved parameters to its directory of predictions, scores and tables.

adapter → rows → model → captions → scores → forgetting → drift
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from inft.data.batches import load_samples
from inft.data.heldout import spread, unit_hash
from inft.evaluation.captioner import Captioner, load_captioner
from inft.evaluation.drift import measure_drift
from inft.evaluation.fewshot import CANDIDATES, random_shots, similar_shots
from inft.evaluation.forgetting import ForgettingTask, measure_forgetting
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
from inft.evaluation.rows import EvalRow, EvalRows, load_rows
from inft.models import load_spec
from inft.training.callbacks import sigterm_interrupts
from inft.training.storage import locked, write_text
from inft.training.stored import StoredAdapter, read_adapter
from params.errors import UserError
from params.evaluation import EvalParams

if TYPE_CHECKING:
    from PIL.Image import Image

GALLERY_ROWS = 4  # of each language
GALLERY_PIXELS = 320  # longer side of a small copy
LEAST_DRIFT_ROWS = 4


def evaluate(params: EvalParams, directory: Path, *, overwrite: bool = False, console: Console | None = None) -> Stored:
    """Do what ``params`` say, writing to ``directory``, and return what lies there afterwards.

    Rows, forgetting and drift that are there already are kept: a killed evaluation goes on. Errors: UserError for
    everything that the user can mend, such as a directory that holds an evaluation of other settings.
    """
    console = console or Console()
    stored = read_adapter(Path(params.adapter)) if params.adapter is not None else None
    spec = load_spec(params.model)
    rows = load_rows(params.data, limit=params.limit, with_images=spec.takes_images, trained=params.trained)
    tasks = [rows, *(_forgetting_rows(params, with_images=spec.takes_images),)] if params.forgetting else [rows]
    for task in tasks:
        check_scoring(
            [row.references for row in task.rows],
            [row.sample.language for row in task.rows],
            cjk_tokens=params.data.cjk_tokens,
        )
    _tell_left_out(rows, console)
    with ExitStack() as stack:
        stack.enter_context(sigterm_interrupts())
        _make_directory(directory)
        stack.enter_context(locked(directory, doing="evaluating into"))
        _claim(directory, _record(params, rows, stored), overwrite=overwrite)
        try:
            _work(params, directory, stored, rows, tasks[-1], console)
        except KeyboardInterrupt:
            done = len(read_predictions(directory))
            console.print(f"stopped: {done:,} of {len(rows.rows):,} rows are done; the same command goes on.")
            raise
    return read_stored(directory)


def _work(
    params: EvalParams,
    directory: Path,
    stored: StoredAdapter | None,
    rows: EvalRows,
    forgetting_rows: EvalRows,
    console: Console,
) -> None:
    """Everything that needs a model, unless all of it is there."""
    missing = {row.key for row in rows.rows} - {prediction.row for prediction in read_predictions(directory)}
    to_forget = params.forgetting is not None and not (directory / FORGETTING_FILE).is_file()
    to_drift = bool(params.drift) and not (directory / DRIFT_FILE).is_file()
    if missing or to_forget or to_drift:
        with console.status("loading the model"):
            captioner = load_captioner(params, stored)
        captioning = Captioning(
            model=captioner.model,
            collator=captioner.collator,
            max_new_tokens=params.basic.gen_max_new_tokens,
            batch_size=params.batch_size,
            shots=_shots(params, captioner) if missing else None,
        )
        with RowProgress(console) as progress:
            _predict(captioning, rows, directory, progress)
            _score(params, rows, directory)
            if to_forget:
                _measure_forgetting(params, captioner, captioning, forgetting_rows, directory, progress)
        if to_drift:
            with console.status("comparing hidden states"):
                _measure_drift(params, captioner, rows.rows, directory)
    elif not (directory / SCORES_FILE).is_file():
        _score(params, rows, directory)


def _record(params: EvalParams, rows: EvalRows, stored: StoredAdapter | None) -> Evaluation:
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
    if not is_evaluation(directory) and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty and holds no evaluation: choose another --output-dir.")


def _claim(directory: Path, record: Evaluation, *, overwrite: bool) -> None:
    """Write what the directory holds from now on; UserError when that is another evaluation not to be replaced."""
    if is_evaluation(directory) and overwrite:
        for name in (PREDICTIONS_FILE, SCORES_FILE, FORGETTING_FILE, DRIFT_FILE, EVALUATION_FILE):
            (directory / name).unlink(missing_ok=True)
        for name in (GALLERY_DIR, FORGETTING_DIR):
            shutil.rmtree(directory / name, ignore_errors=True)
    elif is_evaluation(directory):
        was, now = asdict(read_evaluation(directory)), asdict(record)
        changed = [f"{name}: {was[name]} → {now[name]}" for name in now if name != "adapter" and was[name] != now[name]]
        if changed:
            raise UserError(
                f"{directory} holds an evaluation of other settings ({'; '.join(changed)[:600]}). Replace it with "
                "--overwrite, or choose another --output-dir."
            )
        return
    try:
        write_text(directory / EVALUATION_FILE, to_json(record))
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}. Choose another --output-dir.") from error


def _shots(params: EvalParams, captioner: Captioner) -> Shots | None:
    if not params.shots:
        return None
    config = replace(params.data, split="train", eval_fraction=0.0, max_rows_per_lang=CANDIDATES)
    examples = load_samples(config, quarantine_file=None, with_images=captioner.spec.takes_images).train
    if params.shot_choice == "similar":
        return similar_shots(captioner, examples, count=params.shots)
    return random_shots(examples, count=params.shots, seed=params.basic.seed)


def _predict(captioning: Captioning, rows: EvalRows, directory: Path, progress: RowProgress) -> list[Prediction]:
    return predict(
        captioning,
        rows.rows,
        directory / PREDICTIONS_FILE,
        on_progress=lambda done, total: progress("captions", done, total),
        on_image=_gallery(rows.rows, directory / GALLERY_DIR),
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


def _score(params: EvalParams, rows: EvalRows, directory: Path) -> None:
    """Write scores.json, scores.csv and scores.tex, each row of the evaluation counted."""
    predictions = read_stored(directory).predictions_of(row.key for row in rows.rows)
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


def _forgetting_rows(params: EvalParams, *, with_images: bool) -> EvalRows:
    assert params.forgetting is not None
    return load_rows(params.forgetting, limit=params.limit, with_images=with_images, trained=params.trained)


def _measure_forgetting(
    params: EvalParams,
    captioner: Captioner,
    captioning: Captioning,
    rows: EvalRows,
    directory: Path,
    progress: RowProgress,
) -> None:
    """Write forgetting.json: zero-shot, whatever the captions before were prompted with."""
    assert params.forgetting is not None
    (directory / FORGETTING_DIR).mkdir(exist_ok=True)
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
        directory / FORGETTING_DIR,
        on_progress=lambda what, done, total: progress(f"forgetting, {what}", done, total),
    )
    write_text(directory / FORGETTING_FILE, to_json(measured))


def _measure_drift(params: EvalParams, captioner: Captioner, rows: Sequence[EvalRow], directory: Path) -> None:
    failed = {prediction.row for prediction in read_predictions(directory) if prediction.error}
    readable = [row for row in rows if row.key not in failed]
    ranks = [unit_hash(params.data.seed, "drift", row.key) for row in readable]
    chosen = spread([row.sample.language for row in readable], ranks, params.drift)
    samples = [readable[i].sample for i in chosen]
    if len(samples) < LEAST_DRIFT_ROWS:
        raise UserError(f"--drift needs {LEAST_DRIFT_ROWS} readable rows, and there are {len(samples)}: leave it out.")
    drift = measure_drift(
        captioner,
        samples,
        batch_size=params.batch_size,
        data=params.data.data or "munichus",
        split=params.data.split,
    )
    write_text(directory / DRIFT_FILE, to_json(drift))


def _tell_left_out(rows: EvalRows, console: Console) -> None:
    words = []
    if rows.without_reference:
        words.append(f"{rows.without_reference:,} rows have no reference caption and are left out")
    if rows.bad:
        first = rows.bad[0]
        words.append(f"{len(rows.bad):,} lines are no rows, the first: {first.where}: {first.reason}")
    for text in words:
        console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
