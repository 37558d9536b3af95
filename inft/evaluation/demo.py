"""The demo around one training run: held-out scenes before, after, and after with shuffled images.

What is measured is what the run's method teaches: exact captions, the right one of two, or the reward.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from inft.evaluation.shuffle import with_shuffled_images
from inft.sample import Sample
from params import TrainParams

if TYPE_CHECKING:
    from inft.data.rows import RowKind
    from inft.models.collate import CaptionCollator
    from inft.training.run import RunResult

SCENES = 40  # held-out scenes captioned in each language
SHOWN = 3  # rows of the gallery per language

Shares = dict[str, float]  # language code -> share of exact captions, 0 to 1; or another figure of its rows


def exact_shares(samples: Sequence[Sample], captions: Sequence[str]) -> Shares:
    """Share of captions equal to their reference, per language; an empty caption counts as wrong."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for sample, caption in zip(samples, captions, strict=True):
        hits[sample.language].append(caption.strip() == sample.answer.strip())
    return {language: sum(found) / len(found) for language, found in hits.items()}


def chance(samples: Sequence[Sample]) -> float:
    """Probability that two different held-out rows of one language have the same caption.

    This is what captions that are right in form and distribution, but of another picture, are expected to score.
    """
    by_language: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        by_language[sample.language][sample.answer] += 1
    pairs = sum(counts.total() * (counts.total() - 1) for counts in by_language.values())
    return sum(n * (n - 1) for counts in by_language.values() for n in counts.values()) / max(pairs, 1)


def shares_table(
    shares: Mapping[str, Shares],
    names: Mapping[str, str],
    *,
    expected: float | None,
    shuffled_word: str,
    title: str = "Exact captions on held-out scenes",
    percent: bool = True,
) -> Table:
    """A row per language: its figure before, after, and after with shuffled inputs; ``expected`` by chance."""
    table = Table(title=title)
    table.add_column("language")
    for heading in ("before", "after", f"after, {shuffled_word} shuffled"):
        table.add_column(heading, justify="right")
    for language in shares["after"]:
        figures = [shares[key][language] for key in ("before", "after", "shuffled")]
        cells = [f"{figure:.0%}" if percent else f"{figure:.2f}" for figure in figures]
        table.add_row(f"{names.get(language, language)} ({language})", *cells)
    if expected is not None:
        table.caption = f"chance: {expected:.1%}"
    return table


