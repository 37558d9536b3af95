"""Supervised fine-tuning: the answers of the rows are learnt word by word."""

from inft.training.methods.method import Method, Setup
from inft.training.sft import of_shared
from inft.training.trainer import CaptionTrainer


def trainer(setup: Setup) -> CaptionTrainer:
    """The trainer of a run."""
    return CaptionTrainer(args=of_shared(setup.arguments()), rows=setup.rows(setup.inputs.collator), **setup.run())


METHOD = Method(
    title="supervised fine-tuning (SFT)",
    trainer=trainer,
    row_kind=lambda params: "captions",
    words=lambda params: {},
    mixes_batches=True,
)
