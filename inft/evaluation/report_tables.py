"""The tables of a report as plain cells: the summary, the scores per language, drift."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from inft.evaluation.metrics import ALL, METRICS, Metric
from inft.evaluation.report_compare import Comparison, System
from inft.evaluation.report_runs import Run, Training
from inft.evaluation.verdict import UNKNOWN, figure, interval
from inft.training.logfiles import Event


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table."""

    text: str
    note: str = ""  # in smaller letters after it: an interval, a code
    mark: str = ""  # "best", "differs", "bad": shown by more than a colour
    colour: str = ""  # of a patch before the text
    rows: int = 1  # that it spans
    heading: bool = False  # of its row
    number: bool = False
    hint: str = ""  # shown on pointing at it


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with its title."""

    title: str
    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]


def run_heads(runs: Sequence[Run], colours: Mapping[str, str]) -> list[Cell]:
    """A column's heading for each run."""
    return [Cell(text=run.label, colour=colours[run.label]) for run in runs]


def summary(runs: Sequence[Run], compared: Sequence[Comparison], colours: Mapping[str, str]) -> Table:
    """What each run is, how it went and what it came to."""
    fields = {
        "directory": [str(run.directory) for run in runs],
        "model": [_model(run) for run in runs],
        "base": [_base(run) for run in runs],
        "data": [_data(run.training) for run in runs],
        "adapter": [_adapter(run.training) for run in runs],
        "stored step": [_best(run) for run in runs],
        "status": [run.training.status if run.training else UNKNOWN for run in runs],
        "duration": [_duration(run.training.seconds if run.training else None) for run in runs],
        "CRAFT": [_craft(run.training) for run in runs],
    }
    rows = [[Cell(text=name, heading=True), *(Cell(text=text) for text in texts)] for name, texts in fields.items()]
    rows += [_overall(comparison, runs) for comparison in compared if comparison.scored]
    return Table(title="Runs", head=[Cell(text=""), *run_heads(runs, colours)], rows=rows)


def _overall(comparison: Comparison, runs: Sequence[Run]) -> list[Cell]:
    """The first metric of all rows, before and after, for each run."""
    metric = METRICS["chrf"]

    def shown(systems: Iterable[System]) -> list[str]:
        scores = [system.stored.scores.get(ALL, {}).get("chrf") for system in systems]
        return [figure(score.value, metric) for score in scores if score is not None]

    cells = []
    for run in runs:
        own = [system for system in comparison.scored if system.run is run]
        base = [one for one in comparison.scored if one.run is None and one.base in {after.base for after in own}]
        after = shown(own[:1])
        cells.append(Cell(text=" → ".join([*shown(base[:1]), *after]) if after else UNKNOWN))
    return [Cell(text=f"{metric.title}, all rows", note=comparison.title, heading=True), *cells]


def _model(run: Run) -> str:
    if run.training is not None:
        return f"{run.training.params.model}, {run.training.params.training_mode}"
    return run.evaluations[0].evaluation.model


def _base(run: Run) -> str:
    name = run.training.params.model_name if run.training else run.evaluations[0].evaluation.base_model
    return name or "the embedded tiny model"


def _data(training: Training | None) -> str:
    if training is None:
        return UNKNOWN
    start: Event = next((event for event in training.events if event.get("event") == "run_start"), {})
    data = start.get("data") or {}
    rows = data.get("rows_per_language") or {}
    source = training.params.data.data or data.get("source") or "munichus"
    if not rows:
        return f"{source}: {', '.join(training.params.data.languages)}"
    train = sum(of_language[0] for of_language in rows.values())  # of (train, held out)
    return f"{source}: {train:,} rows in {', '.join(rows)}"


def _adapter(training: Training | None) -> str:
    if training is None:
        return UNKNOWN
    lora = training.params.lora
    kind = f"{'QLoRA' if training.params.qlora.load_in_4bit else 'LoRA'} r {lora.r}, alpha {lora.alpha}"
    if training.adapter is None:
        return f"{kind}; none is stored yet"
    return f"{training.adapter.parameters:,} parameters ({kind})"


