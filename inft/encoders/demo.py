"""The demo of pretraining: a small NeoBERT on text that ships, and how well it fills in masks before and after.

Nothing here needs torch before the run begins.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from inft.encoders.demo_text import PAIR, PROSE, demo_data, read_texts
from inft.training.processes import is_main, on_main
from inft.training.storage import staged, write_text
from params.encoder import EncoderParams
from params.errors import UserError
from params.munichus import LANGUAGE_NAMES

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from rich.console import Console
    from rich.table import Table

    from inft.encoders.run import EncoderResult, Parts

DEMO = "demo"  # directory of text, tokenizer and figures, below trainer.output_dir
OUTPUT = "outputs/neobert_demo"
TOKENIZER = "tokenizer"  # below DEMO
FIGURES = "figures.json"  # below DEMO
CAPTIONS, ALL = "captions", "all"  # groups of rows in the table, besides PAIR and PROSE

_OVERRIDES: Mapping[str, Any] = {
    "model.hidden_size": 128,
    "model.num_hidden_layers": 4,
    "model.num_attention_heads": 4,
    "model.intermediate_size": 512,
    "model.max_position_embeddings": 128,
    "model.vocab_size": 2048,
    "tokenizer.name": f"{OUTPUT}/{DEMO}/{TOKENIZER}",
    "dataset.path": f"{OUTPUT}/{DEMO}",
    "dataset.language_column": "language",
    "dataset.max_seq_length": 128,
    "datacollator.pack_sequences": True,
    "trainer.output_dir": OUTPUT,
    "trainer.run_name": "neobert_demo",
    "trainer.per_device_train_batch_size": 12,
    "trainer.per_device_eval_batch_size": 128,
    "trainer.max_steps": 1000,
    "trainer.save_steps": 500,
    "trainer.eval_steps": 500,
    "trainer.logging_steps": 50,
    "trainer.save_total_limit": 1,
    "trainer.mixed_precision": "no",
    "trainer.num_threads": 1,  # a second gains half, and loses nine tenths where its core is busy
    "optimizer.name": "muon",  # learns to look from one language to the other, which AdamW does not in this time
    "optimizer.lr": 5e-3,
    "scheduler.warmup_steps": 100,
}


class MaskedBatch(Protocol):
    """What the baseline reads of a batch; axes: T tokens of the stream, N documents."""

    @property
    def labels_T(self) -> Any: ...  # noqa: D102 -- -100 where nothing is predicted
    @property
    def cu_seqlens(self) -> Any: ...  # noqa: D102 -- N + 1
    @property
    def languages(self) -> Sequence[str | None]: ...  # noqa: D102 -- of each document


@dataclass(frozen=True, kw_only=True)
class Share:
    """How many of some masked tokens are predicted right."""

    correct: int = 0
    masked: int = 0

    def __add__(self, other: "Share") -> "Share":
        return Share(correct=self.correct + other.correct, masked=self.masked + other.masked)

    @property
    def value(self) -> float:
        """The share, from 0 to 1; 0 of none."""
        return self.correct / max(self.masked, 1)


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One line of the table: masked accuracy of a language, or of a group of documents."""

    name: str  # language code, CAPTIONS, PAIR, PROSE or ALL
    masked: int  # tokens that were predicted
    unigram: float
    before: float
    after: float


def demo_overrides() -> Mapping[str, Any]:
    """The demo's parameters by dotted name."""
    return dict(_OVERRIDES)


