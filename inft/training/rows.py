"""The rows of a run as a Trainer wants them: a column of numbers, and a collator that knows what they stand for."""

import signal
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import get_worker_info

from inft.sample import Sample

ROWS = "rows"  # key of a held-out batch: the number of each row


class RowCollator:
    """Looks up numbered rows and collates them; held-out batches carry the row numbers under ``rows``.

    The Dataset that a Trainer wants is then a column of numbers, and samples stay Python objects.
    """

    def __init__(self, samples: Sequence[Sample], heldout: Sequence[Sample], collator: Any) -> None:
        self.rows = [*samples, *heldout]
        self.first_heldout = len(samples)
        self.collator = collator

    def __call__(self, features: Sequence[Mapping[str, int]]) -> dict[str, torch.Tensor]:
        """Return the batch of some rows of the column."""
        if get_worker_info() is not None:
            # A scheduler signals the whole process group; the main process decides when to stop.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        numbers = [feature["row"] for feature in features]
        batch: dict[str, torch.Tensor] = self.collator([self.rows[number] for number in numbers])
        if numbers[0] >= self.first_heldout:
            batch[ROWS] = torch.tensor(numbers)
        return batch

    def train_dataset(self) -> Dataset:
        """The numbers of the training rows."""
        return Dataset.from_dict({"row": range(self.first_heldout)})

    def heldout_dataset(self) -> Dataset | None:
        """The numbers of the held-out rows; None without any."""
        heldout = range(self.first_heldout, len(self.rows))
        return Dataset.from_dict({"row": heldout}) if heldout else None
