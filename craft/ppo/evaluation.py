"""Evaluation: prompts that are held out get completions, and these their rewards."""

import math
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from craft.ppo.rollout import rollout_seed


@torch.no_grad()
def evaluate_prompts(trainer: Any, dataloader: DataLoader, prefix: str) -> EvalLoopOutput:
    """Return the metrics of a PPOTrainer's policy on the prompts of a loader, over all processes.

    They are the means over completions of the reward, of each reward function and of the length, and the mean over
    tokens of the KL to the reference. A completion counts once, also where processes were filled up with rows.
    """
    args = trainer.args
    trainer.model.eval()
    names = ["reward", *(f"rewards/{name}" for name in trainer.rewards.names), "completions/mean_length"]
    parts = []
    for number, rows in enumerate(dataloader):
        seed = rollout_seed(args.seed, number, args.process_index)
        (batch,), rewards_BF = trainer._complete(rows, len(rows), do_sample=args.eval_do_sample, seed=seed)
        mask_BC = batch["completion_mask"]
        figures = [trainer.rewards.combined(rewards_BF)[:, None], rewards_BF, mask_BC.sum(1, keepdim=True)]
        if trainer.reference is not None:
            kl_BC = trainer._kl(batch, trainer._score(batch).logprobs_BC)
            figures.append(kl_BC.sum(1, keepdim=True))
        found_BK = torch.cat([figure.double() for figure in figures], dim=1)
        parts.append(trainer.accelerator.gather_for_metrics(found_BK))
        trainer.control = trainer.callback_handler.on_prediction_step(args, trainer.state, trainer.control)
    all_NK = torch.cat(parts)
    metrics = dict(zip(names, all_NK[:, : len(names)].nanmean(0).tolist(), strict=True))
    if trainer.reference is not None:
        metrics["kl"] = float(all_NK[:, -1].sum() / all_NK[:, -2].sum())
    # A function that scored no row has no mean.
    found = {f"{prefix}_{name}": value for name, value in metrics.items() if math.isfinite(value)}
    return EvalLoopOutput(predictions=None, label_ids=None, metrics=found, num_samples=len(all_NK))
