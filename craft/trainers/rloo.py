"""CRAFTRLOOTrainer: TRL's RLOOTrainer with the contrastive objective."""

from trl import RLOOTrainer

from craft.trainers.generated import CRAFTGeneratedMixin


class CRAFTRLOOTrainer(CRAFTGeneratedMixin, RLOOTrainer):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024) with InfoNCE; args a CRAFTRLOOConfig.

    In self_align each prompt is contrasted with the completions that were generated for it.
    """
