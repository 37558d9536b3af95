"""Proximal policy optimisation (PPO): answers that are worth more than a learnt value says are made likelier."""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from craft.config import CRAFTPPOConfig
from craft.ppo.experience import Batch
from craft.ppo.setup import prompt_limit
from craft.schedule import EpochPlan
from craft.trainers import CRAFTPPOTrainer
from inft.models.collate import where
from inft.training.arguments import on_one_device
from inft.training.head import add_compact_head
from inft.training.methods.method import Method, Setup
from inft.training.methods.rewards import (
    check_rewards,
    kl_words,
    reward_words,
    rewarded_arguments,
    rewarded_run,
    row_kind,
    sampling_words,
)
from inft.training.plan import Steps, steps_of
from inft.training.prepare import stand_in_tokens
from inft.training.processes import is_main
from inft.training.rewarded import RewardedTrainer, prompt_alone
from inft.training.rows import RowCollator
from params import TrainParams, UserError


class PPORunTrainer(RewardedTrainer, CRAFTPPOTrainer):
    """Our PPO with CRAFT beside it, on prompts with an image or without."""

    def __init__(self, *, model: PeftModel, rows: RowCollator, **run: Any) -> None:
        super().__init__(model=model, rows=rows, prompt_collator=self._prompts, **run)
        add_compact_head(model.get_base_model())  # which the guards score with
        self._total_train_tokens = 0

    def _prompts(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The prompts of some rows as their family writes them, images included."""
        prompts: dict[str, Tensor] = self.rows.collator.prompts(self.samples([row["row"] for row in rows]))
        return prompts

    def _roll_out(self, rows: Sequence[Mapping[str, Any]]) -> list[Batch]:
        batches: list[Batch] = super()._roll_out(rows)
        tokens = torch.stack([batch["attention_mask"].sum() for batch in batches]).sum()
        self._total_train_tokens += int(self.accelerator.gather(tokens).sum())
        return batches

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """PPO's figures since the last log, and the tokens of all rollouts so far."""
        if "loss" in logs:
            logs["num_tokens"] = self._total_train_tokens
        super().log(logs, *args, **kwargs)

    def window_sums(self) -> dict[str, Any]:
        """Tokens and sums as PPO keeps them."""
        return {"tokens": self._total_train_tokens, "metrics": self._journal.meter.totals(self._journal.names)}

    def restore_sums(self, window: Mapping[str, Any]) -> None:
        """Put back what ``window_sums`` gave."""
        self._total_train_tokens = window["tokens"]
        if is_main():  # the sums are those of all processes
            self._journal.meter.load(window["metrics"])


def trainer(setup: Setup) -> PPORunTrainer:
    """The trainer of a run."""
    refuse_beyond_context(setup)
    rl = setup.params.rl
    args = CRAFTPPOConfig(
        **rewarded_arguments(setup),
        kl_coef=rl.kl_coef,
        cliprange=rl.epsilon,
        num_ppo_epochs=rl.num_iterations,
        gamma=rl.gamma,
        lam=rl.gae_lambda,
        vf_coef=rl.vf_coef,
        cliprange_value=rl.cliprange_value,
        whiten_advantages=rl.whiten_advantages,
    )
    return PPORunTrainer(args=on_one_device(args), **rewarded_run(setup))


def refuse_beyond_context(setup: Setup) -> None:
    """UserError for a prompt that leaves an answer no room in the model's context, when that ends before max_length.

    The trainer itself meets it in the middle of an epoch.
    """
    collator, answer = setup.inputs.collator, setup.params.rl.max_completion_length
    try:
        limit = prompt_limit(setup.model, answer)
    except ValueError as error:
        raise UserError(f"rl.{error}") from error
    if limit is None or setup.params.basic.max_length <= limit + answer:
        return
    samples, added = setup.inputs.loaded.train, stand_in_tokens(collator)
    lengths = collator.lengths([side for sample in samples for side in prompt_alone(sample)])
    long = [(sample, length - added) for sample, length in zip(samples, lengths, strict=True)]
    long = [(sample, length) for sample, length in long if length > limit]
    if long:
        sample, length = long[0]
        raise UserError(
            f"{where(sample)}: the prompt has {length:,} tokens, and with rl.max_completion_length={answer:,} the "
            f"model's context of {limit + answer:,} leaves it {limit:,}. Set basic.max_length={limit + answer} (news "
            "texts are shortened to it), or lower rl.max_completion_length."
        )


def steps(params: TrainParams, rows: int, *, windows: EpochPlan | None = None, processes: int = 1) -> Steps:
    """Optimizer steps as PPOTrainer makes them: the passes over each rollout, the last one filled up."""
    group = params.sft.per_device_train_batch_size * params.sft.gradient_accumulation_steps * processes
    return steps_of(params, ceil(rows / group) * params.rl.num_iterations, processes=processes)


def words(params: TrainParams) -> dict[str, str]:
    """The method in the plan."""
    rl = params.rl
    return {
        "rewards": f"{reward_words(params)}; {kl_words(params)}",
        "answers": f"one to each prompt, {sampling_words(params)}",
        "loss": f"{rl.num_iterations} passes over each batch of answers, ratio clipped at {rl.epsilon:g}, GAE lambda "
        f"{rl.gae_lambda:g}, gamma {rl.gamma:g}, value loss {rl.vf_coef:g}",
    }


METHOD = Method(
    title="proximal policy optimisation (PPO)",
    trainer=trainer,
    row_kind=row_kind,
    words=words,
    check=check_rewards,
    sides=prompt_alone,
    steps=steps,
)
