"""PPOTrainer: proximal policy optimisation of a language model on rewards, on the loop of transformers' Trainer.

An optimizer step takes gradient_accumulation_steps micro-batches of rows. At the first of num_ppo_epochs steps on the
same rows these become a rollout: completions are sampled and scored, tokens get advantages. Every step then goes over
the whole rollout once. What the parts do is in craft/ppo; here is their order.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from craft.distributed import average_gradients
from craft.ppo.config import PPOConfig
from craft.ppo.evaluation import evaluate_prompts
from craft.ppo.experience import Batch, add_advantages, model_inputs
from craft.ppo.journal import CLIPPED, ENTROPY, POLICY_LOSS, VALUE_CLIPPED, VALUE_LOSS, Journal
from craft.ppo.losses import policy_loss, token_kl, value_loss
from craft.ppo.policy import Reference, TokenScores, ValueHead, disable_dropout, score_tokens
from craft.ppo.prompts import ChatPromptCollator, PromptCollator, RolloutSampler, check_inputs, check_rows
from craft.ppo.reward import Rewards
from craft.ppo.rollout import (
    end_token_ids,
    ended,
    generation_config,
    placeholder_ids,
    rollout_seed,
    sample_completions,
    with_completions,
)
from craft.ppo.setup import (
    add_value_head,
    load_policy,
    load_processing_class,
    prompt_limit,
    refuse_other_parallelism,
    tokenizer_of,
)

VALUE_HEAD_FILE = "ppo_value_head.safetensors"

Row = Mapping[str, Any]


def _as_they_are(rows: list[Row]) -> list[Row]:
    return rows


class PPOTrainer(Trainer):
    """Token-level PPO with a value head on the policy's last hidden state (Schulman 2017; Ziegler 2019).

    Arguments: ``model``, a model, a PeftModel, or a path; ``reward_funcs``, one or a list of functions in TRL's keyword
    convention or of sequence classifiers (with ``reward_processing_classes``); ``args``, a PPOConfig; data sets with a
    column "prompt" (text or chat messages), "image" or "images" where there are any, and columns for the reward
    functions; ``processing_class``, the tokenizer or processor; ``prompt_collator(rows)`` for left-padded model inputs
    of your own; ``ref_model`` for the KL penalty, by default the policy before training; ``peft_config`` for a new
    adapter.

    A run that resumes in the middle of a rollout makes a new one from the same rows with the policy as it is then.
    Errors: ValueError or TypeError for what cannot be trained on, naming row, function or field.
    """

    _signature_columns: list[str] | None  # of Trainer

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        *,
        ref_model: Any = None,
        prompt_collator: PromptCollator | None = None,
    ) -> None:
        args = PPOConfig() if args is None else args
        evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        for name, dataset in {"train_dataset": train_dataset, **evaluated}.items():
            if dataset is not None:
                check_rows(dataset, name)
        model = load_policy(model, args, peft_config)
        processing_class = load_processing_class(processing_class, model)
        if args.disable_dropout:
            disable_dropout(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=_as_they_are,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        refuse_other_parallelism(self)
        if ref_model is not None and args.kl_coef == 0:
            raise ValueError("ref_model is given, but with kl_coef=0 nothing is compared to it: leave out one of them.")
        self.reference = Reference(self.model, ref_model) if args.kl_coef > 0 else None
        self.prompt_collator = prompt_collator or ChatPromptCollator(processing_class)
        self.value_head = ValueHead(self.model)
        self.rewards = Rewards(
            reward_funcs,
            weights=args.reward_weights,
            tokenizers=reward_processing_classes,
            tokenizer=tokenizer_of(processing_class),
            device=args.device,
        )
        self._end_ids = end_token_ids(model, tokenizer_of(processing_class))
        self._prompt_limit = prompt_limit(model, args.max_completion_length)
        self._journal = Journal(self.rewards.names, args.device)
        self._rows: list[Row] = []  # of this optimizer step
        self._rollout: list[Batch] | None = None
        self._position = 0  # of the next micro-batch in it

    # Rows

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt", "image", "images"]

    def get_train_dataloader(self) -> DataLoader:
        """The loader of rows; a new one begins with a new rollout."""
        self._rollout = None
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        args = self.args
        return RolloutSampler(
            len(self.train_dataset if train_dataset is None else train_dataset),
            group=self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            repeats=args.num_ppo_epochs,
            seed=args.seed if args.data_seed is None else args.data_seed,
            epoch=lambda: int(self.state.epoch or 0),  # of a resumed run as well, which begins in the middle of it
            shuffle=args.train_sampling_strategy == "random",
            drop_last=args.dataloader_drop_last,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Take the rows of an optimizer step; they make a new rollout when the last one has had its PPO epochs."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._rows, self._position = list(chain(*batches)), 0
        if self.state.global_step % self.args.num_ppo_epochs == 0:
            self._rollout = None
        self.value_head.zero_grad()  # which the loop does for the model alone
        return batches, items

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The next micro-batch of the rollout in place of its rows."""
        if not isinstance(inputs, list):
            return super()._prepare_inputs(inputs)
        if self._rollout is None:
            self._rollout = self._roll_out(self._rows)
        batch = self._rollout[self._position]
        self._position += 1
        return batch

    # Rollouts

    @torch.no_grad()
    def _roll_out(self, rows: Sequence[Row]) -> list[Batch]:
        """Micro-batches with everything that the loss needs."""
        args, journal = self.args, self._journal
        seed = rollout_seed(args.seed, self.state.global_step, args.process_index)
        batches, rewards_NF = self._complete(rows, self._train_batch_size, do_sample=True, seed=seed)
        masks = [batch["completion_mask"] for batch in batches]
        scores_N = self.rewards.combined(rewards_NF)
        ended_N = torch.cat(
            [ended(batch["input_ids"], mask, self._end_ids) for batch, mask in zip(batches, masks, strict=True)]
        )
        journal.note_completions(rewards_NF, scores_N, torch.cat([mask.sum(1) for mask in masks]), ended_N)
        if args.missing_eos_penalty is not None:
            scores_N = scores_N - args.missing_eos_penalty * ~ended_N
        kl = []
        for batch, mask_BC in zip(batches, masks, strict=True):
            old = self._score(batch, value_head=self.value_head)
            batch["old_logprobs"], batch["old_values"] = old.logprobs_BC, old.values_BC
            kl.append(self._kl(batch, old.logprobs_BC))
            if self.reference is not None:
                journal.note_kl(kl[-1], mask_BC)
        journal.note_rollout(add_advantages(batches, scores_N.split([len(mask) for mask in masks]), kl, args))
        return batches

    def _complete(
        self, rows: Sequence[Row], batch_size: int, *, do_sample: bool, seed: int
    ) -> tuple[list[Batch], Tensor]:
        """Model inputs of prompts with their completions, in micro-batches, and the completions' rewards [N, F]."""
        tokenizer = tokenizer_of(self.processing_class)
        config = generation_config(
            self.model,
            self.args,
            end_ids=self._end_ids,
            never=placeholder_ids(self.processing_class),
            pad_token_id=tokenizer.pad_token_id,
            do_sample=do_sample,
        )
        batches, completion_ids = [], []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            prompts = super()._prepare_inputs(dict(self.prompt_collator(part)))
            check_inputs(prompts, part, self._prompt_limit)
            with self.compute_loss_context_manager():
                ids_BC, mask_BC = sample_completions(self.model, prompts, config, seed=rollout_seed(seed, start, 0))
            completion_ids += [ids_C[mask_C].tolist() for ids_C, mask_C in zip(ids_BC, mask_BC, strict=True)]
            batches.append({**with_completions(prompts, ids_BC, mask_BC), "completion_mask": mask_BC})
        rewards_NF = self.rewards(rows, completion_ids, self.state)
        return batches, rewards_NF.to(self.args.device)

    def _score(self, batch: Batch, **options: Any) -> TokenScores:
        """What the policy says of a micro-batch's completions."""
        width = batch["completion_mask"].shape[1]
        with self.compute_loss_context_manager():
            return score_tokens(self.model, model_inputs(batch), width, temperature=self.args.temperature, **options)

    def _kl(self, batch: Batch, logprobs_BC: Tensor) -> Tensor:
        """The KL estimates of a micro-batch's tokens; zeros without a reference."""
        mask_BC = batch["completion_mask"]
        if self.reference is None:
            return torch.zeros_like(logprobs_BC)
        inputs, width = model_inputs(batch), mask_BC.shape[1]
        with self.compute_loss_context_manager():
            reference_BC = self.reference.logprobs(inputs, width, temperature=self.args.temperature)
        return token_kl(logprobs_BC, reference_BC.to(logprobs_BC.device), mask_BC, self.args.kl_estimator)

    # The optimizer step

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch; its mean over micro-batches and processes is that over the rollout's tokens."""
        args, mask_BC = self.args, inputs["completion_mask"]
        found = score_tokens(
            model,
            model_inputs(inputs),
            mask_BC.shape[1],
            temperature=args.temperature,
            value_head=self.value_head,
            entropy=True,
        )
        policy_BC, clipped_BC = policy_loss(
            found.logprobs_BC, inputs["old_logprobs"], inputs["advantages"], mask_BC, args.cliprange
        )
        value_BC, value_clipped_BC = value_loss(
            found.values_BC, inputs["old_values"], inputs["returns"], mask_BC, args.cliprange_value
        )
        noted = {ENTROPY: found.entropy_BC, POLICY_LOSS: policy_BC, VALUE_LOSS: value_BC}
        self._journal.note_loss({**noted, CLIPPED: clipped_BC, VALUE_CLIPPED: value_clipped_BC}, mask_BC)
        loss = (policy_BC + args.vf_coef * value_BC).sum() / inputs["tokens_per_batch"]
        return (loss, found) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; at the last of a step the value head's gradient is averaged over processes."""
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            average_gradients(list(self.value_head.parameters()))
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's optimizer with the value head in a group of its own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        add_value_head(self, optimizer)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        nn.utils.clip_grad_norm_(self.value_head.parameters(), self.args.max_grad_norm)  # not at the policy's expense
        return norm

    # Evaluation, log and checkpoints

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Complete the prompts, greedily unless eval_do_sample is on; means of rewards, KL and lengths."""
        return evaluate_prompts(self, dataloader, metric_key_prefix)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means since the last log to a log of training."""
        if "loss" in logs:
            logs.update(self._journal.flush())
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; in a checkpoint also the value head, which no exported model carries."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.args.should_save:
            weights = {name: value.cpu().contiguous() for name, value in self.value_head.state_dict().items()}
            save_file(weights, Path(output_dir) / VALUE_HEAD_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            path = Path(checkpoint) / VALUE_HEAD_FILE
            if not path.is_file():
                raise ValueError(f"{checkpoint} lacks {VALUE_HEAD_FILE}: it is no checkpoint of PPO, or not whole.")
            self.value_head.load_state_dict(load_file(path))
        super()._load_optimizer_and_scheduler(checkpoint)
