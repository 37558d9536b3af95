"""The rows of a run: read and chosen by the first process, written beside the checkpoints, loaded by all alike.

``OUTPUT_DIR/data`` holds sft/, eval/ and pairs/ as data sets, and data.json with what they were made from. A run that
goes on reads them again and not their sources, so that it sees the same rows in the same order.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pair_files import Record, read_records
from pair_sources import PairOptions, read_source
from run_report import described, reasons_of, say
from stratified import Selected, TextPair, select

from params.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

DATA_FILE = "data.json"
VERSION = 1
FORMS = (("messages",), ("prompt", "completion"), ("text",))  # of an SFT row, as TRL reads them


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """What a run's rows are made from; equal plans over equal files give equal rows."""

    sft: str
    eval: str | None
    sources: Mapping[str, str | None]
    options: PairOptions
    max_pairs: int | None
    seed: int

    def as_json(self) -> dict[str, Any]:
        """The plan in the words of data.json."""
        plain: dict[str, Any] = json.loads(json.dumps({"version": VERSION, **asdict(self)}))
        return plain


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The rows of a run."""

    sft: "Dataset"
    eval: "Dataset | None"
    pairs: "Dataset | None"


def read_data(plan: DataPlan) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, Selected | None]:
    """Return SFT rows, evaluation rows and the pairs, from their sources."""
    sft = list(sft_rows(plan.sft))
    held_out = None if plan.eval is None else list(sft_rows(plan.eval))
    if not plan.sources:
        return sft, held_out, None
    rows = (row for name, location in plan.sources.items() for row in read_source(name, location, plan.options))
    pairs = select(rows, limit=plan.max_pairs, seed=plan.seed)
    empty = [name for name in plan.sources if not any(source == name for source, _ in pairs.kept)]
    if empty:
        reasons = [f"{name}: {reasons_of(pairs, name) or 'no rows'}" for name in empty]
        raise UserError(f"no pair is left of {'; '.join(reasons)}. Mend the source, or leave it out of --sources.")
    return sft, held_out, pairs


def sft_rows(location: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of an SFT data set with the columns that TRL reads, all of one form.

    Errors: UserError naming the row without them, with a text that is missing or empty, or with messages where the
    others have text.
    """
    form: tuple[str, ...] | None = None
    kind = ""
    for record in read_records(location):
        own = next((names for names in FORMS if all(record.values.get(name) is not None for name in names)), None)
        if own is None or (form is not None and own != form):
            wanted = " and ".join(form) if form else "messages, or prompt and completion, or text"
            raise UserError(
                f"{record.where}: an SFT row needs {wanted}, and this one has "
                f"{', '.join(name for name, value in record.values.items() if value is not None) or 'nothing'}. "
                "Rename the columns, or drop the row."
            )
        form = own
        row = {name: _checked(record, name) for name in form}
        kind = _same_kind(record, row, kind)
        yield row
    if form is None:
        raise UserError(f"{location} holds no row.")


def _checked(record: Record, name: str) -> Any:
    value = record.values[name]
    if isinstance(value, str) and name != "messages":
        if not value.strip():
            raise UserError(f"{record.where}: {name} is empty. Write it, or drop the row.")
        return value
    turns = value if name != "text" and isinstance(value, Sequence) and not isinstance(value, str) else None
    if not turns or not all(_is_message(turn) for turn in turns):
        wanted = {"text": "", "messages": "a list of messages"}.get(name, "text or a list of messages")
        raise UserError(
            f"{record.where}: {name} must be {f'{wanted}, each with role and content as text' if wanted else 'text'}. "
            "Mend the row, or drop it."
        )
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _is_message(turn: Any) -> bool:
    return isinstance(turn, Mapping) and all(isinstance(turn.get(name), str) for name in ("role", "content"))


def _same_kind(record: Record, row: Mapping[str, Any], others: str) -> str:
    """Whether a row is text or messages; UserError when it is both, or not what the ``others`` are."""
    kinds = {name: "text" if isinstance(value, str) else "messages" for name, value in row.items()}
    own = next(iter(kinds.values()))
    if len(set(kinds.values())) > 1:
        told = " and ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise UserError(f"{record.where}: {told}. Write both as text, or both as messages with role and content.")
    if others and own != others:
        names = " and ".join(row)
        raise UserError(
            f"{record.where}: {names} are {own}, and in the rows before {others}. Write all rows of a file alike."
        )
    return own


def write_data(plan: DataPlan, directory: Path) -> None:
    """Read the sources and write a run's rows, whole or not at all."""
    from inft.training.storage import staged

    sft, held_out, pairs = read_data(plan)
    say(described(sft, held_out, pairs))
    tables = {"sft": sft, "eval": held_out, "pairs": None if pairs is None else pair_columns(pairs.pairs)}
    with staged(
        directory, what="the rows of the run", remedy="Free space there, or choose another --output_dir."
    ) as new:
        for name, rows in tables.items():
            if rows is not None:
                _dataset(rows).save_to_disk(str(new / name))
        (new / DATA_FILE).write_text(json.dumps(plan.as_json(), indent=1, ensure_ascii=False), encoding="utf-8")


def _dataset(rows: list[dict[str, Any]]) -> "Dataset":
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    return Dataset.from_list(rows)


def pair_columns(pairs: Sequence[TextPair]) -> list[dict[str, Any]]:
    """Return the rows of pairs as craft reads them: text, text_tgt and, where all pairs have one, text_neg."""
    names = ["text", "text_tgt", *(["text_neg"] if all(pair.text_neg is not None for pair in pairs) else [])]
    return [{name: getattr(pair, name) for name in names} for pair in pairs]


def load_data(directory: Path) -> RunData:
    """Return a run's rows, memory-mapped."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()

    def table(name: str) -> Any:
        return Dataset.load_from_disk(str(directory / name)) if (directory / name).is_dir() else None

    return RunData(sft=table("sft"), eval=table("eval"), pairs=table("pairs"))


def refuse_other_plan(plan: DataPlan, directory: Path) -> None:
    """UserError when a run's rows, written before, were made from something else than ``plan``."""
    try:
        before = json.loads((directory / DATA_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} does not hold the rows of the run to go on with ({error}).") from error
    now = plan.as_json()
    changed = [f"{name}: {before.get(name)!r} -> {now[name]!r}" for name in now if before.get(name) != now[name]]
    if changed:
        raise UserError(
            "the data of the run to go on with was another:\n  "
            + "\n  ".join(changed)
            + "\nGive the same flags again, or start another run with another --output_dir."
        )
