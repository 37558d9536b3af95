"""Where pairs come from: one reader for each source, from the hub or from a local file with the same columns.

Columns of the releases:
  all-nli            sentence-transformers/all-nli: anchor, positive[, negative]; premise, hypothesis, label (0 is
                     entailment, 1 neutral, 2 contradiction); sentence1, sentence2, score (1 is entailment)
  quora-duplicates   sentence-transformers/quora-duplicates: anchor, positive[, negative]; sentence1, sentence2, label
                     (1 is duplicate); Quora's own file: question1, question2, is_duplicate
  natural-questions  sentence-transformers/natural-questions: query, answer
  flores, nllb       see parallel_text.py
  any other name     text, text_tgt[, text_neg]; anchor, positive[, negative]; and if there are any, language and
                     language_tgt
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pair_files import Record, hub_records, read_records
from parallel_text import read_flores, read_nllb
from stratified import LeftOut, TextPair

from craft.fields import did_you_mean
from params.errors import UserError

ENGLISH = "eng_Latn"
PARALLEL = ("flores", "nllb")


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """What the readers are told besides their location."""

    language_pairs: Sequence[tuple[str, str]] = ()
    flores_split: str = "dev"
    nllb_min_laser_score: float = 1.25
    nllb_max_rows: int | None = None  # lines read of each NLLB file
    hard_negatives: bool = False


@dataclass(frozen=True, kw_only=True)
class Form:
    """Columns that a source may have, and how its labels are read."""

    text: str
    positive: str
    negative: str | None = None
    label: str | None = None
    meanings: Mapping[Any, str] | None = None  # value of the label -> "", "negative", or why the row gives no pair

    @property
    def columns(self) -> list[str]:
        """Every column of the form."""
        return [name for name in (self.text, self.positive, self.negative, self.label) if name]


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A source of one language whose rows are pairs, triplets or labelled pairs."""

    hub: str | None
    config: str | None
    triplets: str | None  # the configuration with negatives
    language: str
    forms: Sequence[Form]


NEUTRAL, CONTRADICTION, UNLABELLED = "neutral", "contradiction", "not labelled"
_NLI = {0: "", 1: NEUTRAL, 2: CONTRADICTION, -1: UNLABELLED}
_NLI_WORDS = {"entailment": "", "neutral": NEUTRAL, "contradiction": CONTRADICTION}
_DUPLICATES = {1: "", 0: "no duplicate"}
_NEGATIVE = (CONTRADICTION, "no duplicate")  # what says of a text that it means something else

_TRIPLET = Form(text="anchor", positive="positive", negative="negative")
_PAIR = Form(text="anchor", positive="positive")

LABELLED: Mapping[str, Labelled] = {
    "all-nli": Labelled(
        hub="sentence-transformers/all-nli",
        config="pair",
        triplets="triplet",
        language=ENGLISH,
        forms=(
            _TRIPLET,
            _PAIR,
            Form(text="premise", positive="hypothesis", label="label", meanings=_NLI | _NLI_WORDS),
            Form(
                text="sentence1",
                positive="sentence2",
                label="score",
                meanings={1.0: "", 0.5: NEUTRAL, 0.0: CONTRADICTION},
            ),
        ),
    ),
    "quora-duplicates": Labelled(
        hub="sentence-transformers/quora-duplicates",
        config="pair",
        triplets="triplet",
        language=ENGLISH,
        forms=(
            _TRIPLET,
            _PAIR,
            Form(text="sentence1", positive="sentence2", label="label", meanings=_DUPLICATES),
            Form(text="question1", positive="question2", label="is_duplicate", meanings=_DUPLICATES),
        ),
    ),
    "natural-questions": Labelled(
        hub="sentence-transformers/natural-questions",
        config="pair",
        triplets=None,
        language=ENGLISH,
        forms=(Form(text="query", positive="answer"),),
    ),
}
LOCAL = Labelled(
    hub=None,
    config=None,
    triplets=None,
    language="",
    forms=(
        Form(text="text", positive="text_tgt", negative="text_neg"),
        Form(text="text", positive="text_tgt"),
        _TRIPLET,
        _PAIR,
    ),
)
SOURCES = (*PARALLEL, *LABELLED)


def parse_sources(given: Sequence[str]) -> dict[str, str | None]:
    """Return source -> location from words such as ``flores`` and ``nllb=bitext/``; None: the release on the hub.

    Errors: UserError for a name that is no known source and has no location, and for one that is given twice.
    """
    found: dict[str, str | None] = {}
    for word in given:
        name, _, location = word.partition("=")
        if name not in SOURCES and not location:
            raise UserError(
                f"--sources {word}: there is no source {name!r}{did_you_mean(name, SOURCES) or '.'} Known sources: "
                f"{', '.join(SOURCES)}. A file of your own pairs is given as {name or 'NAME'}=PATH."
            )
        if not name or name in found:
            raise UserError(f"--sources {word}: give each source once, as NAME or NAME=PATH (or NAME=hub:OWNER/NAME).")
        found[name] = location or None
    return found


