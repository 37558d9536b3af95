"""Method: the contract that each training method fulfils in one file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback

from craft.schedule import EpochPlan
from inft.data.pairs import group_ids
from inft.data.rows import RowKind
from inft.sample import Sample
from inft.training.arguments import shared_arguments
from inft.training.callbacks import BestCallback
from inft.training.captions import heldout_captions
from inft.training.plan import Steps, count_steps
from inft.training.prepare import Inputs
from inft.training.rows import RowCollator
from inft.training.runtrainer import RunTrainer
from params import TrainParams, UserError


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the trainer of a run is made of."""

    params: TrainParams
    inputs: Inputs
    model: PeftModel
    steps: Steps
    best: BestCallback
    callbacks: Sequence[TrainerCallback]
    output_dir: Path

    def arguments(self) -> dict[str, Any]:
        """The fields of the method's arguments that all methods have."""
        pairs = self.inputs.contrast.rows if self.inputs.contrast is not None else None
        loaded = self.inputs.loaded
        anchors = len(loaded.train if pairs is None else pairs)
        evaluate = bool(loaded.heldout)
        return shared_arguments(
            self.params, output_dir=self.output_dir, steps=self.steps, evaluate=evaluate, anchors=anchors
        )

    def rows(self, collator: Callable[[Sequence[Sample]], Any]) -> RowCollator:
        """The rows of the run, made into batches by ``collator``."""
        loaded = self.inputs.loaded
        ids = group_ids(loaded.train) if self.params.craft.enabled else None
        return RowCollator(loaded.train, loaded.heldout, collator, ids=ids)

    def run(self) -> dict[str, Any]:
        """The keywords of RunTrainer but its arguments and rows."""
        return {
            "model": self.model,
            "pairs": self.inputs.contrast.rows if self.inputs.contrast is not None else None,
            "processor": self.inputs.processor,
            "best": self.best,
            "keep_checkpoints": self.params.sft.save_total_limit,
            "captions": heldout_captions(self.params, self.inputs.loaded.heldout, self.inputs.collator),
            "callbacks": self.callbacks,
            "fingerprint": self.inputs.fingerprint,
        }


def one_side(sample: Sample) -> Sequence[Sample]:
    """A row that has one answer."""
    return (sample,)


def counted_as_rows(params: TrainParams, rows: int, *, windows: EpochPlan | None = None, processes: int = 1) -> Steps:
    """The steps of a method whose batches are the rows of the data."""
    return count_steps(params, rows, windows=windows, processes=processes)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What the rest of a run needs to know of how it learns."""

    title: str  # "direct preference optimisation (DPO)": the words in the plan
    trainer: Callable[[Setup], RunTrainer]
    row_kind: Callable[[TrainParams], RowKind]  # what is read of a row
    words: Callable[[TrainParams], Mapping[str, str]]  # what -> how much, in the plan
    check: Callable[[TrainParams], None] = lambda params: None  # UserError for what the parameters cannot mean
    sides: Callable[[Sample], Sequence[Sample]] = one_side  # the rows with one answer that a row of the data stands for
    steps: Callable[..., Steps] = counted_as_rows
    mixes_batches: bool = False  # whether batches of pairs (CRAFT) come between those of the rows, and not beside them


def check_reference(params: TrainParams) -> None:
    """UserError where the model without its adapters is not the base model, which the method compares it with."""
    lora = params.lora
    changed = "lora.init=pissa" if lora.init == "pissa" else f"lora.bias={lora.bias}" if lora.bias != "none" else ""
    if changed:
        raise UserError(
            f"--method {params.method} compares the model with its base by turning the adapters off, and {changed} "
            "changes weights of the base itself: leave it out."
        )
