"""What fine-tuning cost: base and adapter on rows that the base could do, with images, with others' images, without."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from inft.evaluation.captioner import Captioner
from inft.evaluation.loss import RowLosses, fitting, row_losses
from inft.evaluation.metrics import ALL, Score, Scores
from inft.evaluation.metrics.bootstrap import interval, resampled_sums
from inft.evaluation.metrics.scores import score_captions, score_differences
from inft.evaluation.predict import Captioning, predict
from inft.evaluation.records import Forgetting, Prediction
from inft.evaluation.rows import EvalRow, EvalRows
from inft.evaluation.shuffle import shuffled_order, with_input_of
from inft.evaluation.verdict import could_do
from inft.sample import Sample
from params.errors import UserError

Progress = Callable[[str, int, int], None]  # what is done, rows done, rows in all


@dataclass(frozen=True, kw_only=True)
class ForgettingTask:
    """The rows that are asked for and how they are scored."""

    rows: EvalRows
    data: str
    split: str
    language_names: Mapping[str, str]
    cjk_tokens: Sequence[str]
    resamples: int
    seed: int


def measure_forgetting(
    captioner: Captioner, captioning: Captioning, task: ForgettingTask, directory: Path, *, on_progress: Progress
) -> Forgetting:
    """Caption the rows four times (base and adapter, own images and shuffled ones), score them and their losses.

    Captions are lines in ``directory``, so that a killed run goes on. A language counts as one that the base could do
    when the base's chrF with the right images is above, interval and all, what it scores with those of other rows.
    """
    rows = task.rows.rows
    shuffled = shuffled_rows(rows, seed=task.seed)
    measured: list[EvalRow] = []
    found: dict[str, list[Prediction]] = {}
    for name, asked, adapted in (
        ("base", rows, False),
        ("adapter", rows, True),
        ("base_shuffled", shuffled, False),
        ("adapter_shuffled", shuffled, True),
    ):
        file = directory / f"{name}.jsonl"
        if adapted:
            found[name] = predict(captioning, asked, file, on_progress=_named(on_progress, name))
        else:
            with captioner.base():
                found[name] = predict(captioning, asked, file, on_progress=_named(on_progress, name))
        measured = measured or _measurable(rows, found["base"], captioner, task)
    scores = {name: _scored(predictions, task) for name, predictions in found.items()}
    return Forgetting(
        data=task.data,
        split=task.split,
        rows=len(rows),
        fingerprint=task.rows.fingerprint,
        loss_rows=len(measured),
        language_names=task.language_names,
        could_do=could_do(scores["base"], scores["base_shuffled"]),
        base=scores["base"],
        adapter=scores["adapter"],
        base_shuffled=scores["base_shuffled"],
        adapter_shuffled=scores["adapter_shuffled"],
        difference=score_differences(
            _captions(found["base"]), _captions(found["adapter"]), *_expected(found["base"]), **_settings(task)
        ),
        loss=_losses(captioner, captioning, measured, task),
    )


def shuffled_rows(rows: Sequence[EvalRow], *, seed: int) -> list[EvalRow]:
    """The same rows, each with the input of another row of its language, and a key that tells which."""
    partners = shuffled_order([row.sample for row in rows], seed=seed)
    return [
        replace(row, key=f"{row.key}+{rows[there].key}", sample=with_input_of(row.sample, rows[there].sample))
        for row, there in zip(rows, partners, strict=True)
    ]


def without_input(sample: Sample) -> Sample:
    """The row as a text-only one: no image, and no news text that could stand for it."""
    return replace(sample, image=None, prompt=sample.prompt.with_news(""))


def loss_scores(base: RowLosses, adapter: RowLosses, *, resamples: int, seed: int) -> dict[str, Score]:
    """Nats per token of base and adapter and their difference, with intervals from rows drawn in pairs."""
    nats_tokens_R3 = np.asarray([[b, a, tokens] for (b, tokens), (a, _) in zip(base, adapter, strict=True)])
    drawn_S3 = resampled_sums(nats_tokens_R3, resamples=resamples, seed=seed)
    whole = nats_tokens_R3.sum(0)

    def score(values: np.ndarray, of_all: float) -> Score:
        low, high = interval(values)
        return Score(of_all, low, high)

    return {
        "base": score(drawn_S3[:, 0] / drawn_S3[:, 2], whole[0] / whole[2]),
        "adapter": score(drawn_S3[:, 1] / drawn_S3[:, 2], whole[1] / whole[2]),
        "difference": score((drawn_S3[:, 1] - drawn_S3[:, 0]) / drawn_S3[:, 2], (whole[1] - whole[0]) / whole[2]),
    }


def _losses(
    captioner: Captioner, captioning: Captioning, rows: Sequence[EvalRow], task: ForgettingTask
) -> dict[str, dict[str, Score]]:
    """Language, and ALL last -> the losses with the row's input, and under *_text_only those without it."""
    samples = [row.sample for row in rows]
    found: dict[str, dict[str, Score]] = {}
    if not samples:
        return found
    for suffix, asked in (("", samples), ("_text_only", [without_input(sample) for sample in samples])):
        with captioner.base() as base:
            before = row_losses(base, captioner.collator, asked, batch_size=captioning.batch_size)
        after = row_losses(captioner.model, captioner.collator, asked, batch_size=captioning.batch_size)
        for language in [*dict.fromkeys(sample.language for sample in samples), ALL]:
            of = [i for i, sample in enumerate(samples) if language in (ALL, sample.language)]
            scores = loss_scores(
                [before[i] for i in of], [after[i] for i in of], resamples=task.resamples, seed=task.seed
            )
            found.setdefault(language, {}).update({f"{name}{suffix}": score for name, score in scores.items()})
    return found


def _measurable(
    rows: Sequence[EvalRow], predictions: Sequence[Prediction], captioner: Captioner, task: ForgettingTask
) -> list[EvalRow]:
    """The rows that losses can be measured on: readable ones that fit; UserError when there is none."""
    failed = {prediction.row: prediction for prediction in predictions if prediction.error}
    readable = [row for row in rows if row.key not in failed]
    if not readable:
        first = next(iter(failed.values()))
        raise UserError(
            f"no row of {task.data}, {task.split} can be captioned; the first: {first.where}: {first.error}"
        )
    fits = {id(sample) for sample in fitting(captioner.collator, [row.sample for row in readable])}
    return [row for row in readable if id(row.sample) in fits]


def _scored(predictions: Sequence[Prediction], task: ForgettingTask) -> Scores:
    return score_captions(_captions(predictions), *_expected(predictions), **_settings(task))


def _captions(predictions: Sequence[Prediction]) -> list[str]:
    return [prediction.generated_caption for prediction in predictions]


def _expected(predictions: Sequence[Prediction]) -> tuple[list[tuple[str, ...]], list[str]]:
    """The references and the languages of the rows."""
    return [prediction.all_references for prediction in predictions], [prediction.lang for prediction in predictions]


def _settings(task: ForgettingTask) -> dict:
    return {"cjk_tokens": task.cjk_tokens, "resamples": task.resamples, "seed": task.seed}


def _named(on_progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(name.replace("_", " "), done, total)
