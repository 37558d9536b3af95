"""What cannot hold together, or would be ignored, under one of the methods sft, dpo, orpo, grpo and ppo."""

import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from params.craft import CRAFT_PRESETS, CraftParams
from params.munichus import MUNIChusLoadConfig
from params.preference import PreferenceParams
from params.presets import METHOD
from params.rl import RLParams
from params.train import TrainParams

PREFERENCE_METHODS = ("dpo", "orpo")  # rows with a better and a worse answer
RL_METHODS = ("grpo", "ppo")  # answers of the model's own, and rewards of them

# Fields that only one of the methods of their section reads.
ONE_METHOD: Mapping[str, str] = {
    "preference.dpo_beta": "dpo",
    "preference.dpo_loss_type": "dpo",
    "preference.label_smoothing": "dpo",
    "preference.orpo_beta": "orpo",
    "rl.num_generations": "grpo",
    "rl.gamma": "ppo",
    "rl.gae_lambda": "ppo",
    "rl.vf_coef": "ppo",
    "rl.cliprange_value": "ppo",
    "rl.whiten_advantages": "ppo",
}
SMOOTHED = ("robust", "exo_pair")  # the losses of a pair that read preference.label_smoothing
# Fields of CRAFT that say in which order whole batches of rows and of pairs come: only sft has such an order.
FOR_SFT = ("beta", "beta_mode", "length_strategy")
BY_SIZE = ("uncertainty", "gradnorm")  # balancing by the size of the losses; loss_scale too, but within a largest ratio
# Our columns that only some methods read.
METHOD_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": (*PREFERENCE_METHODS, *RL_METHODS),
    "chosen": PREFERENCE_METHODS,
    "rejected": PREFERENCE_METHODS,
}


def method_problems(params: TrainParams, told: Collection[str] = ()) -> list[str]:
    """One message per contradiction with the run's method, each with its remedy.

    ``told`` are the fields that the command line names: one that nothing reads is told even at its default.
    """
    return [
        *_sections(params, told),
        *_best_metric(params),
        *_craft(params),
        *_columns(params),
        *(_captions_only(params) if params.method in PREFERENCE_METHODS else ()),
        *(_preference(params.preference) if params.method == "dpo" else ()),
        *(_rewards(params.rl) if params.method in RL_METHODS else ()),
        *(_answers(params) if params.method in RL_METHODS else ()),
        *(_generations(params) if params.method == "grpo" else ()),
    ]


def _sections(params: TrainParams, told: Collection[str]) -> Iterator[str]:
    """What is set for another method than the run's."""
    readers = {"preference": (PreferenceParams, PREFERENCE_METHODS), "rl": (RLParams, RL_METHODS)}
    for section, (cls, methods) in readers.items():
        of_method: Mapping[str, Any] = METHOD[params.method].get(section, {})
        default, values = asdict(cls()), asdict(getattr(params, section))
        for name, value in values.items():
            key = f"{section}.{name}"
            read_by = (ONE_METHOD[key],) if key in ONE_METHOD else methods
            given = key in told or value not in (default[name], of_method.get(name, default[name]))
            if params.method not in read_by and given:
                flags = " or ".join(f"--method {method}" for method in read_by)
                yield f"{key} has no effect with --method {params.method}: add {flags}, or leave it out."


def _best_metric(params: TrainParams) -> Iterator[str]:
    metric, rewarded = params.sft.best_metric, params.method in RL_METHODS
    if metric == "reward" and not rewarded:
        yield (
            f"sft.best_metric=reward is a figure of answers that are rewarded, and --method {params.method} rewards "
            "none: set loss, or add --method grpo or --method ppo."
        )
    if metric == "loss" and rewarded:
        yield (
            f"sft.best_metric=loss says nothing of a run with --method {params.method}, whose held-out rows have a "
            "reward instead: set reward, or leave --best-metric out."
        )


