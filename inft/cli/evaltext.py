"""What an evaluation found, as text for a terminal or for a program."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from inft.evaluation.metrics import ALL, METRICS, Score, Scores
from params.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from inft.evaluation.records import Drift, Forgetting, Stored

HEADINGS = ("chrF\nbase", "\nadapter", "\ndifference (95 %)", "\nadapter, shuffled", "exact\nbase", "\nadapter")
LOSSES = {"base": "loss\nbase", "adapter": "\nadapter", "base_text_only": "without image\nbase"}
LOSSES["adapter_text_only"] = "\nadapter"


def show(evaluations: "Sequence[Stored]", shown: str, console: "Console", progress: "Console") -> None:
    """Print the scores of all of them on ``console``, and of the last one what else was measured.

    For a program, ``console`` gets the scores alone and ``progress`` the rest.
    """
    from inft.evaluation.metrics.tables import scores_csv, scores_latex, scores_table
    from inft.evaluation.records import scores_to_json

    stored, systems = evaluations[-1], named(evaluations)
    if shown == "table":
        names = {code: name for one in evaluations for code, name in one.evaluation.language_names.items()}
        console.print(scores_table(systems, language_names=names))
    elif shown == "json":
        texts = [json.loads(scores_to_json(scores)) | {"system": name} for name, scores in systems.items()]
        typer.echo(json.dumps(texts if len(texts) > 1 else texts[0], indent=2, ensure_ascii=False))
    else:
        typer.echo(scores_csv(systems) if shown == "csv" else scores_latex(systems), nl=False)
    show_more(stored, progress)
    print_line(progress, f"captions, scores and tables: {stored.directory}")


def named(evaluations: "Sequence[Stored]") -> "dict[str, Scores]":
    """The scores of evaluations that stand in one table, each under a name of its own.

    Errors: UserError for one that is unfinished, or of other rows: its figures could not be compared.
    """
    last, found = evaluations[-1], {}
    for one in evaluations:
        if not one.scores:
            raise UserError(f"--beside {one.directory}: the evaluation is not finished; run its command again.")
        if one.evaluation.fingerprint != last.evaluation.fingerprint:
            raise UserError(
                f"--beside {one.directory}: it was made on other rows ({one.evaluation.data}, {one.evaluation.split}, "
                f"{one.evaluation.rows} rows) than {last.directory} ({last.evaluation.data}, {last.evaluation.split}, "
                f"{last.evaluation.rows} rows), so that the figures cannot be compared."
            )
        twin = any(other is not one and other.name == one.name for other in evaluations)
        found[str(one.directory) if twin else one.name] = one.scores
    return found


def show_more(stored: "Stored", console: "Console") -> None:
    """Unreadable rows, examples that had no room, forgetting and drift."""
    from inft.evaluation.verdict import Verdict

    failed = [prediction for prediction in stored.predictions if prediction.error]
    if failed:
        first = failed[0]
        text = (
            f"{len(failed):,} rows have no caption and count as wrong, the first: {first.where}: {first.error}. Mend "
            "them, and the same command tries them again."
        )
        console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
    shots = [prediction.shots for prediction in stored.predictions if prediction.shots is not None]
    if shots and min(shots) < max(shots):
        mean = sum(shots) / len(shots)
        text = f"examples: {mean:.1f} a row, {min(shots)} at the least: prompts above max_length lose their first ones"
        console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
    if stored.forgetting is not None:
        console.print(forgetting_table(stored.forgetting))
        for line in Verdict(label=stored.name, forgetting=stored.forgetting).sentences:
            print_line(console, line)
    if stored.drift is not None:
        console.print(drift_table(stored.drift))


def print_line(console: "Console", text: str) -> None:
    """One line of plain text, whatever its length."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def forgetting_table(found: "Forgetting") -> "Table":
    """A row per language: base, adapter, what was lost with its interval, the shuffled control, and losses.

    forgetting.json has every metric.
    """
    from rich.table import Table

    table = Table(title=f"Forgetting on {found.data}, {found.split}: {found.rows:,} rows")
    table.add_column("language", overflow="fold")
    for heading in HEADINGS:
        table.add_column(heading, justify="right", overflow="fold")
    for heading in LOSSES.values():
        table.add_column(heading, justify="right", overflow="fold")
    for language in found.base:
        if language == ALL:
            table.add_section()
        mark = " *" if language in found.could_do else ""
        table.add_row(f"{found.language_names.get(language, language)} ({language}){mark}", *_cells(found, language))
    table.caption = (
        "* the base's captions follow the image there. shuffled: with the images of other rows. "
        "loss: nats per token; without image: of the reference as a text-only row"
    )
    return table


def _cells(found: "Forgetting", language: str) -> list[str]:
    def shown(scores: "Scores", name: str) -> str:
        return METRICS[name].shown(scores[language][name].value)

    losses = found.loss.get(language, {})
    return [
        shown(found.base, "chrf"),
        shown(found.adapter, "chrf"),
        _signed(found.difference[language]["chrf"], "chrf"),
        shown(found.adapter_shuffled, "chrf"),
        shown(found.base, "exact"),
        shown(found.adapter, "exact"),
        *(f"{losses[name].value:.2f}" if name in losses else "" for name in LOSSES),
    ]


def drift_table(found: "Drift") -> "Table":
    """A row per layer: CKA and mean cosine between base and adapter."""
    from rich.table import Table

    table = Table(title=f"Hidden states, base to adapter: {found.rows:,} rows of {found.data}, {found.split}")
    for heading in ("layer", "CKA", "cosine"):
        table.add_column(heading, justify="right", overflow="fold")
    for layer, cka, cosine in zip(found.layers, found.cka, found.cosine, strict=True):
        table.add_row("embeddings" if layer == 0 else str(layer), f"{cka:.3f}", f"{cosine:.3f}")
    table.caption = "1: unchanged"
    return table


def _signed(score: Score, name: str) -> str:
    decimals = METRICS[name].decimals
    return f"{score.value:+.{decimals}f} ({score.low:+.{decimals}f} to {score.high:+.{decimals}f})"
