"""Direct preference optimisation (DPO): the chosen answer is made likelier than the rejected one, against the base."""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from craft.config import CRAFTDPOConfig
from craft.trainers import CRAFTDPOTrainer
from inft.models.preferences import PreferenceCollator, sides
from inft.training.arguments import on_one_device
from inft.training.head import add_compact_head, scores_compactly
from inft.training.methods.method import Method, Setup, check_reference
from inft.training.preference import PreferenceTrainer, forget_reference_copy
from inft.training.rows import RowCollator
from params import TrainParams

_TEXTS = ("input_ids", "attention_mask", "completion_mask")


class DPORunTrainer(PreferenceTrainer, CRAFTDPOTrainer):
    """TRL's DPO loss and loop with CRAFT beside it, on rows with an image or without."""

    def __init__(self, *, model: PeftModel, rows: RowCollator, **run: Any) -> None:
        super().__init__(model=model, rows=rows, data_collator=rows, **run)
        forget_reference_copy(model)
        if not scores_compactly(self.args.device):
            add_compact_head(model.get_base_model())

    def _prepare_dataset(self, dataset: Dataset, *rest: Any) -> Dataset:
        """The numbers of the rows as they are: the collator knows what they stand for."""
        return dataset

    def row_scores(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """TRL's own loss of each row, from one forward pass of the model and one of its reference."""
        inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        outputs = self.model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
        references = self.compute_ref_log_probs(self.model, dict(batch))
        chosen_B, rejected_B = outputs.log_probs.sum(1).chunk(2)
        margins_B = self.beta * ((chosen_B - references[0]) - (rejected_B - references[1]))
        losses = [self._loss_of_pair(batch, outputs, references, row) for row in range(len(margins_B))]
        return torch.stack(losses), margins_B

    def _loss_of_pair(
        self, batch: Mapping[str, Tensor], outputs: FusedCausalLMOutput, references: tuple[Tensor, Tensor], row: int
    ) -> Tensor:
        """TRL's loss of one pair, whose forward passes have been made."""
        count = len(references[0])
        scored = FusedCausalLMOutput(**{name: value[row::count] for name, value in outputs.items() if value.dim()})
        inputs = {name: batch[name][row::count] for name in _TEXTS}
        chosen, rejected = (reference[row : row + 1] for reference in references)
        inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        self.precompute_ref_logps = True
        loss: Tensor = DPOTrainer._compute_loss(self, lambda **kwargs: scored, inputs, return_outputs=False)
        self.precompute_ref_logps = False
        self._metrics["eval"].clear()  # of one pair; what is told is over all of them
        return loss


def trainer(setup: Setup) -> DPORunTrainer:
    """The trainer of a run."""
    preference = setup.params.preference
    args = CRAFTDPOConfig(
        **setup.arguments(),
        beta=preference.dpo_beta,
        loss_type=[preference.dpo_loss_type],
        label_smoothing=preference.label_smoothing,
        max_length=None,  # the collator keeps to basic.max_length without cutting image tokens or answers
        disable_dropout=False,  # lora.dropout says how much
    )
    rows = setup.rows(PreferenceCollator(setup.inputs.collator))
    return DPORunTrainer(args=on_one_device(args), rows=rows, **setup.run())


def words(params: TrainParams) -> dict[str, str]:
    """The method in the plan."""
    preference = params.preference
    smoothing = f", label smoothing {preference.label_smoothing:g}" if preference.label_smoothing else ""
    return {
        "loss": f"{preference.dpo_loss_type}, beta {preference.dpo_beta:g}{smoothing}",
        "reference": "the base model: this one with its adapters turned off",
    }


METHOD = Method(
    title="direct preference optimisation (DPO)",
    trainer=trainer,
    row_kind=lambda params: "preferences",
    words=words,
    check=check_reference,
    sides=sides,
)
