"""The files of an evaluation directory: what they hold, written once for those who write and those who read them.

evaluation.json     what was evaluated on what, and how (Evaluation)
predictions.jsonl   one line a row, in the order in which they were generated (Prediction)
scores.json         metrics per language with intervals; scores.csv and scores.tex say the same
gallery/            small copies of the first images, named by predictions that show them
forgetting.json     with --forgetting: what base and adapter score on tasks that the base could do (Forgetting)
drift.json          with --drift: how far the adapter moved the hidden states, layer by layer (Drift)
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inft.evaluation.metrics import Score, Scores
from params.errors import UserError

SCHEMA_VERSION = 1

EVALUATION_FILE = "evaluation.json"
PREDICTIONS_FILE = "predictions.jsonl"
SCORES_FILE = "scores.json"
FORGETTING_FILE = "forgetting.json"
DRIFT_FILE = "drift.json"
GALLERY_DIR = "gallery"
FORGETTING_DIR = "forgetting"  # the captions behind forgetting.json


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was evaluated, on what and how; the same settings give the same captions."""

    model: str  # family: llama32, aya, text
    base_model: str  # hub id or path; "" for the embedded model
    adapter: str | None  # directory; None: the base model alone
    adapter_sha256: str | None  # of its weights: tells which run it belongs to, wherever it lies
    step: int | None  # optimizer step of the adapter's weights
    task: str | None  # of the run that made it
    setting: str  # "zero-shot", "random 3-shot", "similar 3-shot"
    data: str  # as --data says it
    split: str
    fingerprint: str  # sha256 over the rows: equal for evaluations that can be compared row by row
    languages: tuple[str, ...]  # codes that have rows
    language_names: Mapping[str, str]
    rows: int
    without_reference: int  # rows left out because nothing is there to compare with
    generation: Mapping[str, Any]  # max_new_tokens, in_4bit, dtype, seed, …
    limit: int | None = None  # rows at most, as --limit said it


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One row: what was generated, what was expected."""

    row: str  # key of the row, equal in every evaluation of the same data
    lang: str
    generated_caption: str  # "" for a row that could not be read: it counts as wrong
    reference_caption: str
    title: str
    where: str = ""  # "test.jsonl line 17"
    references: tuple[str, ...] = ()  # all of them, where a row has several
    image: str | None = None  # file in the evaluation directory, of the rows that a gallery shows
    error: str | None = None  # why the row could not be captioned
    shots: int | None = None  # examples before its prompt, of a few-shot evaluation
    seconds: float | None = None  # of the batch that it was in, per row

    @property
    def all_references(self) -> tuple[str, ...]:
        """Every reference of the row, at least one."""
        return self.references or (self.reference_caption,)


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """Base and adapter on the same rows; differences are adapter minus base, with paired 95 % intervals."""

    data: str
    split: str
    rows: int
    fingerprint: str  # sha256 over the rows
    loss_rows: int  # rows that losses were measured on: those that could be read and fit into max_length
    language_names: Mapping[str, str]
    could_do: tuple[str, ...]  # languages in which the base's captions follow the image: above its shuffled control
    base: Scores
    adapter: Scores
    difference: Scores
    base_shuffled: Scores  # captions of other rows' images: what a caption scores that ignores the image
    adapter_shuffled: Scores
    loss: Mapping[str, Mapping[str, Score]]  # language -> base, adapter, difference, *_text_only: nats per token


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How alike base and adapter represent the same rows: 1 is unchanged."""

    data: str
    split: str
    rows: int
    fingerprint: str  # sha256 over the rows
    layers: tuple[int, ...]  # 0: the embeddings
    cka: tuple[float, ...]  # debiased linear CKA of the rows' mean hidden states
    cosine: tuple[float, ...]  # mean cosine over token positions


@dataclass(frozen=True, kw_only=True)
class Stored:
    """All that lies in an evaluation directory."""

    directory: Path
    evaluation: Evaluation
    predictions: Sequence[Prediction]
    scores: Scores  # empty while the evaluation is unfinished
    forgetting: Forgetting | None = None
    drift: Drift | None = None

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.directory.name

    def predictions_of(self, keys: Iterable[str]) -> list[Prediction]:
        """The predictions of rows with these keys, in their order."""
        by_key = {prediction.row: prediction for prediction in self.predictions}
        return [by_key[key] for key in keys]


def to_json(record: Any) -> str:
    """A record as JSON text with a line break at its end."""
    values = {"schema": SCHEMA_VERSION, **asdict(record)}
    return json.dumps(_jsonable(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _jsonable(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, (list, tuple)) else value


def scores_to_json(scores: Scores) -> str:
    """Metrics per language as JSON text."""
    plain = {language: {name: asdict(score) for name, score in of.items()} for language, of in scores.items()}
    return json.dumps({"schema": SCHEMA_VERSION, "scores": plain}, indent=2, ensure_ascii=False) + "\n"


def scores_from(plain: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Scores:
    """Metrics per language from parsed JSON."""
    return {language: {name: Score(**score) for name, score in of.items()} for language, of in plain.items()}


def is_evaluation(directory: Path) -> bool:
    """Whether a directory holds an evaluation."""
    return (directory / EVALUATION_FILE).is_file()


def read_evaluation(directory: Path) -> Evaluation:
    """What evaluation.json says; UserError when it is damaged."""
    values = _object(directory / EVALUATION_FILE)
    try:
        return Evaluation(**{**values, "languages": tuple(values.get("languages", ()))})
    except TypeError as error:
        raise UserError(f"{directory / EVALUATION_FILE} is no record of an evaluation: {error}.") from error


def read_predictions(directory: Path, *, name: str = PREDICTIONS_FILE) -> list[Prediction]:
    """The rows that are done; the half line that a killed evaluation left is passed over."""
    path = directory / name
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            values = json.loads(line)
            found.append(Prediction(**{**values, "references": tuple(values.get("references", ()))}))
        except (ValueError, TypeError, AttributeError):
            continue
    return found


def read_stored(directory: Path) -> Stored:
    """Everything in an evaluation directory; UserError for a directory that is none and for damaged files."""
    if not is_evaluation(directory):
        raise UserError(f"{directory} holds no {EVALUATION_FILE}: name a directory that `inft evaluate` wrote.")
    return Stored(
        directory=directory,
        evaluation=read_evaluation(directory),
        predictions=read_predictions(directory),
        scores=_scores(directory / SCORES_FILE),
        forgetting=_forgetting(directory / FORGETTING_FILE),
        drift=_drift(directory / DRIFT_FILE),
    )


def _scores(path: Path) -> Scores:
    if not path.is_file():
        return {}
    with _damage_told(path):
        return scores_from(_object(path)["scores"])


def _forgetting(path: Path) -> Forgetting | None:
    if not path.is_file():
        return None
    values = _object(path)
    with _damage_told(path):
        for name in ("base", "adapter", "difference", "base_shuffled", "adapter_shuffled", "loss"):
            values[name] = scores_from(values[name])
        return Forgetting(**{**values, "could_do": tuple(values["could_do"])})


def _drift(path: Path) -> Drift | None:
    if not path.is_file():
        return None
    values = _object(path)
    with _damage_told(path):
        figures = {
            name: tuple(math.nan if value is None else value for value in values[name]) for name in ("cka", "cosine")
        }
        return Drift(**{**values, **figures, "layers": tuple(values["layers"])})


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Turn what a record's missing or malformed fields raise into a UserError that names the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): evaluate again with --overwrite.") from error


def _object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): evaluate again with --overwrite.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is no JSON object: evaluate again with --overwrite.")
    values.pop("schema", None)
    return values