def read_source(name: str, location: str | None, options: PairOptions) -> Iterator[TextPair | LeftOut]:
    """Yield the pairs of a source, and what it left out, in the order of its rows."""
    if name == "flores":
        return read_flores(location, pairs=options.language_pairs, split=options.flores_split)
    if name == "nllb":
        return read_nllb(
            location,
            pairs=options.language_pairs,
            min_score=options.nllb_min_laser_score,
            max_rows=options.nllb_max_rows,
        )
    own = LABELLED.get(name, LOCAL)
    if location is not None:
        records = read_records(location)
    else:
        assert own.hub is not None  # parse_sources wants a location of any other
        config = own.triplets if options.hard_negatives and own.triplets else own.config
        records = hub_records(own.hub, config, split="train")
    reader = _LabelledReader(name, own, hard_negatives=options.hard_negatives)
    return reader.pairs(records)


class _LabelledReader:
    """Reads one source of pairs, triplets or labelled pairs."""

    def __init__(self, name: str, source: Labelled, *, hard_negatives: bool) -> None:
        self.name, self.source, self.hard_negatives = name, source, hard_negatives
        self.negatives: dict[str, str] = {}  # text -> a text that is labelled as meaning something else
        self._forms: dict[tuple[str, ...], Form] = {}

    def pairs(self, records: Iterable[Record]) -> Iterator[TextPair | LeftOut]:
        """Yield pairs; with hard negatives of labelled rows only after all of them were read."""
        waiting: list[TextPair] = []
        for record in records:
            row = self._read(record)
            if isinstance(row, TextPair) and self.hard_negatives and row.text_neg is None:
                waiting.append(row)
            else:
                yield row
        for pair in waiting:
            negative = self.negatives.get(pair.text)
            if negative is None or negative == pair.text_tgt:
                yield LeftOut(source=self.name, language=pair.language, reason="no hard negative")
            else:
                yield _with(pair, negative)

    def _read(self, record: Record) -> TextPair | LeftOut:
        form = self._form(record)
        text, positive = (text_in(record, name) for name in (form.text, form.positive))
        language = self._language(record)
        meaning = "" if form.label is None else self._meaning(record, form)
        if meaning:
            if self.hard_negatives and meaning in _NEGATIVE and positive.strip():
                self.negatives.setdefault(text, positive)
            return LeftOut(source=self.name, language=language, reason=meaning)
        negative = text_in(record, form.negative) if form.negative and self.hard_negatives else None
        if negative is not None and (not negative.strip() or negative == positive):
            return LeftOut(source=self.name, language=language, reason="no hard negative")
        return TextPair(source=self.name, language=language, text=text, text_tgt=positive, text_neg=negative)

    def _form(self, record: Record) -> Form:
        columns = tuple(record.values)
        if columns not in self._forms:
            forms = self.source.forms
            form = next((form for form in forms if all(name in columns for name in form.columns)), None)
            if form is None:
                wanted = "; ".join(dict.fromkeys(", ".join(form.columns) for form in forms))
                raise UserError(
                    f"{record.where}: {self.name} has the columns {', '.join(columns) or '(none)'}, which give no "
                    f"pairs. A row needs one of these sets: {wanted}. Rename the columns."
                )
            self._forms[columns] = form
        return self._forms[columns]

    def _language(self, record: Record) -> str:
        names = ("language", "language_tgt") if self.source is LOCAL else ()
        found = [text_in(record, name) for name in names if record.values.get(name)]
        return "-".join(dict.fromkeys(found)) or self.source.language

    def _meaning(self, record: Record, form: Form) -> str:
        value, meanings = record.values[str(form.label)], form.meanings or {}
        known = value if not isinstance(value, str) or value in meanings else _number(value)
        if known not in meanings:
            words = ", ".join(f"{number} ({why or 'kept'})" for number, why in meanings.items())
            raise UserError(f"{record.where}: {form.label} is {value!r}; {self.name} knows {words}. Mend the row.")
        return meanings[known]


def _number(text: str) -> float | None:
    """The number that a CSV file writes; None for what is no number."""
    try:
        return float(text)
    except ValueError:
        return None


def _with(pair: TextPair, negative: str) -> TextPair:
    return TextPair(
        source=pair.source, language=pair.language, text=pair.text, text_tgt=pair.text_tgt, text_neg=negative
    )


def text_in(record: Record, name: str) -> str:
    """The text of a column, "" for a missing value; UserError for anything else than text."""
    value = record.values[name]
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{record.where}: {name} is {type(value).__name__} {str(value)[:60]!r}, not text. Mend the row, or drop it."
        )
    return value or ""
