"""What operations give back, as fields: `result.loss`, `result.samples[0].completion`.

A field that a newer service adds is left out here, so that an older SDK still reads its answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, TypeVar

Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class ForwardBackwardResult:
    """Of one forward and backward pass."""

    loss: float
    grad_norm: float  # L2, of the gradient accumulated so far, as a step would apply it
    tokens_processed: int  # real ones, without padding
    dp_metrics: Mapping[str, Any] | None = None  # with privacy: ε so far, and the share of rows that were clipped
    metrics: Mapping[str, float | None] = field(default_factory=lambda: MappingProxyType({}))  # what the loss measured
    accumulated: int = 1  # forward_backwards since the last step


@dataclass(frozen=True, kw_only=True)
class OptimStepResult:
    """Of one optimizer step."""

    step: int  # steps taken so far
    learning_rate: float  # of this step
    applied: bool = True  # false where gradient_accumulation_steps asks for more forward_backwards first
    grad_norm: float | None = None  # L2, before max_grad_norm cut it
    dp_metrics: Mapping[str, Any] | None = None  # with privacy: ε so far


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One text that the current weights wrote."""

    prompt: str
    completion: str
    tokens_generated: int
    finish_reason: str  # "stop": it ended itself, or by a stop sequence; "length": cut at max_tokens
    prompt_tokens: tuple[int, ...] | None = None  # these three with include_logprobs
    tokens: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None  # of each token, by the plain model: temperature 1, nothing cut off


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """Completions in the order of the prompts, those of one prompt next to each other."""

    samples: tuple[Completion, ...]
    model_step: int  # optimizer steps of the weights that wrote them


@dataclass(frozen=True, kw_only=True)
class SaveStateResult:
    """A checkpoint that was written and does not change any more."""

    artifact_id: str
    size_bytes: int
    content_hash: str
    created_at: str  # ISO 8601, UTC
    step: int


@dataclass(frozen=True, kw_only=True)
class LoadStateResult:
    """A checkpoint that was loaded."""

    loaded_artifact_id: str
    step: int


def forward_backward_result(values: Mapping[str, Any]) -> ForwardBackwardResult:
    """Return the result that an engine gave as plain values."""
    return _made(ForwardBackwardResult, values)


def optim_step_result(values: Mapping[str, Any]) -> OptimStepResult:
    """Return the result that an engine gave as plain values."""
    return _made(OptimStepResult, values)


def sample_result(values: Mapping[str, Any]) -> SampleResult:
    """Return the result that an engine gave as plain values."""
    return SampleResult(samples=tuple(map(_completion, values["samples"])), model_step=values["model_step"])


def save_state_result(values: Mapping[str, Any]) -> SaveStateResult:
    """Return the result that an engine gave as plain values."""
    return _made(SaveStateResult, values)


def load_state_result(values: Mapping[str, Any]) -> LoadStateResult:
    """Return the result that an engine gave as plain values."""
    return _made(LoadStateResult, values)


RESULTS = {
    "forward_backward": forward_backward_result,
    "optim_step": optim_step_result,
    "sample": sample_result,
    "save_state": save_state_result,
    "load_state": load_state_result,
}


def _completion(values: Mapping[str, Any]) -> Completion:
    return _made(Completion, {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _made(kind: type[Made], values: Mapping[str, Any]) -> Made:
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in known})