def _best(run: Run) -> str:
    if run.training is None:
        step = run.evaluations[0].evaluation.step
        return UNKNOWN if step is None else str(step)
    record = (run.training.adapter.record if run.training.adapter else None) or {}
    if record.get("step") is None:
        return UNKNOWN
    if record.get("value") is None:
        return f"{record['step']}, the last"
    name = str(record.get("metric")).removeprefix("eval_")
    metric = METRICS.get(name, Metric(title=f"evaluation {name}", decimals=4))
    return f"{record['step']}, {metric.title} {figure(float(record['value']), metric)}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min {seconds % 60:.0f} s" if hours < 1 else f"{int(hours)} h {minutes % 60:.0f} min"


def _craft(training: Training | None) -> str:
    if training is None:
        return UNKNOWN
    craft = training.params.craft
    if not craft.enabled:
        return "off"
    return f"on: {craft.preset or 'own settings'}, alpha {craft.alpha}, {craft.pairs or 'prompt against answer'}"


def scores(comparison: Comparison) -> Table:
    """Every figure of every scored system, language by language."""
    systems = comparison.scored
    names = [name for name in METRICS if any(name in of for one in systems for of in one.stored.scores.values())]
    rows: list[list[Cell]] = []
    for language in [*comparison.languages, ALL]:
        with_rows = [system for system in systems if language in system.stored.scores]
        for number, system in enumerate(with_rows):
            first = [language_cell(language, comparison.names, rows=len(with_rows))] if number == 0 else []
            cells = [_score(language, name, system, with_rows) for name in names]
            rows.append([*first, Cell(text=system.label, colour=system.colour), *cells])
    heads = [Cell(text=METRICS[name].title, number=True) for name in names]
    return Table(title="Scores", head=[Cell(text="language"), Cell(text="system"), *heads], rows=rows)


def language_cell(language: str, names: Mapping[str, str], *, rows: int = 1) -> Cell:
    """The heading of a language's rows."""
    if language == ALL:
        return Cell(text="all languages", heading=True, rows=rows)
    return Cell(text=names.get(language, language), note=language, heading=True, rows=rows)


def _score(language: str, name: str, system: System, among: Sequence[System]) -> Cell:
    found = system.stored.scores[language].get(name)
    if found is None:
        return Cell(text=UNKNOWN, number=True)
    return Cell(
        text=figure(found.value, METRICS[name]),
        note=interval(found, METRICS[name]),
        mark="best" if _is_best(found.value, language, name, among) else "",
        number=True,
    )


def _is_best(value: float, language: str, name: str, among: Sequence[System]) -> bool:
    """Whether no other system has as good a value."""
    higher = METRICS[name].higher_is_better
    found = [of[name].value for one in among if name in (of := one.stored.scores[language])]
    values = [one for one in found if not math.isnan(one)]
    if higher is None or len(values) < 2:
        return False
    best = max(values) if higher else min(values)
    return value == best and values.count(best) == 1


def drift(systems: Sequence[System]) -> Table:
    """How alike base and adapter are in each layer."""
    found = [(system, system.stored.drift) for system in systems if system.stored.drift is not None]
    layers = sorted({layer for _, of in found for layer in of.layers})
    heads = [
        Cell(text=system.label, note=measure, colour=system.colour, number=True)
        for system, _ in found
        for measure in ("CKA", "cosine")
    ]
    rows = []
    for layer in layers:
        cells = []
        for _, of in found:
            at = of.layers.index(layer) if layer in of.layers else None
            cells += [Cell(text=UNKNOWN if at is None else f"{of.cka[at]:.3f}", number=True)]
            cells += [Cell(text=UNKNOWN if at is None else f"{of.cosine[at]:.3f}", number=True)]
        rows.append([Cell(text=f"{layer}" if layer else "0, embeddings", heading=True), *cells])
    return Table(title="Drift per layer", head=[Cell(text="layer"), *heads], rows=rows)
