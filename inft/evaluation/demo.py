"""The demo around one training run: captions of held-out scenes before, after, and after with shuffled images."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from inft.evaluation.shuffle import with_shuffled_images
from inft.sample import Sample
from params import TrainParams

if TYPE_CHECKING:
    from inft.training.run import RunResult

SCENES = 40  # held-out scenes captioned in each language
SHOWN = 3  # rows of the gallery per language

Shares = dict[str, float]  # language code -> share of exact captions, 0 to 1


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
    shares: Mapping[str, Shares], names: Mapping[str, str], *, expected: float, shuffled_word: str
) -> Table:
    """A row per language: exact captions before, after, and after with shuffled inputs."""
    table = Table(title="Exact captions on held-out scenes")
    table.add_column("language")
    for heading in ("before", "after", f"after, {shuffled_word} shuffled"):
        table.add_column(heading, justify="right")
    for language in shares["after"]:
        cells = [f"{shares[key][language]:.0%}" for key in ("before", "after", "shuffled")]
        table.add_row(f"{names.get(language, language)} ({language})", *cells)
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


def run_demo(params: TrainParams, console: Console, *, resume: str | None, overwrite: bool) -> "RunResult":
    """Train on the drawn sample set and show that it learned: tables on the console, figures in demo.json."""
    from inft.data.batches import load_samples
    from inft.evaluation.generate import generate_captions
    from inft.models import load_spec
    from inft.models.loading import load_model, load_processor
    from inft.training.processes import is_main
    from inft.training.run import fit
    from inft.training.stored import load_adapter, read_adapter

    result = fit(params, resume=resume, overwrite=overwrite, console=console)
    if result.status == "interrupted" or not is_main():
        return result

    spec = load_spec(params.model)
    heldout = replace(params.data, split="test", eval_fraction=0.0, max_rows_per_lang=SCENES)
    samples = load_samples(heldout, quarantine_file=None, with_images=spec.takes_images).train
    processor = load_processor(spec, params.processor_name, max_image_tiles=params.basic.max_image_tiles)
    collator = spec.collator(processor, max_length=params.basic.max_length)
    base = load_model(spec, params.model_name, basic=params.basic)

    def captions(model: object, rows: Sequence[Sample]) -> list[str]:
        return generate_captions(
            model, collator, rows, max_new_tokens=params.basic.gen_max_new_tokens, batch_size=SCENES
        )

    before = captions(base, samples)
    tuned = load_adapter(base, read_adapter(result.best_dir), spec=spec)
    after = captions(tuned, samples)
    mixed = captions(tuned, with_shuffled_images(samples, seed=params.basic.seed))

    shares = {
        "before": exact_shares(samples, before),
        "after": exact_shares(samples, after),
        "shuffled": exact_shares(samples, mixed),
    }
    console.print(gallery_table(samples, before, after))
    word = "images" if spec.takes_images else "descriptions"
    console.print(shares_table(shares, params.data.language_names, expected=chance(samples), shuffled_word=word))
    write_shares(Path(params.output_dir) / "demo.json", shares)
    console.print(f"figures: {Path(params.output_dir) / 'demo.json'}   best adapter: {result.best_dir}", soft_wrap=True)
    return result


def write_shares(path: Path, shares: Mapping[str, Shares]) -> None:
    """Write the three tables of shares as one JSON object."""
    path.write_text(json.dumps(shares, indent=2) + "\n", encoding="utf-8")
