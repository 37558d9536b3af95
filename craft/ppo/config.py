"""PPOConfig: the arguments of PPOTrainer."""

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, Literal

from transformers import TrainingArguments

from craft.fields import checked_fields
from params.bounds import Count, CountOrZero, NonNegative, Positive, PositiveShare, Share


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class PPOSettings:
    """The fields that are checked one by one; names as in TRL's former PPOConfig and its GRPOConfig."""

    num_ppo_epochs: Count = field(default=4, metadata=_help("Optimizer steps on each rollout."))
    gamma: Share = field(default=1.0, metadata=_help("Discount of later rewards, per token."))
    lam: Share = field(default=0.95, metadata=_help("Lambda of generalised advantage estimation."))
    cliprange: Positive = field(default=0.2, metadata=_help("How far a probability ratio may gain from 1."))
    cliprange_value: Positive = field(default=0.2, metadata=_help("How far a value may gain from its old one."))
    vf_coef: NonNegative = field(default=0.1, metadata=_help("Weight of the value loss."))
    kl_coef: NonNegative = field(
        default=0.05, metadata=_help("Reward taken off per nat of KL to the reference; 0: there is no reference.")
    )
    kl_estimator: Literal["k1", "k3"] = field(default="k1", metadata=_help("Of the KL of a sampled token."))
    whiten_rewards: bool = field(default=False, metadata=_help("Give the tokens' rewards variance 1."))
    whiten_advantages: bool = field(
        default=True, metadata=_help("Give the advantages of a rollout mean 0 and variance 1 over all processes.")
    )
    max_completion_length: Count = field(default=256, metadata=_help("Tokens that are sampled at most."))
    temperature: Positive = field(
        default=1.0, metadata=_help("Of sampling; the policy's probabilities are those at this temperature.")
    )
    top_p: PositiveShare = field(default=1.0, metadata=_help("Sample from the most likely tokens of this mass."))
    top_k: CountOrZero = field(default=0, metadata=_help("Sample from so many most likely tokens; 0: from all."))
    eval_do_sample: bool = field(default=False, metadata=_help("Sample in evaluations as well; else greedy."))
    missing_eos_penalty: NonNegative | None = field(
        default=None, metadata=_help("Taken off the score of a completion that did not end by itself.")
    )
    disable_dropout: bool = field(
        default=True, metadata=_help("Without dropout a ratio of probabilities is that of two policies, without noise.")
    )
    value_head_learning_rate: Positive | None = field(
        default=None, metadata=_help("Of the value head; none: learning_rate.")
    )


@dataclass
class PPOConfig(PPOSettings, TrainingArguments):
    """TrainingArguments with the settings of PPO.

    A micro-batch has per_device_train_batch_size rows, a rollout gradient_accumulation_steps micro-batches on each
    process. One epoch is one pass over the prompts with num_ppo_epochs optimizer steps for each rollout.
    Errors: one ValueError that lists every field whose value is not allowed.
    """

    _VALID_DICT_FIELDS: ClassVar = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
    ]  # may be JSON on a command line

    reward_weights: list[float] | None = field(
        default=None, metadata=_help("Weight of each reward function; none: 1 for each.")
    )
    model_init_kwargs: dict | str | None = field(
        default=None, metadata=_help("Keywords of from_pretrained, where the model is given as a path.")
    )
    remove_unused_columns: bool = field(
        default=False, metadata=_help("Keep only prompt, image and images: no reward function sees another column.")
    )

    def __post_init__(self) -> None:
        checked_fields(self, PPOSettings, lambda config: [])
        _check_weights(self.reward_weights)
        best = self.load_best_model_at_end or self.save_strategy == "best"
        if best and self.metric_for_best_model is None:  # type: ignore[has-type]
            self.metric_for_best_model = "reward"  # there is no eval_loss
        super().__post_init__()
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} must be random or sequential in PPO, whose "
                "rollouts come back in the same order in every PPO epoch."
            )


def _check_weights(weights: Any) -> None:
    if weights is None:
        return
    if not isinstance(weights, list) or not all(
        isinstance(weight, Real) and not isinstance(weight, bool) and math.isfinite(weight) for weight in weights
    ):
        raise ValueError(f"reward_weights={weights!r} must be a list of finite numbers, one for each reward function.")
