"""CRAFTDPOTrainer: TRL's DPOTrainer with the contrastive objective."""

from collections.abc import Mapping
from typing import Any

import torch
from trl import DPOTrainer

from craft.collate import SAMPLE_IDS
from craft.preferences import check_preferences, check_reference, given_datasets
from craft.trainers.joint import Answers, CRAFTJointMixin, answers_of


class CRAFTDPOTrainer(CRAFTJointMixin, DPOTrainer):
    """Direct preference optimisation (Rafailov et al. 2023) with InfoNCE; args a CRAFTDPOConfig.

    In self_align each prompt is contrasted with its chosen answer, in the forward pass that scores both answers.
    Errors: ValueError for rows that are no preferences (check_preferences) and for a reference model with another
    vocabulary.
    """

    def __init__(self, model: Any, ref_model: Any = None, *args: Any, **kwargs: Any) -> None:
        check_preferences(*given_datasets(DPOTrainer, (model, ref_model, *args), kwargs))
        check_reference(model, ref_model)
        super().__init__(model, ref_model, *args, **kwargs)
        check_reference(self.model, ref_model)  # of a model that was a path

    def _craft_answers(self, inputs: Mapping[str, Any]) -> Answers:
        count = len(inputs["input_ids"]) // 2  # the chosen ones are the first half of the rows
        names = ("input_ids", "attention_mask", "completion_mask")
        return answers_of(
            inputs,
            **{f"{name}_BT": inputs[name][:count] for name in names},
            rows=torch.arange(count, device=inputs["input_ids"].device),
            sample_ids_B=inputs.get(SAMPLE_IDS),
        )
