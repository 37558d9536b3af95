"""The parameters of runs side by side, their differences marked, and the settings of evaluations."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from inft.evaluation.report_compare import Comparison
from inft.evaluation.report_runs import Run
from inft.evaluation.report_tables import Cell, Table, run_heads
from inft.evaluation.verdict import UNKNOWN
from params import TrainParams
from params.check import SECTIONS
from params.describe import describe
from params.presets import MODEL_FIELDS, OUTPUT_FIELDS

OWN_FIELDS = (
    "model",
    "training_mode",
    "method",
    "demo",
    "model_name",
    "processor_name",
    "task",
    "output_dir",
    "best_model_dir",
)
# In the full list only: directories, which always differ, and the fields of every family and mode, of which the run's
# own are said by model_name and processor_name.
LONG_LIST = {
    "output_dir",
    "best_model_dir",
    *(f"basic.{name}" for names in MODEL_FIELDS.values() for name in names),
    *(f"sft.{name}" for names in OUTPUT_FIELDS.values() for name in names),
}


def parameters(runs: Sequence[Run], colours: Mapping[str, str]) -> tuple[Table, Table]:
    """The parameters of the trained runs: those that differ or are not the default, and all of them."""
    trained = [run for run in runs if run.training is not None]
    flat = [_flat(run.training.params) for run in trained if run.training is not None]
    heads = [Cell(text="parameter"), Cell(text="default"), *run_heads(trained, colours)]
    rows = {name: _parameter(name, [values[name] for values in flat]) for name in _defaults()}
    differ = {name for name in rows if _differs([values[name] for values in flat])}
    changed = {name for name, default in _defaults().items() if any(values[name] != default for values in flat)}
    first = sorted((differ | changed) - LONG_LIST, key=lambda name: (name not in differ, list(rows).index(name)))
    return (
        Table(title="Parameters that differ or are not the default", head=heads, rows=[rows[name] for name in first]),
        Table(title="All parameters", head=heads, rows=list(rows.values())),
    )


def _parameter(name: str, values: Sequence[Any]) -> list[Cell]:
    differ, default = _differs(values), _defaults()[name]
    cells = [Cell(text=_words(value), mark="differs" if differ else "") for value in values]
    first = Cell(text=name, heading=True, hint=_helps().get(name, ""), mark="differs" if differ else "")
    return [first, Cell(text="" if name in OWN_FIELDS else _words(default)), *cells]


def _differs(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _flat(params: TrainParams) -> dict[str, Any]:
    """Dotted name -> value; the run's own fields first."""
    plain = asdict(params)
    sections = {f"{section}.{name}": value for section in SECTIONS for name, value in plain[section].items()}
    return {**{name: plain[name] for name in OWN_FIELDS}, **sections}


def _defaults() -> dict[str, Any]:
    """The same names with their defaults; None for a run's own fields, which have none."""
    sections = {f"{name}.{key}": value for name, cls in SECTIONS.items() for key, value in asdict(cls()).items()}
    return {**dict.fromkeys(OWN_FIELDS), **sections}


def _helps() -> dict[str, str]:
    return {text.name: text.help for section in SECTIONS for text in describe(section)}


def _words(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {entry}" for key, entry in value.items()) or "none"
    if isinstance(value, (tuple, list)):
        return ", ".join(str(entry) for entry in value) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value) or "(empty)"


def settings(comparison: Comparison) -> Table:
    """How the captions of each system were generated."""
    records = [system.stored.evaluation for system in comparison.systems]
    names = list(dict.fromkeys(name for record in records for name in record.generation))
    rows = [
        [
            Cell(text=system.label, colour=system.colour, heading=True),
            Cell(text=record.setting),
            Cell(text=UNKNOWN if record.step is None else str(record.step)),
            *(Cell(text=_words(record.generation.get(name))) for name in names),
        ]
        for system, record in zip(comparison.systems, records, strict=True)
    ]
    heads = ("system", "prompt", "step", *(name.replace("_", " ") for name in names))
    return Table(title="How the captions were generated", head=[Cell(text=head) for head in heads], rows=rows)
