"""CRAFTORPOTrainer: TRL's ORPOTrainer with the contrastive objective, for images too."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from craft.collate import SAMPLE_IDS
from craft.preferences import check_labels, check_preferences, given_datasets
from craft.trainers.joint import Answers, CRAFTJointMixin, answers_of, has_images

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it is experimental: the constraints of this project name the version
    from trl.experimental.orpo import ORPOTrainer

_OF_TEXTS = ("chosen_", "rejected_", "prompt_")  # columns of the two answers and their prompt, in ORPO's words


class CRAFTORPOTrainer(CRAFTJointMixin, ORPOTrainer):
    """Odds ratio preference optimisation (Hong et al. 2024) with InfoNCE; args a CRAFTORPOConfig.

    In self_align each prompt is contrasted with its chosen answer, in the forward pass that scores both answers. What a
    batch holds beside its texts, such as pixel_values of all 2B rows, is given to the model, unlike in TRL's trainer.
    The likelihood of the chosen side is then that of its answer (eq. 6 of the paper), as with ``nll_of_answers`` set:
    TRL's is of the prompt too, where image tokens cannot be learned.
    Errors: ValueError for rows that are no preferences (check_preferences), or whose answers max_length cuts away.
    """

    nll_of_answers = False  # True: for texts without images too

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_preferences(*given_datasets(ORPOTrainer, args, kwargs))
        super().__init__(*args, **kwargs)
        check_labels(self.train_dataset)

    def concatenated_forward(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """Score chosen and rejected answers in one pass, with everything that the batch has for the model."""
        beside = {name: value for name, value in batch.items() if _is_for_the_model(name, value)}
        if not self.nll_of_answers and not has_images(beside):
            return super().concatenated_forward(partial(model, **beside), batch)
        joined = self.concatenated_inputs(batch, padding_value=self.padding_value, device=self.accelerator.device)
        # TRL takes the likelihood where the attention mask is 1: it is shown the answers, and the model its own mask.
        marks = {f"{side}_attention_mask": (batch[f"{side}_labels"] != -100).long() for side in ("chosen", "rejected")}

        def scored(input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
            return model(input_ids, attention_mask=joined["concatenated_attention_mask"], **beside, **options)

        return super().concatenated_forward(scored, {**batch, **marks})

    def _craft_answers(self, inputs: Mapping[str, Any]) -> Answers:
        ids_BT, real_BT, labels_BT = (inputs[f"chosen_{name}"] for name in ("input_ids", "attention_mask", "labels"))
        width = max(ids_BT.shape[1], inputs["rejected_input_ids"].shape[1])  # of the pass over both
        ids_BT, real_BT, labels_BT = (
            pad(tensor, (0, width - ids_BT.shape[1]), value=value)
            for tensor, value in ((ids_BT, 0), (real_BT, 0), (labels_BT, -100))
        )
        return answers_of(
            inputs,
            input_ids_BT=ids_BT,
            attention_mask_BT=real_BT,
            completion_mask_BT=labels_BT != -100,
            rows=torch.arange(len(ids_BT), device=ids_BT.device),
            sample_ids_B=inputs.get(SAMPLE_IDS),
        )


def _is_for_the_model(name: str, value: Any) -> bool:
    return name == "output_hidden_states" or (isinstance(value, Tensor) and not name.startswith(_OF_TEXTS))
