"""What GRPO and RLOO share: answers that are generated during training, and rewards that are checked."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from craft.collate import SAMPLE_IDS
from craft.preferences import check_prompts, given_datasets
from craft.rewards import checked_rewards, is_async, reward_name
from craft.trainers.joint import Answers, CRAFTJointMixin, has_images


class CRAFTGeneratedMixin(CRAFTJointMixin):
    """CRAFTJointMixin for a trainer whose batches hold ``prompt_ids`` and ``completion_ids`` that it generated.

    In self_align each prompt is contrasted with its completions; completions of one prompt are no negatives of each
    other. Reward functions are checked: what raises, is not finite or not one number per completion is a ValueError
    naming the function.
    """

    _craft_generates = True

    def __init__(self, model: Any, reward_funcs: Any = None, *args: Any, **kwargs: Any) -> None:
        listed = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        checked = [None if func is None else _checked(func) for func in listed]
        check_prompts(*given_datasets(self._craft_base(), (model, reward_funcs, *args), kwargs))
        super().__init__(model, checked if isinstance(reward_funcs, list | tuple) else checked[0], *args, **kwargs)
        if self.craft_enabled and self.craft_bundle.strategy == "self_align":
            self._refuse_nothing_to_contrast()

    @classmethod
    def _craft_base(cls) -> type:
        """TRL's trainer that this one extends."""
        return next(base for base in cls.__mro__ if base.__module__.startswith("trl."))

    def _refuse_nothing_to_contrast(self) -> None:
        """ValueError where self_align could not work, which the run itself would only show in its log."""
        name, args = type(self).__name__, self.craft_args
        if not args.craft_use_hidden_state_hook:
            raise ValueError(
                f"craft_use_hidden_state_hook=False asks the model for hidden states, and {name} has no way to ask. "
                "Leave it at True, or pass pairs: contrastive_dataset=…"
            )
        rows, group = self.args.generation_batch_size, self.num_generations
        if rows <= group and args.craft_negative_strategy != "queue":
            raise ValueError(
                f"self_align has nothing to contrast: the {rows} completions of a generation batch are all of one "
                f"prompt (num_generations={group}), and those are no negatives of each other. Raise "
                "per_device_train_batch_size or gradient_accumulation_steps, lower num_generations, use "
                "craft_negative_strategy='queue', or pass pairs: contrastive_dataset=…"
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        wanted = self.craft_enabled and self.craft_bundle.strategy == "self_align"
        ids = self._craft_sample_ids(inputs) if wanted else []
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if wanted:
            batch[SAMPLE_IDS] = torch.tensor(ids, device=batch["completion_ids"].device)
        return batch

    def _craft_answers(self, inputs: Mapping[str, Any]) -> Answers:
        prompt_BT, answer_BT = inputs["prompt_mask"].bool(), inputs["completion_mask"].bool()
        return Answers(
            input_ids_BT=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            prompt_BT=torch.cat([prompt_BT, torch.zeros_like(answer_BT)], dim=1),
            answer_BT=torch.cat([torch.zeros_like(prompt_BT), answer_BT], dim=1),
            sample_ids_B=inputs.get(SAMPLE_IDS),
            prompts_tell=not has_images(inputs),
        )


def _checked(func: Any) -> Any:
    """A reward function whose results are checked; reward models and asynchronous functions as they are."""
    if isinstance(func, str | nn.Module) or not callable(func) or is_async(func):
        return func

    @functools.wraps(func, updated=())
    def checked(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return checked_rewards(func, prompts=prompts, completions=completions, **columns)

    checked.__name__ = reward_name(func)  # what the log calls it
    return checked
