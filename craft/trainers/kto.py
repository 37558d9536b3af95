"""CRAFTKTOTrainer: TRL's KTOTrainer with the contrastive objective."""

from collections.abc import Mapping
from typing import Any

from trl import KTOTrainer

from craft.collate import SAMPLE_IDS
from craft.preferences import check_labelled, check_reference, given_datasets
from craft.trainers.joint import Answers, CRAFTJointMixin, answers_of


class CRAFTKTOTrainer(CRAFTJointMixin, KTOTrainer):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024) with InfoNCE; args a CRAFTKTOConfig.

    In self_align each prompt is contrasted with its answer where the row is labelled as desirable.
    Errors: ValueError for rows with an empty prompt or answer, and for a reference model with another vocabulary.
    """

    def __init__(self, model: Any, ref_model: Any = None, *args: Any, **kwargs: Any) -> None:
        check_labelled(*given_datasets(KTOTrainer, (model, ref_model, *args), kwargs))
        check_reference(model, ref_model)
        super().__init__(model, ref_model, *args, **kwargs)
        check_reference(self.model, ref_model)  # of a model that was a path

    def _craft_answers(self, inputs: Mapping[str, Any]) -> Answers:
        rows = inputs["label"].bool().nonzero()[:, 0]
        names, ids_B = ("input_ids", "attention_mask", "completion_mask"), inputs.get(SAMPLE_IDS)
        return answers_of(
            inputs,
            **{f"{name}_BT": inputs[name][rows] for name in names},
            rows=rows,
            sample_ids_B=None if ids_B is None else ids_B[rows],
        )
