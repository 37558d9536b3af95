"""PairCollator: pairs in, one contrastive batch of anchors and positives out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from craft.collate import SAMPLE_IDS
from inft.models.collate import IGNORED, CaptionCollator
from inft.sample import Pair, Sample


class PairCollator:
    """Collates the two sides of pairs with the collator of the model family, a call for each side.

    Batch: the processor's tensors of the anchors and, with the suffix ``_tgt``, of the positives; the two sides are
    padded apart. ``craft_pooling_mask`` and ``craft_pooling_mask_tgt`` [pairs, tokens] are true on the answer and its
    end-of-turn token; ``craft_sample_ids`` [pairs] are the ids of the pairs.
    Errors: those of the collator.
    """

    def __init__(self, collator: CaptionCollator) -> None:
        self.collator = collator

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """Return the contrastive batch of some pairs."""
        batch = {
            **self._side([pair.anchor for pair in pairs], ""),
            **self._side([pair.positive for pair in pairs], "_tgt"),
        }
        batch[SAMPLE_IDS] = torch.tensor([pair.id for pair in pairs], dtype=torch.int64)
        return batch

    def lengths(self, pairs: Sequence[Pair]) -> list[int]:
        """Return how many tokens the longer side of each pair has, image tokens included."""
        anchors = self.collator.lengths([pair.anchor for pair in pairs])
        positives = self.collator.lengths([pair.positive for pair in pairs])
        return [max(sides) for sides in zip(anchors, positives, strict=True)]

    def _side(self, samples: Sequence[Sample], suffix: str) -> dict[str, Tensor]:
        batch = self.collator(samples)
        assert len(batch["input_ids"]) == len(samples), "no side is dropped for its length: such pairs are left out"
        batch["craft_pooling_mask"] = batch.pop("labels") != IGNORED
        return {f"{name}{suffix}": tensor for name, tensor in batch.items()}
