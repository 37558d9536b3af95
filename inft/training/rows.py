"""The rows and pairs of a run as a Trainer wants them: numbers, and a collator that knows what they stand for."""

import signal
from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch.utils.data import get_worker_info

from craft.collate import SAMPLE_IDS
from inft.sample import Pair, Sample
from params import TrainParams

if TYPE_CHECKING:
    from inft.models.collate import CaptionCollator
    from inft.models.pairs import PairCollator

ROWS = "rows"  # key of a held-out batch: the number of each row


class RowCollator:
    """Looks up numbered rows and collates them; held-out batches carry the row numbers under ``rows``.

    The Dataset that a Trainer wants is then a column of numbers, and samples stay Python objects. With ``ids``, one for
    each training row, training batches carry them under ``craft_sample_ids``: rows of equal ids
    are no negatives of each other (CRAFT).
    """

    def __init__(
        self, samples: Sequence[Sample], heldout: Sequence[Sample], collator: Any, *, ids: Sequence[int] | None = None
    ) -> None:
        assert ids is None or len(ids) == len(samples), "an id for each training row"
        self.rows = [*samples, *heldout]
        self.first_heldout = len(samples)
        self.collator = collator
        self.ids = ids

    def __call__(self, features: Sequence[Mapping[str, int]]) -> dict[str, torch.Tensor]:
        """Return the batch of some rows of the column."""
        leave_signals_to_the_main_process()
        numbers = [feature["row"] for feature in features]
        batch: dict[str, torch.Tensor] = self.collator([self.rows[number] for number in numbers])
        if numbers[0] >= self.first_heldout:
            batch[ROWS] = torch.tensor(numbers)
        elif self.ids is not None:
            batch[SAMPLE_IDS] = torch.tensor([self.ids[number] for number in numbers], dtype=torch.int64)
        return batch

    def train_dataset(self) -> Dataset:
        """The numbers of the training rows."""
        return Dataset.from_dict({"row": range(self.first_heldout)})

    def heldout_dataset(self) -> Dataset | None:
        """The numbers of the held-out rows; None without any."""
        heldout = range(self.first_heldout, len(self.rows))
        return Dataset.from_dict({"row": heldout}) if heldout else None


def prompt_collator(collator: "CaptionCollator", params: TrainParams) -> "CaptionCollator":
    """The collator with prompts that leave room for the longest answer within basic.max_length."""
    fitting = copy(collator)  # which counts what it shortens with the other
    fitting.max_length = params.basic.max_length - params.rl.max_completion_length
    return fitting


class PairRows:
    """The pairs of a run as a map-style data set, with the collator of their batches in ``collate``."""

    def __init__(self, pairs: Sequence[Pair], collator: "PairCollator") -> None:
        self.pairs = pairs
        self.collator = collator

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> Pair:
        return self.pairs[number]

    def collate(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        """Return the contrastive batch of some pairs."""
        leave_signals_to_the_main_process()
        return self.collator(pairs)


def leave_signals_to_the_main_process() -> None:
    """In a DataLoader's worker: a scheduler signals the whole process group, and the main process decides to stop."""
    if get_worker_info() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
