"""Learning from rewards of the model's own answers: GRPO and PPO."""

from dataclasses import dataclass
from typing import Annotated

from params.bounds import Bounds, Count, NonNegative, Positive, PositiveShare, Share

Generations = Annotated[int, Bounds(2)]  # of one prompt: an advantage is the distance to the mean of the others


@dataclass(frozen=True, kw_only=True)
class RLParams:
    """Hyperparameters of the methods with rewards, grpo (Shao et al. 2024) and ppo (Schulman et al. 2017)."""

    rewards: tuple[str, ...] = ("chrf",)  # of chrf, exact, length, language, json, or module:function, which is run
    reward_weights: tuple[float, ...] = ()  # of each reward in their sum; empty: 1 each
    num_generations: Generations = 8  # grpo: answers to each prompt; divides the rows of an optimizer step
    max_completion_length: Count = 96  # tokens an answer has at most
    temperature: Positive = 1.0  # of sampling; the probabilities of the losses are those at this temperature
    top_p: PositiveShare = 1.0  # nucleus of sampling; 1: all tokens
    kl_coef: NonNegative = 0.0  # weight of the KL divergence to the base model; 0.05 with ppo unless it is set
    epsilon: Positive = 0.2  # the probability ratio counts no further than this from 1
    num_iterations: Count = 1  # optimisation passes over each batch of answers; 4 with ppo unless it is set
    gamma: Share = 1.0  # ppo: discount of later rewards, per token
    gae_lambda: Share = 0.95  # ppo: of generalised advantage estimation (Schulman et al. 2016)
    vf_coef: NonNegative = 0.1  # ppo: weight of the value loss
    cliprange_value: Positive = 0.2  # ppo: a value moves no further than this in the passes over one batch
    whiten_advantages: bool = True  # ppo: to mean 0 and variance 1 over the tokens of a batch
