"""Odds ratio preference optimisation (ORPO): fine-tuning on the chosen answer with a penalty for the rejected one."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset

from craft.config import CRAFTORPOConfig
from craft.trainers import CRAFTORPOTrainer
from inft.models.preferences import ORPOCollator, sides
from inft.models.templates import tokenizer_of
from inft.training.arguments import on_one_device
from inft.training.head import add_compact_head
from inft.training.methods.method import Method, Setup
from inft.training.preference import PreferenceTrainer
from inft.training.rows import RowCollator
from params import TrainParams

_TEXTS = tuple(
    f"{side}_{name}" for side in ("chosen", "rejected") for name in ("input_ids", "attention_mask", "labels")
)


class RowNumbers(Dataset):
    """The numbers of some rows, which the collator knows: there is nothing in them for ORPO to tokenise."""

    def __init__(self, numbers: range) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> dict[str, int]:
        return {"row": self.numbers[place]}

    def map(self, function: Callable[..., Any], **options: Any) -> "RowNumbers":
        """Itself."""
        return self


class ORPORunTrainer(PreferenceTrainer, CRAFTORPOTrainer):
    """TRL's ORPO loss and loop with CRAFT beside it, on rows with an image or without."""

    nll_of_answers = True  # as in the paper and in fine-tuning; TRL's is of the prompt too

    def __init__(self, *, model: PeftModel, rows: RowCollator, **run: Any) -> None:
        heldout = range(rows.first_heldout, len(rows.rows))
        super().__init__(
            model=model,
            rows=rows,
            data_collator=rows,
            train_dataset=RowNumbers(range(rows.first_heldout)),
            eval_dataset=RowNumbers(heldout) if heldout else None,
            **run,
        )
        add_compact_head(model.get_base_model())  # which the guards score with
        self._total_train_tokens = 0

    def row_scores(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """TRL's own loss of each row, from one forward pass."""
        passes: list[Tensor] = []

        def remembering(*args: Any, **kwargs: Any) -> Any:
            outputs = self.model(*args, **kwargs)
            passes.append(outputs.logits)
            return outputs

        self.concatenated_forward(remembering, dict(batch))
        count = len(batch["chosen_input_ids"])
        rows = [self._scores_of_pair(batch, passes[0][row::count], row) for row in range(count)]
        losses, margins = zip(*rows, strict=True)
        return torch.stack(losses), torch.stack(margins)

    def _scores_of_pair(self, batch: Mapping[str, Tensor], logits_2TV: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """TRL's loss of one pair and the difference of its rewards, from the logits of both answers."""
        inputs = {name: batch[name][row : row + 1] for name in _TEXTS}
        scored = SimpleNamespace(logits=logits_2TV, aux_loss=None)
        chosen, rejected, _, _, nll = self.concatenated_forward(lambda *args, **kwargs: scored, inputs)[:5]
        ratio, chosen_reward, rejected_reward = self.odds_ratio_loss(chosen, rejected)[:3]
        return nll - ratio.mean(), (chosen_reward - rejected_reward)[0]

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: Any = "train") -> Any:
        """TRL's loss and metrics; the tokens are counted besides."""
        tokens = sum(batch[f"{side}_attention_mask"].sum() for side in ("chosen", "rejected"))
        self._total_train_tokens += int(self.accelerator.gather(tokens).sum())
        return super().get_batch_loss_metrics(model, batch, train_eval)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's figures since the last log, and the tokens seen so far."""
        if "loss" in logs:
            logs["num_tokens"] = self._total_train_tokens
        super().log(logs, start_time)

    def window_sums(self) -> dict[str, Any]:
        """Tokens and metrics as ORPO keeps them."""
        return {"tokens": self._total_train_tokens, "metrics": dict(self._stored_metrics["train"])}

    def restore_sums(self, window: Mapping[str, Any]) -> None:
        """Put back what ``window_sums`` gave."""
        self._total_train_tokens = window["tokens"]
        self._stored_metrics["train"].update(window["metrics"])


def trainer(setup: Setup) -> ORPORunTrainer:
    """The trainer of a run."""
    args = CRAFTORPOConfig(
        **setup.arguments(),
        beta=setup.params.preference.orpo_beta,
        max_length=setup.params.basic.max_length,  # which the collator keeps to
        padding_value=tokenizer_of(setup.inputs.processor).pad_token_id,
        disable_dropout=False,  # lora.dropout says how much
    )
    rows = setup.rows(ORPOCollator(setup.inputs.collator))
    return ORPORunTrainer(args=on_one_device(args), rows=rows, **setup.run())


def words(params: TrainParams) -> dict[str, str]:
    """The method in the plan."""
    return {"loss": f"of the chosen answer, and the odds ratio times {params.preference.orpo_beta:g} (beta)"}


METHOD = Method(
    title="odds ratio preference optimisation (ORPO)",
    trainer=trainer,
    row_kind=lambda params: "preferences",
    words=words,
    sides=sides,
)
