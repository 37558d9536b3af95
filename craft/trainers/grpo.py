"""CRAFTGRPOTrainer: TRL's GRPOTrainer with the contrastive objective."""

from trl import GRPOTrainer

from craft.trainers.generated import CRAFTGeneratedMixin


class CRAFTGRPOTrainer(CRAFTGeneratedMixin, GRPOTrainer):
    """Group relative policy optimisation (Shao et al. 2024) with InfoNCE; args a CRAFTGRPOConfig.

    In self_align each prompt is contrasted with the completions that were generated for it.
    """
