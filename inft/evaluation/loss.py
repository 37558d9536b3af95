"""What a model gives a reference: its loss per row, over the supervised tokens."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from inft.evaluation.generate import evaluating
from inft.models.collate import IGNORED, CaptionCollator
from inft.sample import Sample

RowLosses = list[tuple[float, int]]  # nats, supervised tokens


def row_losses(model: Any, collator: CaptionCollator, samples: Sequence[Sample], *, batch_size: int) -> RowLosses:
    """Return the negative log-likelihood of each sample's answer, end of turn included, and how many tokens it has.

    In nats, summed in float32; only positions that some row of a batch supervises are projected on the vocabulary.
    """
    found: RowLosses = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(samples), batch_size):
            batch = collator(samples[start : start + batch_size])
            labels_BT = batch.pop("labels")[:, 1:]
            supervised = (labels_BT != IGNORED).any(0).nonzero()[:, 0]
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            logits = model(**inputs, use_cache=False, logits_to_keep=supervised.to(model.device)).logits.float()
            labels_BP = labels_BT[:, supervised].to(logits.device)
            nats_BP = F.cross_entropy(logits.transpose(1, 2), labels_BP, ignore_index=IGNORED, reduction="none")
            tokens_B = (labels_BP != IGNORED).sum(1)
            found += list(zip(nats_BP.sum(1).tolist(), tokens_B.tolist(), strict=True))
    return found
