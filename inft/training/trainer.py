"""CaptionTrainer: TRL's SFTTrainer on the rows of a run, with a token-weighted evaluation."""

from typing import Any

import torch
from peft import PeftModel
from trl import SFTConfig

from craft.trainers import CRAFTSFTTrainer
from inft.training.head import add_compact_head, scores_compactly
from inft.training.rows import ROWS, RowCollator
from inft.training.runtrainer import RunTrainer


class CaptionTrainer(RunTrainer, CRAFTSFTTrainer):
    """TRL's loss and loop with CRAFT beside it, our rows, evaluation and checkpoints."""

    def __init__(self, *, model: PeftModel, args: SFTConfig, rows: RowCollator, **run: Any) -> None:
        super().__init__(model=model, args=args, rows=rows, data_collator=rows, **run)
        if not scores_compactly(args.device):
            add_compact_head(model.get_base_model())

    def score_heldout(self, eval_dataset: Any, prefix: str) -> dict[str, float]:
        """Loss per supervised token over the whole held-out split, whatever the batch size; per language besides.

        transformers averages the means of batches, so that a short answer counts more in a batch of its own.
        """
        loss: dict[str, float] = {}
        tokens: dict[str, int] = {}
        correct = 0
        seen: set[int] = set()
        batches = self.get_eval_dataloader(eval_dataset)
        self.model.eval()
        for batch in batches:
            numbers_B = batch.pop(ROWS)
            with torch.no_grad():
                outputs = self.score(batch)
            figures_B3 = torch.stack(
                [-outputs.log_probs.double().sum(1), outputs.label_mask.sum(1), outputs.is_top1.sum(1)], dim=1
            )
            numbers, figures = self.accelerator.gather((numbers_B.to(figures_B3.device), figures_B3))
            for number, (row_loss, row_tokens, row_correct) in zip(numbers.tolist(), figures.tolist(), strict=True):
                if number in seen:  # of several processes, all get as many rows: the last batch is filled up
                    continue
                seen.add(number)
                language = self.rows.rows[number].language
                loss[language] = loss.get(language, 0.0) + row_loss
                tokens[language] = tokens.get(language, 0) + int(row_tokens)
                correct += int(row_correct)
        total = sum(tokens.values())
        metrics = {f"{prefix}_loss": sum(loss.values()) / total, f"{prefix}_mean_token_accuracy": correct / total}
        metrics |= {f"{prefix}_loss_{language}": loss[language] / tokens[language] for language in sorted(loss)}
        return {**metrics, f"{prefix}_tokens": total}
