"""Positive pairs for the contrastive loss: captions of one picture in two languages, or the rows of a data set."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from inft.data.pairfile import find_pairs, read_pair_rows, row_id
from inft.data.quarantine import first_reasons, refuse_too_many
from inft.data.rows import BadRow
from inft.sample import Pair, Prompt, Sample
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig

__all__ = ["LoadedPairs", "Pair", "group_ids", "load_pairs", "read_pairs", "refuse_no_pairs", "translation_pairs"]

TRANSLATIONS = "translations"  # the value of craft.pairs that makes them from the rows to train on
PAIRS_PER_PICTURE = 20  # at most, so that a picture with many captions does not outweigh the others

Group = tuple[str, ...]  # ("picture", key), ("title", title) or ("row", …): what a row shows
Captions = Mapping[str, Sequence[Sample]]  # language -> the captions of one picture


@dataclass(frozen=True, kw_only=True)
class LoadedPairs:
    """The pairs of a run and what was left out."""

    pairs: list[Pair]
    bad: tuple[BadRow, ...] = ()  # with their reasons, for write_quarantine
    fingerprint: str  # sha256 over the pairs

    @property
    def quarantine_reasons(self) -> str:
        """Why the first bad rows are bad, one a line."""
        return first_reasons(self.bad)


def load_pairs(
    pairs: str,
    config: MUNIChusLoadConfig,
    samples: Sequence[Sample],
    *,
    with_images: bool,
    quarantine_file: Path | None,
) -> LoadedPairs:
    """Return what ``craft.pairs`` asks for: translations among the samples to train on, or a data set of pairs.

    Errors: UserError as translation_pairs and read_pairs raise it.
    """
    if pairs == TRANSLATIONS:
        made = translation_pairs(samples, seed=config.seed)
        return LoadedPairs(pairs=made, fingerprint=_fingerprint(made))
    return read_pairs(pairs, config, with_images=with_images, quarantine_file=quarantine_file)


def refuse_no_pairs(pairs: str, config: MUNIChusLoadConfig) -> None:
    """Raise UserError for a value of ``craft.pairs`` that can give no pairs; reads no row."""
    if pairs != TRANSLATIONS:
        find_pairs(pairs)
    elif len(config.languages) == 1:
        raise UserError(
            f"--craft-pairs translations needs captions in two languages, and only {config.languages[0]!r} is read: "
            "name another with --languages, give a file of pairs, or leave --craft-pairs out."
        )


def group_ids(samples: Sequence[Sample]) -> list[int]:
    """Return an id per sample, above 0 and below 2**63: equal for the captions of one picture.

    Where no picture is known, the rows of one title share an id, and a row without a title has its own. An id depends
    on its row alone, not on the others.
    """
    return [row_id(*_group(sample)) for sample in samples]


def translation_pairs(samples: Sequence[Sample], *, seed: int, per_picture: int = PAIRS_PER_PICTURE) -> list[Pair]:
    """Return pairs of captions of one picture in two languages, as text-only rows with their own instructions.

    The languages of a picture stand in a seeded ring and each is paired with the next one: every language is as often
    anchor as positive, and two languages give both directions. Further captions in a language serve in further rings;
    one that would exceed ``per_picture`` is left out, but for the first. Pictures are told apart by their pixels; where
    none is known, by the title, if it has no two captions in one language.

    Errors: UserError when no picture has captions in two languages.
    """
    pairs = [
        Pair(anchor=_text_only(anchor), positive=_text_only(positive), id=row_id(*group))
        for group, captions in _by_picture(samples).items()
        for anchor, positive in _ring(captions, Random(f"{seed} {group}"), limit=per_picture)
    ]
    if not pairs:
        raise _no_translations(samples)
    return pairs


def read_pairs(
    location: str, config: MUNIChusLoadConfig, *, with_images: bool, quarantine_file: Path | None = None
) -> LoadedPairs:
    """Read a data set whose rows hold two texts that say the same (see pairfile for its columns).

    Errors: UserError when it cannot be read, has more bad rows than ``max_bad_fraction`` (the quarantine file then
    names them), or no row is left.
    """
    pairs, bad = read_pair_rows(location, config, with_images=with_images)
    refuse_too_many(bad, estimate=len(bad), read=len(pairs) + len(bad), config=config, file=quarantine_file)
    if not pairs:
        raise UserError(
            f"no pairs are left of --craft-pairs {location}: {len(bad)} bad rows.\n{first_reasons(bad)}".rstrip()
            + "\nGive a data set with columns text and text_tgt, or leave --craft-pairs out."
        )
    return LoadedPairs(pairs=pairs, bad=tuple(bad), fingerprint=_fingerprint(pairs))


def _group(sample: Sample) -> Group:
    """What a sample shows: its picture, else the article of its title, else itself."""
    picture, title = sample.meta.get("picture"), sample.meta.get("title")
    if picture:
        return ("picture", picture)
    if title:
        return ("title", title)
    return ("row", sample.language, sample.prompt.text, sample.answer)


def _by_picture(samples: Sequence[Sample]) -> dict[Group, Captions]:
    """The captions of each picture by language, in the order of the samples."""
    pictures: defaultdict[Group, defaultdict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        pictures[_group(sample)][sample.language].append(sample)
    return {
        group: captions
        for group, captions in pictures.items()
        # A title over several captions in one language may stand over several pictures.
        if group[0] == "picture" or all(len(rows) == 1 for rows in captions.values())
    }


def _ring(captions: Captions, random: Random, *, limit: int) -> Iterator[tuple[Sample, Sample]]:
    """Yield (anchor, positive) round after round; a language that has run out of captions begins again."""
    languages = sorted(captions)
    if len(languages) < 2:
        return
    shuffled = {language: random.sample(captions[language], k=len(captions[language])) for language in languages}
    rounds = min(max(map(len, shuffled.values())), max(limit // len(languages), 1))
    for number in range(rounds):
        order = random.sample(languages, k=len(languages))
        for here, there in zip(order, [*order[1:], order[0]], strict=True):
            yield shuffled[here][number % len(shuffled[here])], shuffled[there][number % len(shuffled[there])]


def _text_only(sample: Sample) -> Sample:
    """The caption behind its instruction; picture and news text would tell it without being read."""
    return Sample(
        image=None,
        prompt=Prompt(instruction=sample.prompt.instruction),
        answer=sample.answer,
        language=sample.language,
        meta=sample.meta,
    )


def _no_translations(samples: Sequence[Sample]) -> UserError:
    found = Counter(sample.language for sample in samples)
    has = ", ".join(f"{count:,} in {language}" for language, count in found.most_common()) or "none"
    why = "no picture has captions in two languages" if len(found) > 1 else "there is one language only"
    return UserError(
        f"--craft-pairs translations: {why} among the rows to train on ({has}). Read more of them with --languages "
        "or --max-rows-per-lang, give a file of pairs, or leave --craft-pairs out: each row is then contrasted "
        "with its own answer."
    )


def _fingerprint(pairs: Sequence[Pair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        texts = [text for sample in (pair.anchor, pair.positive) for text in (sample.prompt.text, sample.answer)]
        images = [sample.meta.get("picture", "") for sample in (pair.anchor, pair.positive) if sample.image is not None]
        digest.update(json.dumps([pair.id, *texts, *images]).encode())
    return digest.hexdigest()
