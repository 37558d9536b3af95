"""The rows of one split on their way to samples: language filter, empty rows, caps and the check of their images."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from inft.data import load_source
from inft.data.heldout import spread, unit_hash
from inft.data.images import FileImage, ImageError
from inft.data.languages import known_code
from inft.data.locate import split_names
from inft.data.prompts import build_prompt, visible_line
from inft.data.rows import BadRow, MissingSplit, Row, RowKind
from inft.sample import ImageRef, Sample
from params.munichus import MUNIChusLoadConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A sample with its place in the source, its seeded rank for caps and the key of its image."""

    order: int
    rank: float  # in [0, 1): of the seed and the row's text alone
    sample: Sample
    image_key: str = ""  # equal for equal pictures; "": unknown
    prompt_key: str = ""  # the row's own prompt; "": it has none


@dataclass(kw_only=True, slots=True)
class Pool:
    """The rows of one split that passed the filters, and the count of those that did not."""

    entries: list[Entry] = field(default_factory=list)  # of each language at most the cap, in the source's order
    bad: list[BadRow] = field(default_factory=list)
    found: Counter[str] = field(default_factory=Counter)  # language -> rows in the data, requested or not
    usable: Counter[str] = field(default_factory=Counter)  # language -> requested rows with a caption, before the cap
    empty: Counter[str] = field(default_factory=Counter)  # language -> rows dropped for want of a caption
    unread: int = 0  # bad rows that never became an entry
    bad_estimate: float = 0.0  # bad rows among all that were read, when the capped ones stand for the rest

    @property
    def read(self) -> int:
        """Rows in the requested languages that are not empty, good or bad."""
        return self.usable.total() + self.unread


def collect(config: MUNIChusLoadConfig, *, source: str, location: str, split: str, kind: RowKind = "captions") -> Pool:
    """Read one split; of each language the rows of the lowest ranks are kept, so that a cap bounds memory too."""
    pool = Pool()
    heaps: defaultdict[str, list[tuple[float, int, Entry]]] = defaultdict(list)
    cap = config.max_rows_per_lang
    for order, row in enumerate(load_source(source)(config, location=location, split=split, kind=kind)):
        row = replace(row, language=known_code(config, row.language))
        if row.language:
            pool.found[row.language] += 1
        if row.language and row.language not in config.languages:
            continue
        # A heap's first item is its smallest: the signs make that the row of the highest rank, the next to go.
        heap = heaps[row.language]
        full = cap is not None and len(heap) >= cap
        worst = -heap[0][0] if full else 1.0
        entry = _admit(config, pool, row, order=order, source=source, worst=worst, kind=kind)
        if entry is not None:
            (heapq.heappushpop if full else heapq.heappush)(heap, (-entry.rank, -order, entry))
    pool.entries = sorted((item[2] for heap in heaps.values() for item in heap), key=lambda entry: entry.order)
    return pool


def _admit(
    config: MUNIChusLoadConfig,
    pool: Pool,
    row: Row | BadRow,
    *,
    order: int,
    source: str,
    worst: float,
    kind: RowKind,
) -> Entry | None:
    """Return the row as an entry; None for a bad one, an empty one and one ranked behind ``worst``.

    The pool's counts and lists grow.
    """
    title = visible_line(row.title)
    if isinstance(row, Row):
        caption = visible_line(row.caption) if row.rejected is None else row.caption
        without = not caption and kind != "prompts"
        if without and config.remove_empty:
            pool.empty[row.language] += 1
            return None
        if without:
            reason = "its caption is empty (--set data.remove_empty=true drops such rows)"
            row = BadRow(where=row.where, reason=reason, language=row.language)
    if isinstance(row, BadRow):
        pool.bad.append(replace(row, title=title))
        pool.unread += 1
        return None
    pool.usable[row.language] += 1
    told_apart = [row.prompt, row.rejected or ""] if row.prompt or row.rejected else []
    rank = unit_hash(config.seed, "cap", row.language, title, caption, *told_apart)
    if rank > worst:
        return None
    sample = Sample(
        image=row.image,
        prompt=build_prompt(config, language=row.language, title=row.title, content=row.content, own=row.prompt),
        answer=caption,
        language=row.language,
        rejected=row.rejected,
        meta={"title": title, "where": row.where, "source": source, **row.extra},
    )
    return Entry(order=order, rank=rank, sample=sample, prompt_key=row.prompt)


def own_validation(
    config: MUNIChusLoadConfig, train: Pool, *, source: str, location: str, kind: RowKind = "captions"
) -> Pool | None:
    """Read the source's validation split, capped to the share of each language that the training cap keeps.

    Returns None when the source has none, when it is what is trained on and with ``eval_fraction`` 0.
    """
    if config.eval_fraction == 0 or config.split in split_names("validation"):
        return None
    try:
        pool = collect(config, source=source, location=location, split="validation", kind=kind)
    except MissingSplit:
        return None
    if config.max_rows_per_lang is not None:
        kept: list[Entry] = []
        for language, total in pool.usable.items():
            share = min(1.0, config.max_rows_per_lang / max(1, train.usable[language]))
            rows = [entry for entry in pool.entries if entry.sample.language == language]
            kept += sorted(rows, key=lambda entry: entry.rank)[: max(1, round(share * total))]
        pool.entries = sorted(kept, key=lambda entry: entry.order)
    pool.entries = spread_entries(pool.entries, config.max_eval_rows)
    return pool


def spread_entries(entries: Sequence[Entry], limit: int | None) -> list[Entry]:
    """Return at most ``limit`` entries, as even over the languages as they allow."""
    chosen = spread([entry.sample.language for entry in entries], [entry.rank for entry in entries], limit)
    return [entries[index] for index in chosen]


def take_images(pool: Pool, digests: Mapping[ImageRef, str | ImageError]) -> None:
    """Key each entry by its image's digest; those whose image cannot be used become bad rows."""
    checked, pool.entries = pool.entries, []
    for entry in checked:
        sample = entry.sample
        digest = ImageError("it has no image") if sample.image is None else digests[sample.image]
        if isinstance(digest, str):
            pool.entries.append(replace(entry, image_key=digest))
            continue
        where, title = sample.meta["where"], sample.meta["title"]
        pool.bad.append(BadRow(where=where, reason=str(digest), language=sample.language, title=title))
    unusable = len(checked) - len(pool.entries)
    pool.bad_estimate = pool.unread + (unusable * pool.usable.total() / len(checked) if checked else 0)


def drop_images(pool: Pool) -> None:
    """Make each entry text only; a file's path still keys it, so that the captions of one image stay together."""
    pool.entries = [
        replace(
            entry,
            sample=replace(entry.sample, image=None),
            image_key=str(entry.sample.image.path) if isinstance(entry.sample.image, FileImage) else "",
        )
        for entry in pool.entries
    ]
    pool.bad_estimate = pool.unread
