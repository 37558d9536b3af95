"""CRAFTRewardTrainer: TRL's RewardTrainer with the contrastive objective of pairs."""

from collections.abc import Mapping
from typing import Any

from trl import RewardTrainer

from craft.preferences import check_preferences, given_datasets
from craft.trainers.joint import Answers, CRAFTJointMixin


class CRAFTRewardTrainer(CRAFTJointMixin, RewardTrainer):
    """Reward modelling (Bradley and Terry 1952) with InfoNCE of pairs; args a CRAFTRewardConfig.

    Its rows do not tell prompt from answer: self_align is refused.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_preferences(*given_datasets(RewardTrainer, args, kwargs))
        super().__init__(*args, **kwargs)
        if self.craft_enabled and self.craft_bundle.strategy == "self_align":
            raise ValueError(
                "CRAFTRewardTrainer has no self_align: TRL's rows of a reward model do not say where the prompt ends. "
                "Pass pairs: contrastive_dataset=…"
            )

    def _craft_answers(self, inputs: Mapping[str, Any]) -> Answers:
        raise AssertionError("self_align was refused")
