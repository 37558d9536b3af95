"""What a model gives a reference: its loss per row, over the supervised tokens."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from inft.evaluation.generate import evaluating
from inft.evaluation.halving import in_batches
from inft.models.collate import IGNORED, CaptionCollator
from inft.sample import Sample

RowLosses = list[tuple[float, int]]  # nats, supervised tokens


def row_losses(model: Any, collator: CaptionCollator, samples: Sequence[Sample], *, batch_size: int) -> RowLosses:
    """Return the negative log-likelihood of each sample's answer, end of turn included, and how many tokens it has.

    In nats, summed in float32; only positions that some row of a batch supervises are projected on the vocabulary.
    """
    with evaluating(model), torch.no_grad():
        parts = in_batches(samples, batch_size, lambda part: _losses(model, collator, part))
        return [losses for part in parts for losses in part]


def _losses(model: Any, collator: CaptionCollator, samples: Sequence[Sample]) -> RowLosses:
    batch = collator(samples)
    labels_BT = batch.pop("labels")[:, 1:]
    supervised = (labels_BT != IGNORED).any(0).nonzero()[:, 0]
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    logits = model(**inputs, use_cache=False, logits_to_keep=supervised.to(model.device)).logits.float()
    labels_BP = labels_BT[:, supervised].to(logits.device)
    nats_BP = F.cross_entropy(logits.transpose(1, 2), labels_BP, ignore_index=IGNORED, reduction="none")
    tokens_B = (labels_BP != IGNORED).sum(1)
    return list(zip(nats_BP.sum(1).tolist(), tokens_B.tolist(), strict=True))


def fitting(collator: CaptionCollator, samples: Sequence[Sample]) -> list[Sample]:
    """The samples whose row, reference included, fits into max_length once its news text is shortened."""
    bare = [replace(sample, prompt=sample.prompt.with_news("")) for sample in samples]
    lengths = collator.lengths(bare)
    return [sample for sample, length in zip(samples, lengths, strict=True) if length <= collator.max_length]
