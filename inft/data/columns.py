"""From a record with someone's column names to rows with ours; what does not fit becomes a BadRow with its reason."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from inft.data.images import BadImage
from inft.data.preferences import Unusable, read_answer, read_preference, read_prompt
from inft.data.rows import BadRow, Row, RowKind
from inft.sample import ImageRef
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig

# Our name -> the names it may have when data.columns does not say. `captions` holds a list: one row of each.
DEFAULT_NAMES: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "file_name", "images"),
    "title": ("title",),
    "content": ("content",),
    "caption": ("caption", "captions"),
    "language": ("language",),
    "prompt": ("prompt",),
    "chosen": ("chosen", "caption"),
    "rejected": ("rejected",),
}
# Which of our columns a kind of rows is made of, besides the image; those that no data set of it may lack.
_SHARED = ("title", "content", "language")
READ: Mapping[RowKind, tuple[str, ...]] = {
    "captions": (*_SHARED, "caption"),
    "references": (*_SHARED, "caption", "prompt"),
    "prompts": (*_SHARED, "caption", "prompt"),
    "preferences": (*_SHARED, "chosen", "rejected", "prompt"),
}
NEEDED: Mapping[RowKind, tuple[str, ...]] = {
    "captions": ("caption",),
    "references": ("caption",),
    "prompts": (),
    "preferences": ("chosen", "rejected"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line, table row or csv record before its columns are looked at."""

    values: Mapping[str, Any]
    image: ImageRef
    where: str


class Columns:
    """Which column of a data set holds what, for rows of a kind; ``source`` names the data set in messages."""

    def __init__(self, config: MUNIChusLoadConfig, *, source: str, kind: RowKind = "captions"):
        unknown = [ours for ours in config.columns if ours not in DEFAULT_NAMES]
        if unknown:
            raise UserError(
                f"data.columns names {', '.join(map(repr, unknown))}, which is none of our columns: "
                f"{', '.join(DEFAULT_NAMES)}. Write --set data.columns.caption=NAME for a caption column called NAME."
            )
        self.kind = kind
        self._source = source
        self._mapped: dict[str, str] = {str(ours): theirs for ours, theirs in config.columns.items()}
        self._names = {ours: self._names_of(ours) for ours in DEFAULT_NAMES}

    def _names_of(self, ours: str) -> tuple[str, ...]:
        if ours == "chosen" and "chosen" not in self._mapped:
            ours = "caption" if "caption" in self._mapped else "chosen"  # the chosen answer is a row's caption
        names = (self._mapped[ours],) if ours in self._mapped else DEFAULT_NAMES[ours]
        if ours == "caption" and self.kind == "references" and ours not in self._mapped:
            return (*names, self._mapped.get("chosen", "chosen"))  # where rows are preferences, the better answer
        return names

    def find(self, ours: str, available: Iterable[str]) -> str | None:
        """Return the column that holds our ``image``, ``title``, …, or None."""
        return next((name for name in self._names[ours] if name in available), None)

    def value(self, record: Mapping[str, Any], ours: str) -> Any:
        """Return the record's value of one of our columns, None when it has none."""
        name = self.find(ours, record)
        return None if name is None else record[name]

    def read_of(self, available: Iterable[str]) -> list[str]:
        """Return the columns among these that rows are made of, besides the image; each once, by name."""
        found = list(available)
        return sorted({name for ours in READ[self.kind] if (name := self.find(ours, found)) is not None})

    def require(self, available: Iterable[str]) -> None:
        """Raise UserError when no record has a column that such rows need, or one that data.columns names."""
        found = list(available)
        # What the columns of a run on preferences say besides is not asked of rows that answers are compared with.
        mapped = [ours for ours in self._mapped if self.kind != "references" or ours in ("image", *READ[self.kind])]
        missing = [ours for ours in (*NEEDED[self.kind], *mapped) if self.find(ours, found) is None]
        if missing:
            ours = missing[0]
            pairs = (
                "A preference, as --method dpo and --method orpo learn from, has a chosen answer and a rejected one. "
            )
            raise UserError(
                f"{self._source} has no column {' or '.join(map(repr, self._names[ours]))}. "
                f"Its columns are: {', '.join(found)}. {pairs * (ours in ('chosen', 'rejected'))}"
                f"Name the one that holds the {ours} with --set data.columns.{ours}=NAME."
            )

    def no_image(self, record: Mapping[str, Any]) -> BadImage:
        """The image of a record that has no image column."""
        names = " or ".join(map(repr, self._names["image"]))
        return BadImage(
            f"no column {names} among {', '.join(record)}: name the one that holds the image with "
            "--set data.columns.image=NAME"
        )


