"""The rows of an evaluation: every one that has a reference, the captions of one image together, none dropped."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from inft.data.batches import held_out_entries
from inft.data.heldout import spread, unit_hash
from inft.data.languages import available_languages
from inft.data.locate import find_source
from inft.data.pool import collect
from inft.data.references import grouped, place_of
from inft.data.rows import BadRow, MissingSplit, RowKind
from inft.models.collate import where
from inft.rewards import REWARDS
from inft.rewards.load import load_rewards
from inft.sample import Sample
from params.errors import UserError
from params.evaluation import HELDOUT
from params.methods import PREFERENCE_METHODS
from params.munichus import MUNIChusLoadConfig
from params.train import Method

# samples, rows without a reference, lines that are no rows, rows of other languages
Found = tuple[list[Sample], int, tuple[BadRow, ...], Mapping[str, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRow:
    """A row to caption; its image is not read before its turn."""

    key: str  # of its place, language, title, prompt and references: the same in every evaluation of the data
    sample: Sample  # its answer is the first reference
    references: tuple[str, ...]

    @property
    def where(self) -> str:
        """Its place in the source: "test.jsonl line 17"."""
        return place_of(self.sample)


@dataclass(frozen=True, kw_only=True)
class EvalRows:
    """The rows of a split and what could not become one."""

    rows: list[EvalRow]
    without_reference: int  # rows left out: nothing to compare with
    bad: tuple[BadRow, ...]  # lines that could not be read as rows at all
    fingerprint: str  # sha256 over the keys
    other_languages: Mapping[str, int]  # language that was not asked for, or has no name -> rows left out

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages that have rows, in the order of their first."""
        return tuple(dict.fromkeys(row.sample.language for row in self.rows))


def load_rows(
    config: MUNIChusLoadConfig,
    *,
    limit: int | None,
    with_images: bool,
    trained: MUNIChusLoadConfig | None = None,
    method: Method = "sft",
    rewards: Sequence[str] = (),
) -> EvalRows:
    """Read the rows of ``config.split``, at most ``limit``, spread evenly over the languages.

    The split "heldout" is what the run with ``trained`` as its data section held out: split as its ``method``, with
    ``rewards``, split it. The chosen answer of a preference is its reference. Text models (``with_images`` False) get
    no images. Errors: UserError for an unknown source, split or language, and when no row has a reference.
    """
    kind = _row_kind(method, rewards, heldout=config.split == HELDOUT)
    if config.split == HELDOUT:
        samples, empty, bad, others = _held_out(config, trained, kind=kind, with_images=with_images)
    else:
        samples, empty, bad, others = _of_split(replace(config, remove_empty=True), kind=kind, with_images=with_images)
    rows = [_row(group) for group in grouped(samples)]
    if not rows:
        raise UserError(
            f"no row of split {config.split!r} has a reference caption to compare with: {empty} are empty, {len(bad)} "
            "cannot be read. Name the caption column with --set data.columns.caption=NAME, or another --split."
        )
    ranks = [unit_hash(config.seed, "evaluation", row.key) for row in rows]
    chosen = [rows[i] for i in spread([row.sample.language for row in rows], ranks, limit)]
    chosen.sort(key=lambda row: config.languages.index(row.sample.language))  # stable: then in the source's order
    return EvalRows(
        rows=chosen,
        without_reference=empty,
        bad=bad,
        fingerprint=fingerprint_of(chosen),
        other_languages=others,
    )


def fingerprint_of(rows: Sequence[EvalRow]) -> str:
    """Hexadecimal SHA-256 over the keys of rows, in their order."""
    return hashlib.sha256("\n".join(row.key for row in rows).encode()).hexdigest()


def _row_kind(method: Method, rewards: Sequence[str], *, heldout: bool) -> RowKind:
    """What a row is: in the split of a run what it was in training; elsewhere it needs no more than a reference."""
    if method == "sft":
        return "captions"
    if heldout and method in PREFERENCE_METHODS:
        return "preferences"
    return "references" if not heldout or _need_references(rewards) else "prompts"


def _need_references(rewards: Sequence[str]) -> bool:
    """Whether a run with these rewards, as most, left out rows without a caption.

    A user's own module is run where no other reward tells it.
    """
    try:
        return not rewards or any(
            reward.needs_references
            for name in sorted(rewards, key=lambda name: name not in REWARDS)
            for reward in load_rewards([name])
        )
    except UserError as error:
        raise UserError(
            f"{error} What the adapter's run held out depends on its rewards: run inft in the directory where it "
            "trained, or name a split of the data with --split."
        ) from error


def _of_split(config: MUNIChusLoadConfig, *, kind: RowKind, with_images: bool) -> Found:
    source, location = find_source(config)
    try:
        pool = collect(config, source=source, location=location, split=config.split, kind=kind)
    except MissingSplit as error:
        raise UserError(str(error).replace("--set data.split=NAME", "--split NAME")) from error
    if pool.found:
        available_languages(config, pool.found, source=location or source)
    samples = [entry.sample if with_images else _without_image(entry.sample) for entry in pool.entries]
    others = {code: count for code, count in pool.found.items() if code not in config.languages}
    return samples, pool.empty.total(), tuple(pool.bad), others


def _held_out(
    config: MUNIChusLoadConfig, trained: MUNIChusLoadConfig | None, *, kind: RowKind, with_images: bool
) -> Found:
    """The rows that a run held out: split as it split them, whatever languages are asked for now."""
    if trained is None:
        raise UserError(
            f"--split {HELDOUT} means the rows that an adapter's run held out: give --adapter with its best.json, or "
            "name a split of the data."
        )
    entries, empty, bad = held_out_entries(replace(trained, data=config.data), kind=kind, with_images=with_images)
    if not entries:
        raise UserError("the adapter's run held out no rows (data.eval_fraction was 0): name a split with --split.")
    found = Counter(entry.sample.language for entry in entries)
    available_languages(config, found, source=f"the split {HELDOUT}")
    others = {code: count for code, count in found.items() if code not in config.languages}
    samples = [entry.sample for entry in entries if entry.sample.language in config.languages]
    answered = [sample for sample in samples if sample.answer]  # a run that needs no answers split the others too
    empty += len(samples) - len(answered)
    return answered if with_images else [_without_image(sample) for sample in answered], empty, bad, others


def _without_image(sample: Sample) -> Sample:
    return replace(sample, image=None)


def _row(group: Sequence[Sample]) -> EvalRow:
    first, references = group[0], tuple(dict.fromkeys(sample.answer for sample in group))
    parts = (where(first), first.language, str(first.meta.get("title", "")), first.prompt.text, *references)
    key = hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return EvalRow(key=key, sample=first, references=references)