def gallery_table(samples: Sequence[Sample], before: Sequence[str], after: Sequence[str]) -> Table:
    """The first rows of each language, one language after the other: reference, caption before, caption after."""
    table = Table(title="Held-out scenes")
    for heading in ("scene", "language", "reference", "before", "after"):
        table.add_column(heading, overflow="fold")
    rows: dict[str, list[tuple[str, str, str, str, str]]] = defaultdict(list)
    for sample, old, new in zip(samples, before, after, strict=True):
        rows[sample.language].append((str(sample.meta["title"]), sample.language, sample.answer, old, new))
    for language in rows:
        for row in rows[language][:SHOWN]:
            table.add_row(*row)
        table.add_section()
    return table


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a demo shows of a model: a figure of each language, and the captions that it is of."""

    title: str
    of: Callable[[Any, Sequence[Sample]], tuple[Shares, list[str]]]  # a model and rows -> the figures, its captions
    kind: "RowKind" = "captions"  # what is read of a row
    percent: bool = True
    chance: Callable[[Sequence[Sample]], float] | None = None  # the figure of one who does not look


def exact_captions(params: TrainParams, collator: "CaptionCollator") -> Measure:
    """The share of captions that are exact."""

    def measured(model: Any, rows: Sequence[Sample]) -> tuple[Shares, list[str]]:
        captions = _captions(model, collator, rows, params.basic.gen_max_new_tokens)[0]
        return exact_shares(rows, captions), captions

    return Measure(title="Exact captions on held-out scenes", of=measured, chance=chance)


def preferred_captions(params: TrainParams, collator: "CaptionCollator") -> Measure:
    """The share of scenes whose right caption is likelier than one that is wrong in one attribute."""
    from inft.evaluation.loss import row_losses
    from inft.models.preferences import sides

    def measured(model: Any, rows: Sequence[Sample]) -> tuple[Shares, list[str]]:
        pairs = [side for row in rows for side in sides(row)]
        nats = [loss for loss, _ in row_losses(model, collator, pairs, batch_size=SCENES)]
        right: dict[str, list[bool]] = defaultdict(list)
        for row, chosen, rejected in zip(rows, nats[::2], nats[1::2], strict=True):
            right[row.language].append(chosen < rejected)
        captions = _captions(model, collator, rows, params.basic.gen_max_new_tokens)[0]
        return {language: sum(found) / len(found) for language, found in right.items()}, captions

    title = "Held-out scenes whose right caption is likelier than a wrong one"
    return Measure(title=title, of=measured, kind="preferences", chance=lambda rows: 0.5)


def rewarded_captions(params: TrainParams, collator: "CaptionCollator") -> Measure:
    """The mean reward of captions."""
    from inft.rewards.load import load_rewards
    from inft.rewards.score import score_all, weighted_sum

    rewards = load_rewards(params.rl.rewards)

    def measured(model: Any, rows: Sequence[Sample]) -> tuple[Shares, list[str]]:
        captions, tokens = _captions(model, collator, rows, params.rl.max_completion_length)
        found = score_all(rewards, samples=rows, completions=captions, completion_ids=tokens)
        totals: dict[str, list[float]] = defaultdict(list)
        for row, total in zip(rows, weighted_sum(found, params.rl.reward_weights), strict=True):
            totals[row.language].append(total)
        return {language: sum(part) / len(part) for language, part in totals.items()}, captions

    title = f"Reward of captions of held-out scenes ({' + '.join(params.rl.rewards)})"
    return Measure(title=title, of=measured, kind="references", percent=False)


MEASURES: Mapping[str, Callable[[TrainParams, "CaptionCollator"], Measure]] = {
    "sft": exact_captions,
    "dpo": preferred_captions,
    "orpo": preferred_captions,
    "grpo": rewarded_captions,
    "ppo": rewarded_captions,
}


def _captions(
    model: Any, collator: "CaptionCollator", rows: Sequence[Sample], max_new_tokens: int
) -> tuple[list[str], list[list[int]]]:
    """Greedy captions of the rows, as text and as tokens."""
    from inft.evaluation.generate import decode_captions, generate_tokens

    tokens = generate_tokens(model, collator, rows, max_new_tokens=max_new_tokens, batch_size=SCENES)
    return decode_captions(collator, tokens), tokens


def run_demo(params: TrainParams, console: Console, *, resume: str | None, overwrite: bool) -> "RunResult":
    """Train on the drawn sample set and show that it learned: tables on the console, figures in demo.json."""
    from inft.data.batches import load_samples
    from inft.models import load_spec
    from inft.models.loading import load_model, load_processor
    from inft.training.processes import is_main
    from inft.training.run import fit
    from inft.training.stored import load_adapter, read_adapter

    result = fit(params, resume=resume, overwrite=overwrite, console=console)
    if result.status == "interrupted" or not is_main():
        return result

    spec = load_spec(params.model)
    processor = load_processor(spec, params.processor_name, max_image_tiles=params.basic.max_image_tiles)
    measure = MEASURES[params.method](params, spec.collator(processor, max_length=params.basic.max_length))
    heldout = replace(params.data, split="test", eval_fraction=0.0, max_rows_per_lang=SCENES)
    samples = load_samples(heldout, quarantine_file=None, with_images=spec.takes_images, kind=measure.kind).train
    base = load_model(spec, params.model_name, basic=params.basic)

    before, captions_before = measure.of(base, samples)
    tuned = load_adapter(base, read_adapter(result.best_dir), spec=spec)
    after, captions_after = measure.of(tuned, samples)
    shuffled, _ = measure.of(tuned, with_shuffled_images(samples, seed=params.basic.seed))

    console.print(gallery_table(samples, captions_before, captions_after))
    figures = {"before": before, "after": after, "shuffled": shuffled}
    table = shares_table(
        figures,
        params.data.language_names,
        expected=None if measure.chance is None else measure.chance(samples),
        shuffled_word="images" if spec.takes_images else "descriptions",
        title=measure.title,
        percent=measure.percent,
    )
    console.print(table)
    write_shares(Path(params.output_dir) / "demo.json", figures)
    console.print(f"figures: {Path(params.output_dir) / 'demo.json'}   best adapter: {result.best_dir}", soft_wrap=True)
    return result


def write_shares(path: Path, shares: Mapping[str, Shares]) -> None:
    """Write the three tables of shares as one JSON object."""
    path.write_text(json.dumps(shares, indent=2) + "\n", encoding="utf-8")
