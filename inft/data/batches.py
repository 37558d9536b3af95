"""load_samples: from a source to checked samples, split into rows to train on and rows held out."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from inft.data.heldout import article_key, hold_out
from inft.data.images import ImageError, check_images
from inft.data.languages import any_language_will_do, available_languages
from inft.data.locate import find_source
from inft.data.pool import Entry, Pool, collect, drop_images, own_validation, spread_entries, take_images
from inft.data.quarantine import first_reasons, refuse_foreign, refuse_too_many, write_quarantine
from inft.data.rows import BadRow, MissingSplit, Row, RowKind
from inft.sample import ImageRef, Sample
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig

__all__ = ["BadRow", "Loaded", "MissingSplit", "Row", "load_samples", "write_quarantine"]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The samples of a run and what was left out."""

    train: list[Sample]
    heldout: list[Sample]
    source: str  # name in SOURCES
    fingerprint: str  # sha256 over the rows
    rows_per_language: dict[str, tuple[int, int]]  # language -> rows to train on, rows held out
    other_languages: dict[str, int]  # language that was not asked for -> rows that were read and left out
    dropped_empty: int
    bad: tuple[BadRow, ...]  # left out with their reasons; write_quarantine lists them in a file

    @property
    def quarantined(self) -> int:
        """How many rows are bad."""
        return len(self.bad)

    @property
    def quarantine_reasons(self) -> str:
        """Why the first bad rows are bad, one a line."""
        return first_reasons(self.bad)


def load_samples(
    config: MUNIChusLoadConfig,
    *,
    quarantine_file: Path | None,
    with_images: bool,
    on_progress: Callable[[int], None] | None = None,
    kind: RowKind = "captions",
) -> Loaded:
    """Read, filter, cap, check and split the rows of a run; ``kind`` says what is read of each (see RowKind).

    Every image is decoded once before training; ``on_progress`` hears how many are done. Without images (text models)
    they are neither read nor needed. The held-out rows are the source's validation split where it has one, else a
    share of the articles; none with ``eval_fraction`` 0. Nothing is written but, when bad rows stop the run, their list
    to ``quarantine_file``; those of a run that goes on are ``Loaded.bad``, for write_quarantine.

    Errors: UserError for an unknown source or language, for more bad rows than ``max_bad_fraction`` (the quarantine
    file names them), for a quarantine file that is not ours to replace and when no row is left.
    """
    source, location = find_source(config)
    train = collect(config, source=source, location=location, split=config.split, kind=kind)
    if train.found:
        available_languages(config, train.found, source=location or source)
    own = own_validation(config, train, source=source, location=location, kind=kind)
    pools = [train] if own is None else [train, own]
    _check_images(pools, with_images=with_images, on_progress=on_progress)

    bad = tuple(row for pool in pools for row in pool.bad)
    if bad and quarantine_file is not None:
        refuse_foreign(quarantine_file)  # now, not when all is loaded and the run begins
    refuse_too_many(
        bad,
        estimate=sum(pool.bad_estimate for pool in pools),
        read=sum(pool.read for pool in pools),
        config=config,
        file=quarantine_file,
    )
    _refuse_nothing(train, name=location or source)

    trained, heldout = _split(config, train, own)
    _refuse_untrained_languages(config, train, trained, name=location or source)
    return Loaded(
        train=[_keyed(entry) for entry in trained],
        heldout=[_keyed(entry) for entry in heldout],
        source=source,
        fingerprint=_fingerprint(trained, heldout),
        rows_per_language=_per_language(config, trained, heldout),
        other_languages=_other_languages(config, pools),
        dropped_empty=sum(pool.empty.total() for pool in pools),
        bad=bad,
    )


def held_out_entries(
    config: MUNIChusLoadConfig, *, with_images: bool, kind: RowKind = "captions"
) -> tuple[list[Entry], int, tuple[BadRow, ...]]:
    """Return what load_samples holds out of a run's data, with the rows whose images cannot be read any more.

    Those are split by their titles alone. Besides: how many rows are without a caption, and the lines that are no rows.
    """
    source, location = find_source(config)
    train = collect(config, source=source, location=location, split=config.split, kind=kind)
    own = own_validation(config, train, source=source, location=location, kind=kind)
    pools = [train] if own is None else [train, own]
    if with_images and own is None:
        digests = check_images(entry.sample.image for entry in train.entries if entry.sample.image is not None)
        train.entries = [replace(entry, image_key=_digest(digests, entry)) for entry in train.entries]
    elif not with_images:
        for pool in pools:
            drop_images(pool)
    bad = tuple(row for pool in pools for row in pool.bad)
    return _split(config, train, own)[1], sum(pool.empty.total() for pool in pools), bad


