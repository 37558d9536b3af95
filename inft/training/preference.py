"""PreferenceTrainer: what DPO and ORPO share: their held-out evaluation, row by row, and the model's own reference."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from inft.training.rows import ROWS
from inft.training.runtrainer import RunTrainer

REFERENCE = "ref"  # TRL's name for its copy of the adapters


class PreferenceTrainer(RunTrainer):
    """Stands before a trainer of preferences; a subclass scores the rows of a batch in ``row_scores``."""

    @abstractmethod
    def row_scores(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The method's loss of each row [B], and the reward of its chosen less that of its rejected answer [B]."""

    def score_heldout(self, eval_dataset: Any, prefix: str) -> dict[str, float]:
        """The mean loss of the held-out rows whatever the batch size, per language besides; and how they are ranked.

        ``rewards/accuracies`` is the share of rows whose chosen answer has the higher reward, ``rewards/margins`` the
        mean difference. TRL averages the means of batches, so that a row counts more in a small batch.
        """
        found: dict[int, list[float]] = {}
        batches = self.get_eval_dataloader(eval_dataset)
        self.model.eval()
        for batch in batches:
            numbers_B = batch.pop(ROWS)
            with torch.no_grad(), self.accelerator.autocast():
                scores_B2 = torch.stack(self.row_scores(self._prepare_inputs(dict(batch))), dim=1).double()
            numbers, scores = self.accelerator.gather((numbers_B.to(scores_B2.device), scores_B2))
            # Of several processes, all get as many rows: the last batch is filled up with rows seen before.
            found |= dict(zip(numbers.tolist(), scores.tolist(), strict=True))
        losses: dict[str, list[float]] = {}
        for number, (loss, _) in found.items():
            losses.setdefault(self.rows.rows[number].language, []).append(loss)
        margins = [margin for _, margin in found.values()]
        return {
            f"{prefix}_loss": sum(map(sum, losses.values())) / len(found),
            f"{prefix}_rewards/accuracies": sum(margin > 0 for margin in margins) / len(found),
            f"{prefix}_rewards/margins": sum(margins) / len(found),
            **{f"{prefix}_loss_{code}": sum(part) / len(part) for code, part in sorted(losses.items())},
            f"{prefix}_rows": len(found),
        }


def forget_reference_copy(model: PeftModel) -> None:
    """Delete the copy of the adapters that TRL compares with: fresh adapters add nothing, so the base is the same.

    Without the copy the reference is the model with its adapters turned off, and no copy is saved.
    """
    if REFERENCE in model.peft_config:
        model.delete_adapter(REFERENCE)
