"""Training on rewards: completions sampled, scored, compared within their group, and sent back with advantages.

Written on the methods of a TrainingClient alone, so that it works in process and over HTTP; `train_round` is the whole
loop body, and its parts are there to be called one by one.

    for _ in range(20):
        found = train_round(client, ["2 + 2 ="], exact_sum, group_size=8, max_tokens=4)
        print(found.step, found.mean_reward)
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from inft.client.errors import InvalidRequest
from inft.client.losses.advantages import advantages_of
from inft.client.losses.inputs import IGNORED
from inft.rewards import COLUMNS
from inft.rewards.load import Reward, load_rewards
from inft.rewards.score import score
from inft.sample import Prompt, Sample

__all__ = ["Rollout", "Round", "advantages_of", "rewards_of", "rollout_batch", "rollouts", "train_on", "train_round"]


class Trainer(Protocol):
    """What is needed of inft.client.TrainingClient."""

    @property
    def sample(self) -> Callable[..., Any]:
        """Called with prompts and options; what it returns has `samples`."""

    @property
    def forward_backward(self) -> Callable[..., Any]:
        """Called with a batch, loss and loss_options; returns a future."""

    @property
    def optim_step(self) -> Callable[..., Any]:
        """Called with learning_rate; returns a future."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One completion, with what training on it takes."""

    prompt: str
    completion: str
    finish_reason: str  # "stop" or "length"
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]  # all that were sampled, the end token included
    logprobs: tuple[float, ...]  # of each when it was sampled, by the plain model
    image: Any = None  # as it was given with the prompt


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one round of training on rewards did."""

    rollouts: Sequence[Rollout]
    rewards: Sequence[float]  # one a rollout
    advantages: Sequence[float]  # one a rollout
    loss: float  # sum over all sampled tokens
    grad_norm: float | None  # of the step; None where it was not taken
    step: int

    @property
    def mean_reward(self) -> float:
        """The mean over all rollouts."""
        return sum(self.rewards) / len(self.rewards)


def rollouts(
    client: Trainer,
    prompts: Sequence[str],
    *,
    group_size: int,
    images: Sequence[Any] | None = None,
    max_tokens: int = 128,
    temperature: float = 1.0,
    stop_sequences: Sequence[str] | None = None,
    seed: int | None = None,
) -> list[Rollout]:
    """Return `group_size` completions of each prompt by the current weights, those of one prompt next to each other.

    No token is filtered out (top_k 0, top_p 1), and at temperature 1 the log-probabilities are those that the tokens
    were drawn with: the objectives with a ratio are then exact.
    Errors: those of TrainingClient.sample.
    """
    optional = {"images": images, "seed": seed}
    found = client.sample(
        list(prompts),
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        stop_sequences=list(stop_sequences or ()),
        num_samples=group_size,
        include_logprobs=True,
        **{name: value for name, value in optional.items() if value is not None},
    )
    return [
        Rollout(
            prompt=each.prompt,
            completion=each.completion,
            finish_reason=each.finish_reason,
            prompt_tokens=tuple(each.prompt_tokens),
            tokens=tuple(each.tokens),
            logprobs=tuple(each.logprobs),
            image=None if images is None else images[number // group_size],
        )
        for number, each in enumerate(found.samples)
    ]


def rewards_of(
    given: Sequence[Rollout],
    reward: str | Callable[..., Any],
    *,
    references: Sequence[str] | None = None,
    language: str = "",
) -> list[float]:
    """Return what each rollout is worth by a reward of inft.rewards: a name, ``module:function``, or a function.

    `references` has one text for each prompt, in the order of the rollouts' groups.
    Errors: UserError as `load_rewards` and `score`; for references that are missing or do not fit the groups; and for
    a rollout that gets no reward (None).
    """
    function = load_rewards([reward])[0] if isinstance(reward, str) else _reward(reward)
    if references is None and function.needs_references:
        raise InvalidRequest(f"the reward {function.name} compares with references: give one for each prompt.")
    texts = [""] * len(given) if references is None else _for_each(references, len(given))
    samples = [
        Sample(
            image=None,
            prompt=Prompt(instruction=each.prompt),
            answer=text,
            language=language,
            meta={"where": f"rollout {number}"},
        )
        for number, (each, text) in enumerate(zip(given, texts, strict=True))
    ]
    completions, ids = [each.completion for each in given], [list(each.tokens) for each in given]
    found = []
    for number, value in enumerate(score(function, samples=samples, completions=completions, completion_ids=ids)):
        if value is None:
            raise InvalidRequest(f"rollout {number} has no reward: {function.name} returned None. Return a number.")
        found.append(float(value))
    return found


def rollout_batch(given: Sequence[Rollout], advantages: Sequence[float]) -> dict[str, Any]:
    """Return the batch of forward_backward that trains on rollouts: rows padded on the right.

    Labels stand on the sampled tokens, the end token included, and `old_logprobs` beside them; `advantages` has one
    number a row, and `images` come along where there are any. Good for reinforce, importance_sampling, ppo and cispo.
    Errors: InvalidRequest without rollouts, and for another number of advantages than of rollouts.
    """
    if not given or len(advantages) != len(given):
        raise InvalidRequest(f"{len(advantages)} advantages for {len(given)} rollouts: give one for each.")
    length = max(len(each.prompt_tokens) + len(each.tokens) for each in given)
    batch: dict[str, Any] = {
        "input_ids": [_row(length, each.prompt_tokens, each.tokens, 0) for each in given],
        "attention_mask": [_row(length, [1] * len(each.prompt_tokens), [1] * len(each.tokens), 0) for each in given],
        "labels": [_row(length, [IGNORED] * len(each.prompt_tokens), each.tokens, IGNORED) for each in given],
        "old_logprobs": [_row(length, [0.0] * len(each.prompt_tokens), each.logprobs, 0.0) for each in given],
        "advantages": [float(value) for value in advantages],
    }
    if any(each.image is not None for each in given):
        batch["images"] = [each.image for each in given]
    return batch


def train_on(
    client: Trainer,
    given: Sequence[Rollout],
    advantages: Sequence[float],
    *,
    loss: str = "importance_sampling",
    loss_options: Mapping[str, Any] | None = None,
    rows: int = 8,
    learning_rate: float | None = None,
) -> tuple[float, Any]:
    """Return the summed loss and the optimizer step's result, after one step on all rollouts.

    They are sent `rows` at a time, which is at most the client's batch_size: the objectives are sums, so the step is
    the same however they are cut. Where the client's gradient_accumulation_steps asks for more batches than these, the
    step is not taken yet, and its result says so.
    Errors: those of forward_backward and optim_step; a batch that is refused leaves those before it accumulated.
    """
    starts = range(0, len(given), rows)
    batches = [rollout_batch(given[start : start + rows], advantages[start : start + rows]) for start in starts]
    passes = [client.forward_backward(batch, loss=loss, loss_options=loss_options) for batch in batches]
    step = client.optim_step(learning_rate=learning_rate)
    return sum(each.result().loss for each in passes), step.result()


def train_round(
    client: Trainer,
    prompts: Sequence[str],
    reward: str | Callable[..., Any],
    *,
    group_size: int,
    references: Sequence[str] | None = None,
    language: str = "",
    normalise: bool = True,
    loss: str = "importance_sampling",
    loss_options: Mapping[str, Any] | None = None,
    rows: int = 8,
    learning_rate: float | None = None,
    **sampling: Any,
) -> Round:
    """Return what one round did: rollouts, their rewards, advantages within each group, and one optimizer step.

    `sampling` goes to `rollouts`; the rest is as `rewards_of`, `advantages_of` and `train_on` take it.
    """
    found = rollouts(client, prompts, group_size=group_size, **sampling)
    rewards = rewards_of(found, reward, references=references, language=language)
    advantages = advantages_of(rewards, group_size, normalise).tolist()
    total, step = train_on(
        client, found, advantages, loss=loss, loss_options=loss_options, rows=rows, learning_rate=learning_rate
    )
    return Round(
        rollouts=found, rewards=rewards, advantages=advantages, loss=total, grad_norm=step.grad_norm, step=step.step
    )


def _row(length: int, prompt: Sequence[Any], answer: Sequence[Any], padding: Any) -> list[Any]:
    row = [*prompt, *answer]
    return row + [padding] * (length - len(row))


def _for_each(references: Sequence[str], count: int) -> list[str]:
    if isinstance(references, str) or not references or count % len(references):
        raise InvalidRequest(f"{len(references)} references for {count} rollouts: give one for each prompt.")
    return [text for text in references for _ in range(count // len(references))]


def _reward(function: Callable[..., Any]) -> Reward:
    """A function as inft.rewards calls it: with the columns that its parameters name."""
    if not callable(function):
        raise InvalidRequest(f"a reward is a name, module:function or a function, not {type(function).__name__}.")
    parameters = inspect.signature(function).parameters
    name = getattr(function, "__name__", type(function).__name__)
    everything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    unknown = [
        each.name
        for each in parameters.values()
        if each.default is inspect.Parameter.empty
        and each.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        and each.name not in COLUMNS
    ]
    if unknown:
        raise InvalidRequest(
            f"the reward {name} needs {unknown[0]!r}, which there is not: name its parameters of {', '.join(COLUMNS)}."
        )
    references = parameters.get("references")
    return Reward(
        name=name,
        function=function,
        needs_references=references is not None and references.default is inspect.Parameter.empty,
        takes=frozenset(COLUMNS if everything else [each for each in COLUMNS if each in parameters]),
    )
