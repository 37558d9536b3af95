"""CRAFTSFTTrainer: TRL's SFTTrainer with the contrastive objective."""

from trl import SFTTrainer

from craft.trainers.mixin import CRAFTTrainerMixin


class CRAFTSFTTrainer(CRAFTTrainerMixin, SFTTrainer):
    """Supervised fine-tuning with InfoNCE: arguments of SFTTrainer and of CRAFTTrainerMixin; args a CRAFTSFTConfig.

    TRL's own compute_loss makes the SFT part, so that its fused head, DFT, expert loss and metrics stay.
    """
