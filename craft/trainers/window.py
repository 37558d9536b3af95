"""What the micro-batches of one optimizer step hold together, and what each of them therefore weighs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from craft.mixing import BATCH_TYPE

SFT, CONTRASTIVE = "sft", "contrastive"
TASKS = (SFT, CONTRASTIVE)


@dataclass(kw_only=True)
class Window:
    """Counts over the micro-batches of one optimizer step."""

    sft_items: Tensor | int | None = None  # label tokens on all ranks; None: the trainer's loss is a micro-batch mean
    sft_batches: int = 1  # of this rank
    anchors: int | None = None  # on all ranks; None: unknown, each micro-batch then counts for itself
    contrastive_batches: int = 1  # of this rank

    def batches(self, task: str) -> int:
        """Micro-batches of a task on this rank."""
        return self.sft_batches if task == SFT else self.contrastive_batches


def task_of(batch: Any) -> str:
    """Whose loss a micro-batch is for; what no mixed loader has tagged is the trainer's own."""
    tagged = isinstance(batch, Mapping) and batch.get(BATCH_TYPE, SFT) != SFT
    return CONTRASTIVE if tagged else SFT
