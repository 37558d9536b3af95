"""What the methods that learn from rewards share: arguments and keywords of their trainers, rows, words in the plan."""

from collections.abc import Sequence
from typing import Any

from inft.data.rows import RowKind
from inft.models.collate import CaptionCollator
from inft.rewards.load import Reward, load_rewards
from inft.training.methods.method import Setup
from inft.training.rewarded import HeldoutRewards, trainer_rewards
from inft.training.rows import prompt_collator
from params import TrainParams


def rewarded_arguments(setup: Setup) -> dict[str, Any]:
    """The fields of the arguments that GRPO and PPO name alike."""
    rl = setup.params.rl
    return {
        **setup.arguments(),
        "max_completion_length": rl.max_completion_length,
        "temperature": rl.temperature,
        "top_p": rl.top_p,
        "reward_weights": list(rl.reward_weights) or None,
        "disable_dropout": False,  # lora.dropout says how much
    }


def rewarded_run(setup: Setup) -> dict[str, Any]:
    """The keywords of RewardedTrainer but its arguments."""
    collator = prompt_collator(setup.inputs.collator, setup.params)
    rewards, rows = load_rewards(setup.params.rl.rewards), setup.rows(collator)
    return {
        "rows": rows,
        "reward_funcs": trainer_rewards(rewards, rows),
        "heldout_rewards": _heldout_rewards(setup, collator, rewards),
        **setup.run(),
    }


def _heldout_rewards(setup: Setup, collator: CaptionCollator, rewards: Sequence[Reward]) -> HeldoutRewards | None:
    """What an evaluation measures; None without held-out rows."""
    heldout, rl = setup.inputs.loaded.heldout, setup.params.rl
    if not heldout:
        return None
    return HeldoutRewards(
        heldout,
        collator,
        rewards,
        rl.reward_weights,
        max_new_tokens=rl.max_completion_length,
        batch_size=setup.params.sft.per_device_eval_batch_size,
    )


def row_kind(params: TrainParams) -> RowKind:
    """Rows with a caption where a reward compares answers with it; else a prompt is enough."""
    return "references" if any(reward.needs_references for reward in load_rewards(params.rl.rewards)) else "prompts"


def reward_words(params: TrainParams) -> str:
    """The rewards and their weights: "chrf, 0.5 × length"."""
    rl = params.rl
    weights: Sequence[float] = rl.reward_weights or [1.0] * len(rl.rewards)
    parts = zip(rl.rewards, weights, strict=True)
    return " + ".join(name if weight == 1 else f"{weight:g} × {name}" for name, weight in parts)


def sampling_words(params: TrainParams) -> str:
    """How answers are sampled."""
    rl = params.rl
    nucleus = f", top_p {rl.top_p:g}" if rl.top_p < 1 else ""
    return f"of {rl.max_completion_length:,} tokens at most, temperature {rl.temperature:g}{nucleus}"


def kl_words(params: TrainParams) -> str:
    """What holds the model near its base."""
    return f"KL to the base model {params.rl.kl_coef:g}" if params.rl.kl_coef else "no KL term"


def check_rewards(params: TrainParams) -> None:
    """UserError for rewards that cannot be loaded."""
    load_rewards(params.rl.rewards)
