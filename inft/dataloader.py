"""The guide's data entry points: a data set of samples, and a DataLoader over it.

from inft.dataloader import MUNIChusLoadConfig, build_processed_dataset
dataset = build_processed_dataset(MUNIChusLoadConfig(data="sample", languages=("ur",)))
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inft.data.batches import Loaded, load_samples
from inft.data.locate import split_names
from inft.data.quarantine import write_quarantine
from inft.sample import Sample
from params.munichus import MUNIChusLoadConfig

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

__all__ = ["MUNIChusLoadConfig", "SampleDataset", "build_dataloader", "build_processed_dataset"]


class SampleDataset:
    """Samples by index, as torch's DataLoader takes them; ``loaded`` says what was left out."""

    def __init__(self, samples: list[Sample], loaded: Loaded):
        self._samples = samples
        self.loaded = loaded

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def build_processed_dataset(
    config: MUNIChusLoadConfig,
    split: str | None = None,
    *,
    with_images: bool = True,
    quarantine_file: Path | None = None,
) -> SampleDataset:
    """Return the checked samples of a split.

    None or ``config.split``: the rows to train on. "validation": the held-out rows, which are the source's own
    validation split or the articles that the training rows leave out. Any other: all rows of that split.

    Bad rows are listed in ``quarantine_file``. Errors: UserError as load_samples and write_quarantine raise it.
    """
    held_out = split in split_names("validation") and config.split not in split_names("validation")
    if split is not None and split != config.split and not held_out:
        config = replace(config, split=split, eval_fraction=0.0)
    loaded = load_samples(config, quarantine_file=quarantine_file, with_images=with_images)
    if quarantine_file is not None:
        write_quarantine(quarantine_file, loaded.bad)
    return SampleDataset(loaded.heldout if held_out else loaded.train, loaded)


def build_dataloader(
    config: MUNIChusLoadConfig, collator: Callable[[list[Sample]], Any], split: str | None = None
) -> "DataLoader[Any]":
    """Return a DataLoader over a split with the configured batch size and workers; training rows are shuffled."""
    from torch import Generator
    from torch.utils.data import DataLoader

    return DataLoader(
        build_processed_dataset(config, split),  # any object with a length and items will do
        batch_size=config.batch_size,
        shuffle=split is None or split == config.split,
        num_workers=config.num_workers,
        collate_fn=collator,
        generator=Generator().manual_seed(config.seed),
    )
