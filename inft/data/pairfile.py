"""Data sets of pairs: rows with two texts that say the same.

Columns: ``text`` and ``text_tgt`` (or ``anchor`` and ``positive``); if there are any, ``image``, ``image_tgt``,
``language``, ``language_tgt`` (that of the text where it is missing; else data.default_language) and ``id``. A text
becomes the answer of a row with the run's instruction in its language. Rows of one id are no negatives of each other;
without an id those of one image, and without an image those of one anchor text.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inft.data.columns import Columns
from inft.data.images import ImageError, TableImage, check_images, file_image
from inft.data.jsonl import read_lines
from inft.data.languages import known_code
from inft.data.locate import holds_tables
from inft.data.prompts import build_prompt, visible_line
from inft.data.rows import BadRow
from inft.sample import ImageRef, Pair, Sample
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig

if TYPE_CHECKING:
    from datasets import Dataset

# The names of our columns, of the anchor and of the positive.
TEXT = (("text", "anchor"), ("text_tgt", "positive"))
IMAGE = (("image",), ("image_tgt",))
LANGUAGE = (("language",), ("language_tgt",))
ID = ("id",)
SUFFIXES = {".jsonl": "jsonl", ".parquet": "tables"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecord:
    """One row before its values are looked at."""

    values: Mapping[str, Any]  # without images
    image_of: Callable[[str], ImageRef | None]  # column -> the image that the row has there
    where: str


def find_pairs(location: str) -> str:
    """Return how a location of pairs is read: "hub", "jsonl" or "tables"; no row is read.

    Errors: UserError for one that is no data set.
    """
    if location.startswith("hub:"):
        return "hub"
    path = Path(location).expanduser()
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        return SUFFIXES[path.suffix.lower()]
    if path.is_dir() and holds_tables(path):
        return "tables"
    raise UserError(
        f"--craft-pairs {location!r} is neither translations nor a data set of pairs. Give hub:OWNER/NAME, a file "
        f"({', '.join('*' + suffix for suffix in SUFFIXES)}) or a directory of parquet files or of a saved data set, "
        "with columns text and text_tgt."
    )


def read_pair_rows(location: str, config: MUNIChusLoadConfig, *, with_images: bool) -> tuple[list[Pair], list[BadRow]]:
    """Return the pairs of a data set and its rows that are none; every image is decoded once.

    Errors: UserError when it cannot be read or no row has the two texts' columns.
    """
    records = _json_records(location) if find_pairs(location) == "jsonl" else _table_records(location, config)
    pairs: list[Pair] = []
    bad: list[BadRow] = []
    seen: dict[str, None] = {}
    for record in records:
        if isinstance(record, PairRecord):
            seen.update(dict.fromkeys(record.values))
        pair = record if isinstance(record, BadRow) else _pair(record, config, with_images=with_images)
        if isinstance(pair, BadRow):
            bad.append(pair)
        else:
            pairs.append(pair)
    if seen:
        _require_columns(seen, location)
    return _checked(pairs, bad), bad


def row_id(*parts: str) -> int:
    """Return an id above 0 and below 2**63 that depends on the parts alone, in every process."""
    digest = hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).digest()
    return max(int.from_bytes(digest[:8], "big") >> 1, 1)


def _json_records(location: str) -> Iterator[PairRecord | BadRow]:
    file = Path(location).expanduser()

    def image_in(values: Mapping[str, Any]) -> Callable[[str], ImageRef | None]:
        return lambda name: None if values.get(name) is None else file_image(file.parent, values[name])

    for line in read_lines(file, Columns(MUNIChusLoadConfig(), source=str(file))):
        if isinstance(line, BadRow):
            yield line
        else:
            yield PairRecord(values=line.values, image_of=image_in(line.values), where=line.where)


def _table_records(location: str, config: MUNIChusLoadConfig) -> Iterator[PairRecord]:
    from inft.data.hub import cache_directories, hub_tables, local_tables, pick_split, undecoded

    path = Path(location).expanduser()
    roots: tuple[Path, ...] = (path if path.is_dir() else path.parent,)
    if location.startswith("hub:"):
        dataset_id, _, config_name = location.removeprefix("hub:").partition(":")
        tables, roots = hub_tables(dataset_id, config_name or None), cache_directories()
    else:
        tables = local_tables(path)
    table = pick_split(tables, config.split, source=location).with_format(None)
    names = [name for names in IMAGE for name in names if name in table.column_names]
    images = {name: undecoded(table, name).select_columns([name]) for name in names}
    for index, values in enumerate(table.remove_columns(names)):
        yield PairRecord(values=values, image_of=_images_at(images, index, roots), where=f"{location} row {index}")


def _images_at(
    images: "Mapping[str, Dataset]", index: int, roots: tuple[Path, ...]
) -> Callable[[str], ImageRef | None]:
    def image_of(name: str) -> ImageRef | None:
        if name not in images or images[name][index][name] is None:
            return None
        return TableImage(table=images[name], index=index, column=name, roots=roots)

    return image_of


def _require_columns(available: Mapping[str, None], location: str) -> None:
    for names in TEXT:
        if not any(name in available for name in names):
            raise UserError(
                f"--craft-pairs {location} has no column {' or '.join(names)}. It has {', '.join(available)}. "
                "A row of pairs has text and text_tgt (or anchor and positive); rename the columns."
            )


def _pair(record: PairRecord, config: MUNIChusLoadConfig, *, with_images: bool) -> Pair | BadRow:
    """The pair of one row, its images not yet read and its id 0 where it has none; a BadRow when it is no pair."""
    values = record.values
    languages = [_value(values, names) for names in LANGUAGE]
    languages[1] = languages[1] or languages[0]
    samples = []
    for side, language in enumerate(languages):
        name = next((name for name in TEXT[side] if name in values), None)
        text: Any = values[name] if name else None
        fault = _fault(name, text, language, config, where=TEXT[side])
        if fault is not None:
            return BadRow(where=record.where, reason=fault)
        code = known_code(config, language or config.default_language)
        meta = {"where": record.where, "title": "", "source": "pairs"}
        image = record.image_of(IMAGE[side][0]) if with_images else None
        prompt = build_prompt(config, language=code, title="", content="")
        samples.append(Sample(image=image, prompt=prompt, answer=visible_line(text), language=code, meta=meta))
    own = _value(values, ID)
    return Pair(anchor=samples[0], positive=samples[1], id=0 if own is None else row_id("id", str(own)))


def _value(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


def _fault(
    name: str | None, text: Any, language: Any, config: MUNIChusLoadConfig, *, where: tuple[str, ...]
) -> str | None:
    """Why one side of a row cannot be used; None when it can."""
    if name is None:
        return f"no column {' or '.join(where)}"
    if not isinstance(text, str):
        return f"its {name} is {type(text).__name__} {str(text)[:60]!r}, not text"
    if not visible_line(text):
        return f"its {name} is empty: write it or drop the row"
    if not isinstance(language, str | None):
        return f"its language is {type(language).__name__} {str(language)[:60]!r}, not text"
    code = known_code(config, language or config.default_language)
    if code not in config.language_names:
        return f"its language {code!r} has no name for the prompt: --set data.language_names.{code}=NAME adds one"
    return None


def _sides(pair: Pair) -> tuple[Sample, Sample]:
    return pair.anchor, pair.positive


def _checked(pairs: list[Pair], bad: list[BadRow]) -> list[Pair]:
    """The pairs whose images can be used, keyed by these and each with an id; the others are appended to ``bad``."""
    images = [sample.image for pair in pairs for sample in _sides(pair) if sample.image is not None]
    digests = check_images(images) if images else {}
    kept = []
    for pair in pairs:
        sides = [(sample, None if sample.image is None else digests[sample.image]) for sample in _sides(pair)]
        faults = [str(digest) for _, digest in sides if isinstance(digest, ImageError)]
        if faults:
            bad.append(BadRow(where=pair.anchor.meta["where"], reason=faults[0], language=pair.anchor.language))
            continue
        anchor, positive = (
            replace(sample, meta={**sample.meta, "picture": digest}) if digest else sample for sample, digest in sides
        )
        shown = ("picture", anchor.meta["picture"]) if anchor.image is not None else ("text", anchor.answer)
        kept.append(Pair(anchor=anchor, positive=positive, id=pair.id or row_id(*shown)))
    return kept
