"""SFTParams in the words of TRL's SFTConfig."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl import SFTConfig

from craft.config import CRAFTSFTConfig
from inft.training.arguments import on_one_device, shared_arguments
from inft.training.plan import Steps
from params import TrainParams


def of_shared(shared: Mapping[str, Any]) -> SFTConfig:
    """The arguments of supervised fine-tuning with the fields of shared_arguments."""
    config: SFTConfig = CRAFTSFTConfig(
        **shared,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,  # the collator keeps to basic.max_length without cutting image tokens or answers
    )
    return on_one_device(config)


def sft_config(
    params: TrainParams, *, output_dir: Path, steps: Steps, evaluate: bool, anchors: int | None = None
) -> SFTConfig:
    """The arguments of supervised fine-tuning; the keywords are those of shared_arguments."""
    return of_shared(shared_arguments(params, output_dir=output_dir, steps=steps, evaluate=evaluate, anchors=anchors))
