"""What an adapter forgot, in a sentence and in tables."""

from collections.abc import Sequence
from dataclasses import dataclass

from inft.evaluation.metrics import ALL, METRICS, Metric, Scores
from inft.evaluation.report_compare import Comparison
from inft.evaluation.report_tables import Cell, Table, language_cell
from inft.evaluation.verdict import JUDGE, UNKNOWN, Verdict, figure, interval

NATS = Metric(title="nats per token", decimals=3, higher_is_better=False)
LOSS_HEADS = (
    ("base", "base"),
    ("adapter", "adapter"),
    ("difference", "difference"),
    ("base_text_only", "base, without the input"),
    ("adapter_text_only", "adapter, without the input"),
    ("difference_text_only", "difference, without the input"),
)


@dataclass(frozen=True, kw_only=True)
class Forgotten(Verdict):
    """The same of a system in a report."""

    colour: str


def forgotten(compared: Sequence[Comparison]) -> list[Forgotten]:
    """What was measured of the adapters in the comparisons."""
    return [
        Forgotten(label=system.label, colour=system.colour, forgetting=system.stored.forgetting)
        for comparison in compared
        for system in comparison.systems
        if system.stored.forgetting is not None
    ]


def forgetting_table(found: Forgotten, name: str) -> Table:
    """One metric of base and adapter with its difference, and what both score with other rows' inputs."""
    of, metric = found.forgetting, METRICS[name]
    sides = {"base": of.base, "adapter": of.adapter, "difference": of.difference}
    controls = {"base, shuffled": of.base_shuffled, "adapter, shuffled": of.adapter_shuffled}
    rows = []
    for language in [*found.languages, ALL]:
        cells = [
            _cell(scores, language, name, metric, signed=side == "difference")
            for side, scores in (sides | controls).items()
        ]
        rows.append([language_cell(language, of.language_names), Cell(text=_verdict(found, language)), *cells])
    heads = [Cell(text=head, number=True) for head in (*sides, *controls)]
    return Table(title=metric.title, head=[Cell(text="language"), Cell(text="the base could"), *heads], rows=rows)


def forgetting_tables(found: Forgotten) -> list[Table]:
    """A table for each metric that was measured, the one that judges first."""
    of = found.forgetting.base
    measured = [name for name in METRICS if any(name in scores for scores in of.values())]
    return [forgetting_table(found, name) for name in sorted(measured, key=lambda name: name != JUDGE)]


def loss_table(found: Forgotten) -> Table | None:
    """Losses of base and adapter on the references, with the row's input and without it; None when not measured."""
    losses = found.forgetting.loss
    heads = [(name, title) for name, title in LOSS_HEADS if any(name in of for of in losses.values())]
    if not heads:
        return None
    rows = [
        [
            language_cell(language, found.forgetting.language_names),
            *(_cell(losses, language, name, NATS, signed=name.startswith("difference")) for name, _ in heads),
        ]
        for language in losses
    ]
    return Table(
        title="Loss of the references, nats per token",
        head=[Cell(text="language"), *(Cell(text=title, number=True) for _, title in heads)],
        rows=rows,
    )


def _verdict(found: Forgotten, language: str) -> str:
    if language == ALL:
        return ""
    if language not in found.forgetting.could_do:
        return "no"
    return f"yes: {'lost' if language in found.lost else 'worse' if language in found.worse else 'kept'}"


def _cell(scores: Scores, language: str, name: str, metric: Metric, *, signed: bool = False) -> Cell:
    score = scores.get(language, {}).get(name)
    if score is None:
        return Cell(text=UNKNOWN, number=True)
    note = interval(score, metric, signed=signed)
    return Cell(text=figure(score.value, metric, signed=signed), note=note, number=True)