def _craft(params: TrainParams) -> Iterator[str]:
    if params.method == "sft" or not params.craft.enabled:
        return
    default, values = asdict(CraftParams()), asdict(params.craft)
    of_preset: Mapping[str, Any] = CRAFT_PRESETS.get(params.craft.preset or "", {})
    for name in FOR_SFT:
        if values[name] not in (default[name], of_preset.get(name, default[name])):
            yield (
                f"craft.{name} has no effect with --method {params.method}, where each micro-batch has a batch of "
                "pairs beside it and craft.alpha alone weighs the two losses: leave it out."
            )
    balancing = params.craft.gradient_balancing
    if params.method in RL_METHODS and balancing in BY_SIZE:
        whose = f", as --craft-preset {params.craft.preset} has it," * (
            of_preset.get("gradient_balancing") == balancing
        )
        yield (
            f"craft.gradient_balancing={balancing}{whose} weighs losses by their size, and that of --method "
            f"{params.method} is a mean of advantages, around 0 and below it: add --set "
            "craft.gradient_balancing=pcgrad, which looks at the gradients alone, or none."
        )


def _columns(params: TrainParams) -> Iterator[str]:
    for ours, methods in METHOD_COLUMNS.items():
        if ours in params.data.columns and params.method not in methods:
            flags = " or ".join(f"--method {method}" for method in methods)
            also = ", which reads data.columns.caption" * (ours == "chosen")
            yield (
                f"data.columns.{ours} has no effect with --method {params.method}{also}: add {flags}, or leave it out."
            )


def _captions_only(params: TrainParams) -> Iterator[str]:
    """Said before anything is downloaded."""
    if params.data.data in (None, "munichus") and params.data.dataset_id == MUNIChusLoadConfig().dataset_id:
        yield (
            f"--method {params.method} needs rows with a chosen and a rejected answer, and MUNIChus has captions only: "
            "name a data set with --data, such as a jsonl file with the columns prompt, chosen and rejected, or "
            "--data sample."
        )


def _preference(preference: PreferenceParams) -> Iterator[str]:
    kind, smoothing = preference.dpo_loss_type, preference.label_smoothing
    if smoothing and kind not in SMOOTHED:
        yield (
            f"preference.label_smoothing has no effect with preference.dpo_loss_type={kind}: set robust or exo_pair, "
            "or leave it out."
        )
    if kind == "exo_pair" and not smoothing:
        yield (
            "preference.dpo_loss_type=exo_pair needs preference.label_smoothing above 0, of which it takes the "
            "logarithm: set 0.001, as its paper has it."
        )


def _rewards(rl: RLParams) -> Iterator[str]:
    names, weights = rl.rewards, rl.reward_weights
    if not names:
        yield "rl.rewards is empty: name at least one reward function, such as --set rl.rewards=chrf."
    if len(set(names)) < len(names):
        yield f"rl.rewards names a function twice: {', '.join(names)}. Give it more weight with rl.reward_weights."
    if weights and len(weights) != len(names):
        yield (
            f"rl.reward_weights has {len(weights)} numbers, but rl.rewards names {len(names)} functions "
            f"({', '.join(names)}): give one weight for each, or none for equal ones."
        )
    if not all(map(math.isfinite, weights)):
        yield f"rl.reward_weights must be finite numbers, got {', '.join(map(str, weights))}."
    elif weights and not any(weights):
        yield "rl.reward_weights are all 0, so that every answer is worth the same: make one of them positive."


def _answers(params: TrainParams) -> Iterator[str]:
    answer, row = params.rl.max_completion_length, params.basic.max_length
    if answer >= row:
        yield (
            f"rl.max_completion_length={answer} leaves no token for the prompt within basic.max_length={row}: lower "
            "the one or raise the other."
        )


def _generations(params: TrainParams) -> Iterator[str]:
    sft, answers = params.sft, params.rl.num_generations
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun and accelerate launch set it
    rows = sft.per_device_train_batch_size * sft.gradient_accumulation_steps * processes
    if rows % answers:
        launched = f" x {processes} processes" if processes > 1 else ""
        near = max((count for count in range(2, answers + 1) if rows % count == 0), default=None)
        lower = f", or lower the generations to {near}" if near else ""
        yield (
            f"rl.num_generations={answers} does not divide the {rows} rows of an optimizer step "
            f"(sft.per_device_train_batch_size={sft.per_device_train_batch_size} x sft.gradient_accumulation_steps="
            f"{sft.gradient_accumulation_steps}{launched}): each prompt needs all of its answers in one step. Set "
            f"sft.gradient_accumulation_steps so that it does{lower}."
        )
