"""Preference rows: their two sides as rows of one answer, and the batches that DPO and ORPO take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from inft.models.collate import IGNORED, CaptionCollator, where
from inft.sample import ImageRef, Sample
from params.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

_OF_TEXTS = ("input_ids", "attention_mask", "labels")  # what ORPO wants apart for the two answers


class _OnceLoaded:
    """An image that both sides of a row share and that is decoded once."""

    def __init__(self, image: ImageRef) -> None:
        self.image = image
        self._loaded: Image | None = None

    def load(self) -> "Image":
        if self._loaded is None:
            self._loaded = self.image.load()
        return self._loaded


def sides(sample: Sample) -> tuple[Sample, Sample]:
    """A preference row as its chosen and its rejected answer; UserError naming a row that has none rejected."""
    if sample.rejected is None:
        raise UserError(f"{where(sample)} has no rejected answer: a preference has a chosen and a rejected one.")
    image = None if sample.image is None else _OnceLoaded(sample.image)
    chosen = replace(sample, image=image, rejected=None)
    return chosen, replace(chosen, answer=sample.rejected)


@dataclass(frozen=True)
class PreferenceCollator:
    """Collates preference rows with the collator of the model family, in one call: the B chosen, then the B rejected.

    Batch, as TRL's DPOTrainer takes it: every tensor of the processor for the 2B rows, images included, and
    ``completion_mask`` [2B, T], 1 on the answer and its end-of-turn token. A news text that must be shortened is
    shortened alike on both sides. Errors: those of the collator.
    """

    collator: CaptionCollator

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return the batch of some preference rows."""
        batch = self._batch(samples)
        batch["completion_mask"] = (batch.pop("labels") != IGNORED).long()
        return batch

    def _batch(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        chosen, rejected = zip(*map(sides, samples), strict=True)
        return self.collator([*chosen, *rejected], answers=2)


class ORPOCollator(PreferenceCollator):
    """PreferenceCollator in the words of TRL's ORPOTrainer.

    Batch: ``chosen_`` and ``rejected_`` with input_ids, attention_mask and labels, each [B, T]; every other tensor of
    the processor under its own name, for the 2B rows.
    """

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return the batch of some preference rows."""
        batch = self._batch(samples)
        texts = {name: batch.pop(name).chunk(2) for name in _OF_TEXTS}
        return {
            **{f"chosen_{name}": chosen for name, (chosen, _) in texts.items()},
            **{f"rejected_{name}": rejected for name, (_, rejected) in texts.items()},
            **batch,
        }