def demo_run(
    params: EncoderParams,
    run: Callable[..., "EncoderResult"],
    build: "Callable[[EncoderParams, Console], Parts]",
    *,
    overwrite: bool,
    console: "Console",
) -> "EncoderResult":
    """Make text and tokenizer below the output directory, train on them, print the table and store its figures.

    `run` and `build` are those of pretraining. Errors: UserError for data or a tokenizer of one's own.
    """
    params = _placed(params)
    parts: list[Parts] = []

    def with_text(params: EncoderParams, console: "Console") -> "Parts":
        on_main(lambda: _make_text(params))
        parts.append(build(params, console))
        return parts[0]

    result = run(params, with_text, overwrite=overwrite, console=console)
    if result.outcome.status == "interrupted" or not is_main():
        return result
    baseline = _baseline(params, parts[0])
    rows = demo_report(baseline, _first_figures(result.log_file), result.outcome.figures or {})
    console.print(demo_table(rows))
    figures = Path(params.trainer.output_dir) / DEMO / FIGURES
    write_text(figures, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    console.print(f"figures: {figures}", highlight=False, markup=False, soft_wrap=True)
    return result


def _placed(params: EncoderParams) -> EncoderParams:
    """The parameters with text and tokenizer below the output directory."""
    for name, given in (("dataset.path", params.dataset.path), ("tokenizer.name", params.tokenizer.name)):
        if given != _OVERRIDES[name]:
            raise UserError(f"--demo makes its own text and tokenizer: leave {name} out, or --demo.")
    place = Path(params.trainer.output_dir) / DEMO
    return replace(
        params,
        dataset=replace(params.dataset, path=str(place)),
        tokenizer=replace(params.tokenizer, name=str(place / TOKENIZER)),
    )


def _make_text(params: EncoderParams) -> None:
    """Write text and tokenizer; a run that is gone on with finds those that it began with."""
    from inft.encoders.demo_tokenizer import demo_tokenizer

    place = Path(params.trainer.output_dir) / DEMO
    if params.trainer.resume_from_checkpoint is not None and place.is_dir():
        return
    with staged(place, what="the demo's text", remedy="Free space there and start again.") as staging:
        demo_data(staging, params.seed)
        texts = [row.text for row in read_texts(staging, "train")]
        demo_tokenizer(staging / TOKENIZER, texts, params.model.vocab_size)


def _baseline(params: EncoderParams, parts: "Parts") -> dict[str | None, Share]:
    """The baseline under the masks of all processes' evaluation."""
    from inft.encoders.data.batches import EvaluationBatches

    task: Any = parts.task
    heldout = EvaluationBatches(task.data, parts.tokenizer, params)
    return unigram_baseline(_train_tokens(params, parts.tokenizer), heldout)


def _train_tokens(params: EncoderParams, tokenizer: Any) -> Iterable[tuple[Sequence[int], str]]:
    rows = read_texts(Path(params.trainer.output_dir) / DEMO, "train")
    encoded = tokenizer([row.text for row in rows], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return zip(encoded, (row.language for row in rows), strict=True)


def unigram_baseline(
    train: "Iterable[tuple[ArrayLike, str | None]]", heldout: Iterable[MaskedBatch]
) -> dict[str | None, Share]:
    """Return, by language, what always predicting the language's most frequent training token gets right.

    `train` yields each document's tokens, special ones left out, and its language. That the baseline is told the
    language makes it harder to beat.
    """
    import numpy as np

    counts: dict[str | None, Counter[int]] = defaultdict(Counter)
    for tokens, language in train:
        counts[language].update(np.asarray(tokens).tolist())
    shares: dict[str | None, Share] = defaultdict(Share)
    for batch in heldout:
        labels_T, cu_seqlens = np.asarray(batch.labels_T), np.asarray(batch.cu_seqlens)
        for language, start, stop in zip(batch.languages, cu_seqlens, cu_seqlens[1:], strict=False):
            labels = labels_T[start:stop]
            labels = labels[labels != -100]
            guess = counts[language].most_common(1)[0][0] if counts[language] else -1
            shares[language] += Share(correct=int((labels == guess).sum()), masked=len(labels))
    return dict(shares)


def demo_report(
    baseline: Mapping[str | None, Share], before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[DemoRow]:
    """Return a row for each language of captions, then one for all captions, for pairs, for prose and for all.

    `before` and `after` are evaluations with "accuracies" by language; groups are means over masked tokens.
    """
    languages = [name for name in LANGUAGE_NAMES if name in baseline]
    groups: dict[str, list[Any]] = {name: [name] for name in languages}
    groups |= {CAPTIONS: languages, PAIR: [PAIR], PROSE: [PROSE], ALL: list(baseline)}
    accuracies = before["accuracies"], after["accuracies"]
    return [
        _row(name, [part for part in parts if part in baseline], baseline, *accuracies)
        for name, parts in groups.items()
    ]


def _row(
    name: str,
    parts: Sequence[Any],
    baseline: Mapping[str | None, Share],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> DemoRow:
    masked = sum(baseline[part].masked for part in parts)

    def mean(accuracies: Mapping[Any, float]) -> float:
        found = [accuracies[part] * baseline[part].masked for part in parts if baseline[part].masked]
        return sum(found) / max(masked, 1)

    unigram = sum((baseline[part] for part in parts), Share()).value
    return DemoRow(name=name, masked=masked, unigram=unigram, before=mean(before), after=mean(after))


def demo_table(rows: Iterable[DemoRow]) -> "Table":
    """The rows as a table, languages and groups by their names."""
    from rich.table import Table

    titles = {
        **{code: f"{name} ({code})" for code, name in LANGUAGE_NAMES.items()},
        CAPTIONS: "captions, ten languages",
        PAIR: "a scene in two languages",
        PROSE: "prose (this project's documents)",
        ALL: "all",
    }
    table = Table(title="Masked accuracy on held-out text")
    table.add_column("language")
    for heading in ("masked tokens", "most frequent token", "before", "after"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row.name == CAPTIONS:
            table.add_section()
        shares = (f"{value:.1%}" for value in (row.unigram, row.before, row.after))
        table.add_row(titles[row.name], f"{row.masked:,}", *shares)
    table.caption = (
        "No trained caption shows a held-out scene; held-out prose is of other files.\n"
        "Before: one masked token in ten is left as it is, and a new encoder repeats what it sees."
    )
    return table


def _first_figures(log_file: Path) -> Mapping[str, Any]:
    """The evaluation before the first step, from the run's log."""
    from inft.training.logfiles import last_run
    from inft.training.runlog import read_events

    events = last_run(read_events(log_file))
    return next(event for event in events if event["event"] == "eval" and event["step"] == 0)