def read_records(
    config: MUNIChusLoadConfig,
    records: Iterable[Record | BadRow],
    *,
    columns: Columns,
    known: Iterable[str] | None = None,
    language: str | None = None,
) -> Iterator[Row | BadRow]:
    """Yield a row for each caption of each record.

    ``known`` are the columns of a table, whose records carry only some; without it they are learnt from the records.
    ``language`` is that of a one-language table.

    Errors: UserError when no record had a caption column, at the end; single records without one are BadRows.
    """
    if known is not None:
        columns.require(known)
    seen: dict[str, None] = {}
    for record in records:
        if isinstance(record, BadRow):
            yield record
            continue
        seen.update(dict.fromkeys(record.values))
        yield from _rows_of(config, record, columns, language)
    if seen and known is None:
        columns.require(seen)


def _rows_of(
    config: MUNIChusLoadConfig, record: Record, columns: Columns, language: str | None
) -> Iterator[Row | BadRow]:
    texts = {ours: columns.value(record.values, ours) for ours in ("title", "content", "language")}
    fault = next((_not_text(ours, value) for ours, value in texts.items() if not isinstance(value, str | None)), None)
    title, content, own_language = (value if isinstance(value, str) else "" for value in texts.values())
    language = language or own_language.strip() or config.default_language
    try:
        if fault is not None:
            raise Unusable(fault)
        answers = _preference(record, columns) if columns.kind == "preferences" else _captions(record, columns)
    except Unusable as error:
        answers = [str(error)]
    for number, answer in enumerate(answers, start=1):
        if isinstance(answer, str):
            yield BadRow(where=record.where, reason=answer, language=language, title=title)
            continue
        yield Row(
            image=record.image,
            title=title,
            content=content,
            caption=answer.caption,
            language=language,
            where=f"{record.where} caption {number}" if answer.one_of_several else record.where,
            prompt=answer.prompt,
            rejected=answer.rejected,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What one row of a record teaches."""

    caption: str
    prompt: str = ""
    rejected: str | None = None
    one_of_several: bool = False


def _captions(record: Record, columns: Columns) -> list[_Answer | str]:
    """The record's captions, each or the reason why it is none; Unusable when there are none to look for."""
    prompt = ""
    if "prompt" in READ[columns.kind] and columns.find("prompt", record.values) is not None:
        prompt = read_prompt(columns.value(record.values, "prompt"))
    if "caption" in NEEDED[columns.kind] and columns.find("caption", record.values) is None:
        raise Unusable(f"no caption column among {', '.join(record.values)}")
    column = columns.find("caption", record.values)
    captions = None if column is None else record.values[column]
    if column is not None and column not in DEFAULT_NAMES["caption"] and _is_conversation(captions):
        asked, captions = read_answer(captions, "chosen")
        prompt = prompt or asked
    several = isinstance(captions, list | tuple)
    return [
        _Answer(caption=caption or "", prompt=prompt, one_of_several=several)
        if isinstance(caption, str | None)
        else _not_text("caption", caption)
        for caption in (captions if several and captions else [captions or ""])
    ]


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(turn, Mapping) for turn in value)


def _preference(record: Record, columns: Columns) -> list[_Answer | str]:
    """The record's pair of answers."""
    for ours in NEEDED[columns.kind]:
        if columns.find(ours, record.values) is None:
            raise Unusable(f"no {ours} column among {', '.join(record.values)}")
    present = ("prompt", "chosen", "rejected")
    found = {ours: columns.value(record.values, ours) for ours in present if columns.find(ours, record.values)}
    pair = read_preference(found)
    return [_Answer(caption=pair.chosen, prompt=pair.prompt, rejected=pair.rejected)]


def _not_text(ours: str, value: Any) -> str:
    return f"its {ours} is {type(value).__name__} {str(value)[:60]!r}, not text"
