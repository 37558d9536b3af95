"""Group relative policy optimisation (GRPO): of the answers to a prompt, those above their mean are made likelier."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from craft.config import CRAFTGRPOConfig
from craft.ppo.rollout import ZERO_AFTER_PROMPT, with_completions
from craft.schedule import EpochPlan
from craft.trainers import CRAFTGRPOTrainer
from craft.trainers.joint import Answers
from inft.evaluation.generate import evaluating
from inft.models.collate import IGNORED
from inft.training.arguments import on_one_device
from inft.training.head import add_compact_head, scores_compactly
from inft.training.methods.method import Method, Setup, check_reference
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
from inft.training.preference import forget_reference_copy
from inft.training.rewarded import RewardedTrainer, prompt_alone
from inft.training.rows import ROWS
from params import TrainParams, UserError


class GRPORunTrainer(RewardedTrainer, CRAFTGRPOTrainer):
    """TRL's GRPO with CRAFT beside it, on prompts with an image or without.

    TRL writes and reads prompts through the processor, and knows the image tensors of some families. Here both go
    through the family's collator: the numbers of the rows travel with a generated batch, and say which images are
    whose.
    """

    def __init__(self, *, model: PeftModel, **run: Any) -> None:
        self._now: Tensor = torch.zeros(0, dtype=torch.int64)  # rows that are generated for, or scored
        super().__init__(model=model, **run)
        forget_reference_copy(model)
        if not scores_compactly(self.args.device):
            add_compact_head(model.get_base_model(), temperature=self.temperature)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._now = torch.tensor([row["row"] for row in inputs])
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        batch[ROWS] = self._now.to(batch["completion_ids"].device)
        return batch

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Tensor]]:
        """The prompts' tokens without padding, and what the processor makes of their images."""
        batch = self.rows.collator.prompts(self.samples(self._now))
        mask_BT = batch.pop("attention_mask").bool()
        ids = [ids_T[mask_T].tolist() for ids_T, mask_T in zip(batch.pop("input_ids"), mask_BT, strict=True)]
        return ids, None, batch

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with evaluating(self.model):  # dropout is for the loss
            return super()._generate_single_turn(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._now = inputs[ROWS]
        loss: Tensor = super()._compute_loss(model, inputs)
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **known: Any,  # of images, by TRL: the collator knows them here
    ) -> tuple[Tensor, Tensor | None, None]:
        """TRL's, with the images of the rows as their family wants them."""
        logps, entropies = [], []
        parts = range(0, len(input_ids), batch_size or len(input_ids))
        for part in (slice(start, start + parts.step) for start in parts):
            inputs = self._model_inputs(self._now[part], input_ids[part], attention_mask[part], logits_to_keep)
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
            labels[:, :-logits_to_keep] = IGNORED
            with self.accelerator.autocast():
                outputs = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
            logps.append(outputs.log_probs[:, -logits_to_keep:])
            entropies.append(outputs.entropy[:, -logits_to_keep:] if compute_entropy else None)
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def _model_inputs(
        self, numbers: Tensor, input_ids_BT: Tensor, attention_mask_BT: Tensor, width: int
    ) -> dict[str, Tensor]:
        """Prompts and their completions, the last ``width`` tokens, with the images of the rows."""
        samples, prompt = self.samples(numbers), input_ids_BT.shape[1] - width
        images: dict[str, Tensor] = {}
        if any(sample.image is not None for sample in samples):
            images = {
                name: tensor.to(input_ids_BT.device) for name, tensor in self.rows.collator.prompts(samples).items()
            }
        own = images.pop("input_ids", None)
        for name in ("cross_attention_mask", *ZERO_AFTER_PROMPT):
            if name in images and own is not None:  # these prompts alone may be shorter than the padded ones
                images[name] = _widened(images[name], prompt - own.shape[1])
        prompts = {**images, "input_ids": input_ids_BT[:, :prompt], "attention_mask": attention_mask_BT[:, :prompt]}
        return with_completions(prompts, input_ids_BT[:, prompt:], attention_mask_BT[:, prompt:])

    def _craft_answers(self, inputs: Mapping[str, Any]) -> Answers:
        found = super()._craft_answers(inputs)
        with_image = any(sample.image is not None for sample in self.samples(inputs[ROWS]))
        return replace(found, prompts_tell=not with_image)

    def restore_sums(self, window: Mapping[str, Any]) -> None:
        """Put back what was added up since the last log, and the count of micro-batches, by which answers are due."""
        super().restore_sums(window)
        self._step = self.state.global_step * self.args.gradient_accumulation_steps


def _widened(tensor_BTX: Tensor, columns: int) -> Tensor:
    """A tensor with so many zeros to the left of its tokens."""
    later = (0, 0) * (tensor_BTX.dim() - 2)
    return F.pad(tensor_BTX, (*later, columns, 0))


def trainer(setup: Setup) -> GRPORunTrainer:
    """The trainer of a run."""
    rl = setup.params.rl
    args = CRAFTGRPOConfig(
        **rewarded_arguments(setup),
        num_generations=rl.num_generations,
        num_generations_eval=1,  # an evaluation is ours: one greedy answer to each prompt
        beta=rl.kl_coef,
        epsilon=rl.epsilon,
        num_iterations=rl.num_iterations,
    )
    return GRPORunTrainer(args=on_one_device(args), **rewarded_run(setup))


def steps(params: TrainParams, rows: int, *, windows: EpochPlan | None = None, processes: int = 1) -> Steps:
    """Optimizer steps as TRL makes them: each prompt has all its answers in a step, and prompts that fill none are left
    to the next epoch."""
    answers = params.sft.per_device_train_batch_size * params.sft.gradient_accumulation_steps * processes
    prompts = answers // params.rl.num_generations
    if rows < prompts:
        raise UserError(
            f"an optimizer step has {prompts} prompts ({answers} answers, {params.rl.num_generations} to each), and "
            f"only {rows} rows are left to train on. Lower sft.gradient_accumulation_steps or "
            "sft.per_device_train_batch_size, or raise rl.num_generations."
        )
    counted = steps_of(params, rows // prompts * params.rl.num_iterations, processes=processes)
    return replace(counted, unit="answers")


def words(params: TrainParams) -> dict[str, str]:
    """The method in the plan."""
    rl = params.rl
    passes = f", {rl.num_iterations} passes over each batch of answers" if rl.num_iterations > 1 else ""
    return {
        "rewards": reward_words(params),
        "answers": f"{rl.num_generations} to each prompt, {sampling_words(params)}",
        "loss": f"advantages within a prompt's answers, ratio clipped at {rl.epsilon:g}, {kl_words(params)}{passes}",
    }


def check(params: TrainParams) -> None:
    """UserError for rewards that there are not, and for a base that changes where the KL is taken to it."""
    check_rewards(params)
    if params.rl.kl_coef:
        check_reference(params)


METHOD = Method(
    title="group relative policy optimisation (GRPO)",
    trainer=trainer,
    row_kind=row_kind,
    words=words,
    check=check,
    sides=prompt_alone,
    steps=steps,
)
