"""CRAFTPPOTrainer: our PPOTrainer with the contrastive objective. TRL's own PPO was removed in 2026."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from craft.collate import SAMPLE_IDS
from craft.ppo.experience import Batch
from craft.ppo.trainer import PPOTrainer, Row
from craft.trainers.joint import Answers, CRAFTJointMixin, has_images

__all__ = ["CRAFTPPOTrainer", "PPOTrainer"]


class CRAFTPPOTrainer(CRAFTJointMixin, PPOTrainer):
    """PPOTrainer with InfoNCE; args a CRAFTPPOConfig.

    In self_align each prompt is contrasted with its sampled completion, again in every PPO epoch; completions of one
    prompt are no negatives of each other.
    """

    _craft_generates = True

    def _roll_out(self, rows: Sequence[Row]) -> list[Batch]:
        batches = super()._roll_out(rows)
        if self.craft_enabled and self._craft_self_aligned:
            remaining = iter(rows)
            for batch in batches:
                part = islice(remaining, len(batch["input_ids"]))
                ids = self._craft_sample_ids(list(part), with_images=has_images(batch))
                batch[SAMPLE_IDS] = torch.tensor(ids, device=self.args.device)
        return batches

    def _craft_answers(self, inputs: Mapping[str, Any]) -> Answers:
        answer_BT = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
        answer_BT[:, -inputs["completion_mask"].shape[1] :] = inputs["completion_mask"]
        return Answers(
            input_ids_BT=inputs["input_ids"],
            prompt_BT=inputs["attention_mask"].bool() & ~answer_BT,
            answer_BT=answer_BT,
            sample_ids_B=inputs.get(SAMPLE_IDS),
            prompts_tell=not has_images(inputs),
        )
