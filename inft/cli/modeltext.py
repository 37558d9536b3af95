"""Models and their linear layers as tables."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from params.presets import MODEL_NAMES, TRAINING_MODES, lora_targets
from params.resolve import resolve_train

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from inft.models.modules import LinearGroup
    from inft.models.spec import ModelSpec
    from params import TrainParams


def models_table() -> "Table":
    """A row per family: the word for it, its modes, and each model whose size is known without a hub."""
    from inft.models import load_spec
    from inft.models.modules import meta_model

    table = _table("model", "family", "modes", "weights", right=("parameters",))
    for name in MODEL_NAMES:
        spec = load_spec(name)
        default = resolve_train(name).model_name
        first: tuple[str, str, str] = (name, spec.title, ", ".join(TRAINING_MODES))
        for weights in (*spec.released, ""):
            size = sum(parameter.numel() for parameter in meta_model(spec, weights).parameters())
            note = " (default)" if weights == default else "" if weights else "embedded (--demo)"
            table.add_row(*first, weights + note, _short(size))
            first = ("", "", "")
        table.add_section()
    return table


def layers_table(groups: Iterable["LinearGroup"], *, title: str) -> "Table":
    """A row per group of linear layers with the same name up to their numbers."""
    table = _table("part", "linear layers", "inputs → outputs", right=("count",))
    table.title = f"linear layers of {title}"
    before = None
    for group in groups:
        if before not in (None, group.part):
            table.add_section()
        shapes = ", ".join(f"{inputs:,} → {outputs:,}" for inputs, outputs in group.shapes)
        table.add_row(group.part if group.part != before else "", group.pattern, shapes, f"{group.count:,}")
        before = group.part
    return table


def adapters_table(model: "nn.Module", spec: "ModelSpec", runs: Sequence["TrainParams"]) -> "Table":
    """A row per part and a pair of columns per run (one run per mode): layers adapted, parameters trained."""
    from inft.training.adapters import coverage

    table = _table("part", right=("layers", *(column for run in runs for column in _columns(run))))
    table.title = f"what gets adapters (LoRA rank {runs[0].lora.r})"
    covered = [
        coverage(model, spec, lora_targets(run.model, run.training_mode, run.lora), lora=run.lora) for run in runs
    ]
    sums: Counter[int] = Counter()
    for rows in zip(*covered, strict=True):
        cells = [rows[0].part, f"{rows[0].total:,}"]
        for index, row in enumerate(rows):
            cells += [f"{row.adapted:,}", f"{row.trainable_parameters:,}"]
            sums.update({0: row.total if index == 0 else 0, 2 * index + 1: row.adapted})
            sums.update({2 * index + 2: row.trainable_parameters})
        table.add_row(*cells)
    table.add_section()
    table.add_row("all", *(f"{sums[column]:,}" for column in range(2 * len(runs) + 1)))
    return table


def _columns(run: "TrainParams") -> tuple[str, str]:
    return run.training_mode, f"{run.training_mode}: trained"


def _table(*left: str, right: Sequence[str]) -> "Table":
    from rich.table import Table

    table = Table(header_style="bold", title_justify="left")
    for heading in left:
        table.add_column(heading, overflow="fold")
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def _short(count: int) -> str:
    """A number of parameters in billions or millions."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
