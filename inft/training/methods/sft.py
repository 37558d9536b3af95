"""Supervised fine-tuning: the answers of the rows are learnt word by word."""

from craft.config import CRAFTSFTConfig
from inft.training.arguments import on_one_device
from inft.training.methods.method import Method, Setup
from inft.training.sft import SFT_ONLY
from inft.training.trainer import CaptionTrainer


def trainer(setup: Setup) -> CaptionTrainer:
    """The trainer of a run."""
    args = on_one_device(CRAFTSFTConfig(**setup.arguments(), **SFT_ONLY))
    return CaptionTrainer(args=args, rows=setup.rows(setup.inputs.collator), **setup.run())


METHOD = Method(
    title="supervised fine-tuning (SFT)",
    trainer=trainer,
    row_kind=lambda params: "captions",
    words=lambda params: {},
    mixes_batches=True,
)