def _digest(digests: Mapping[ImageRef, str | ImageError], entry: Entry) -> str:
    found = digests.get(entry.sample.image) if entry.sample.image is not None else None
    return found if isinstance(found, str) else ""


def _check_images(pools: Iterable[Pool], *, with_images: bool, on_progress: Callable[[int], None] | None) -> None:
    if not with_images:
        for pool in pools:
            drop_images(pool)
        return
    images = (entry.sample.image for pool in pools for entry in pool.entries)
    digests = check_images((image for image in images if image is not None), on_progress=on_progress)
    for pool in pools:
        take_images(pool, digests)


def _refuse_nothing(pool: Pool, *, name: str) -> None:
    if not pool.entries:
        raise UserError(
            f"no rows left of {name}: {pool.found.total()} read, {pool.empty.total()} without a caption, "
            f"{len(pool.bad)} bad.\n{first_reasons(pool.bad)}".rstrip()
        )


def _refuse_untrained_languages(config: MUNIChusLoadConfig, pool: Pool, trained: Sequence[Entry], *, name: str) -> None:
    """Raise UserError when the filters or the held-out split left nothing of a language that was asked for."""
    left = {entry.sample.language for entry in trained}
    for language in () if any_language_will_do(config) else config.languages:
        if language not in left:
            bad = sum(row.language == language for row in pool.bad)
            raise UserError(
                f"no row in language {language!r} is left to train on: of {pool.found[language]} in {name}, "
                f"{pool.empty[language]} are without a caption, {bad} are bad and the rest is held out. "
                "Leave the language out of --languages or hold out less with --eval-fraction."
            )


def _split(config: MUNIChusLoadConfig, train: Pool, own: Pool | None) -> tuple[list[Entry], list[Entry]]:
    if own is not None and own.entries:  # a validation split without a row in these languages is none
        return train.entries, own.entries
    held = hold_out([_leak_key(entry) for entry in train.entries], fraction=config.eval_fraction, seed=config.seed)
    pairs = list(zip(train.entries, held, strict=True))
    heldout = [entry for entry, out in pairs if out]
    return [entry for entry, out in pairs if not out], spread_entries(heldout, config.max_eval_rows)


def _keyed(entry: Entry) -> Sample:
    """The entry's sample with the key of its picture, where that is known, as ``meta["picture"]``."""
    if not entry.image_key:
        return entry.sample
    return replace(entry.sample, meta={**entry.sample.meta, "picture": entry.image_key})


def _leak_key(entry: Entry) -> tuple[str, str]:
    """What a row shares with others of its article: title and image, and without an image its own prompt.

    The prompt counts with its news, which tells apart what one instruction asks. With none of these it is the answer.
    """
    title, sample = entry.sample.meta["title"], entry.sample
    asked = article_key(sample.prompt.text) if entry.prompt_key and sample.image is None else ""
    shared = (title, entry.image_key or asked)
    return shared if any(shared) else (sample.answer, "")


def _fingerprint(trained: Sequence[Entry], heldout: Sequence[Entry]) -> str:
    digest = hashlib.sha256()
    for split, entries in (("train", trained), ("heldout", heldout)):
        for entry in entries:
            sample = entry.sample
            picture = entry.image_key if sample.image is not None else ""
            row = [split, sample.meta["where"], sample.language, sample.meta["title"], sample.answer]
            worse = [] if sample.rejected is None else [sample.rejected]
            digest.update(json.dumps([*row, sample.prompt.text, picture, *worse]).encode())
    return digest.hexdigest()


def _other_languages(config: MUNIChusLoadConfig, pools: Iterable[Pool]) -> dict[str, int]:
    found = sum((pool.found for pool in pools), Counter[str]())
    return {language: count for language, count in found.most_common() if language not in config.languages}


def _per_language(
    config: MUNIChusLoadConfig, trained: Sequence[Entry], heldout: Sequence[Entry]
) -> dict[str, tuple[int, int]]:
    counts = [Counter(entry.sample.language for entry in entries) for entries in (trained, heldout)]
    return {code: (counts[0][code], counts[1][code]) for code in config.languages if any(c[code] for c in counts)}
