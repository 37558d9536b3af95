"""What completions are worth: reward functions and reward models, weighed and summed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from craft.rewards import checked_rewards, is_async, named_row, reward_name

# Columns whose names reward functions get for something else.
GIVEN = ("prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state")


class Rewards:
    """Scores completions with each reward function or sequence classifier; axes: N completions, F functions.

    Arguments: ``funcs``, one or a list of functions in TRL's keyword convention (prompts, completions, completion_ids,
    and each other column as a list), of PreTrainedModel classifiers with one output, or of their names for
    from_pretrained; ``weights``, 1 for each by default; ``tokenizers`` of the models (reward_processing_classes).
    Errors: ValueError without a function, and for other numbers of weights or tokenizers than of functions.
    """

    def __init__(
        self, funcs: Any, *, weights: Sequence[float] | None, tokenizers: Any, tokenizer: Any, device: torch.device
    ) -> None:
        self.funcs = list(funcs) if isinstance(funcs, list | tuple) else [] if funcs is None else [funcs]
        if not self.funcs:
            raise ValueError("reward_funcs is empty: PPO needs at least one reward function or reward model.")
        if weights is not None and len(weights) != len(self.funcs):
            raise ValueError(
                f"reward_weights has {len(weights)} weights for {len(self.funcs)} reward functions: give one for each."
            )
        self.weights_F = torch.tensor(weights or [1.0] * len(self.funcs), dtype=torch.float32)
        self.tokenizer = tokenizer  # of the policy
        self.tokenizers = self._tokenizers(tokenizers)
        for number, func in enumerate(self.funcs):
            self._prepare(number, func, device)
        self.names = _distinct([reward_name(func) for func in self.funcs])

    def _tokenizers(self, given: Any) -> list[Any]:
        if given is None:
            return [None] * len(self.funcs)
        found = list(given) if isinstance(given, list | tuple) else [given]
        if len(found) != len(self.funcs):
            raise ValueError(
                f"reward_processing_classes has {len(found)} entries for {len(self.funcs)} reward functions: give one "
                "for each, None for those that are no model."
            )
        return found

    def _prepare(self, number: int, func: Any, device: torch.device) -> None:
        """Load a reward model that is named, and make a model ready to be called with padded batches."""
        if isinstance(func, str):
            func = self.funcs[number] = AutoModelForSequenceClassification.from_pretrained(func, num_labels=1)
        if not isinstance(func, nn.Module):
            if not callable(func):
                raise TypeError(f"reward function {number} is a {type(func).__name__}, which cannot be called.")
            if is_async(func):
                raise TypeError(f"reward function {reward_name(func)!r} is async: give one that returns its rewards.")
            return
        if self.tokenizers[number] is None:
            self.tokenizers[number] = AutoTokenizer.from_pretrained(func.config._name_or_path)
        tokenizer = self.tokenizers[number]
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        func.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # it reads the last token before padding
        func.requires_grad_(False).to(device).eval()

    def __call__(
        self, rows: Sequence[Mapping[str, Any]], completion_ids: Sequence[Sequence[int]], state: Any
    ) -> Tensor:
        """Return the reward of each completion by each function [N, F]; NaN where a function gave None.

        Errors: ValueError naming functions and row for a completion that no function rewarded: TRL trains on it as on a
        reward of 0, which is none that anybody gave.
        """
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        chat = not isinstance(rows[0]["prompt"], str)
        completions: list[Any] = [[{"role": "assistant", "content": text}] for text in texts] if chat else list(texts)
        prompts = [row["prompt"] for row in rows]
        columns = {name: [row.get(name) for row in rows] for name in rows[0] if name not in GIVEN}
        found = []
        for func, tokenizer in zip(self.funcs, self.tokenizers, strict=True):
            if isinstance(func, nn.Module):
                found.append(_model_scores(func, tokenizer, prompts, completions))
                continue
            rewards = checked_rewards(
                func,
                prompts=prompts,
                completions=completions,
                completion_ids=list(completion_ids),
                trainer_state=state,
                **columns,
            )
            found.append(torch.tensor([math.nan if r is None else r for r in rewards], dtype=torch.float32))
        rewards_NF = torch.stack(found, dim=1)
        self._refuse_unrewarded(rewards_NF, completions)
        return rewards_NF

    def _refuse_unrewarded(self, rewards_NF: Tensor, completions: Sequence[Any]) -> None:
        rows = rewards_NF.isnan().all(1).nonzero()[:, 0].tolist()
        if rows:
            raise ValueError(
                f"{named_row(rows[0], completions)} has no reward: {', '.join(self.names)} returned None for it. Let "
                "one of reward_funcs return a number for every completion."
            )

    def combined(self, rewards_NF: Tensor) -> Tensor:
        """Return the weighted sum over functions [N]; one that is missing beside others counts 0."""
        return (rewards_NF.nan_to_num(0.0) * self.weights_F.to(rewards_NF.device)).sum(1)


@torch.no_grad()
def _model_scores(model: Any, tokenizer: Any, prompts: Sequence[Any], completions: Sequence[Any]) -> Tensor:
    """The first logit of a sequence classifier for each prompt with its completion [N]."""
    if isinstance(prompts[0], str):
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    else:
        dialogues = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        texts = [tokenizer.apply_chat_template(dialogue, tokenize=False) for dialogue in dialogues]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    scores_N: Tensor = model(**inputs.to(model.device)).logits[:, 0].float().cpu()
    if not scores_N.isfinite().all():
        row = int((~scores_N.isfinite()).nonzero()[0, 0])
        raise ValueError(
            f"reward model {reward_name(model)!r} scored row {row} {float(scores_N[row])}: no finite number."
        )
    return scores_N


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where several functions have the same."""
    return [
        name if names.index(name) == number else f"{name}_{names[: number + 1].count(name)}"
        for number, name in enumerate(names)
    ]
