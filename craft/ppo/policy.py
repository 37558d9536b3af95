"""The policy: log-probabilities, entropies and values of completions' tokens from one forward pass; its reference.

Axes: B rows, T tokens of prompt and completion, C tokens of the completion (the last C of T), V vocabulary, H hidden.
"""

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from craft.hooks import LastHiddenStateHook, hidden_size_of, unwrap
from craft.ppo.rollout import evaluating
from craft.trainers.setup import output_device


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """What a model says of the completions' tokens, each [B, C] in float32."""

    logprobs_BC: Tensor
    entropy_BC: Tensor | None  # without gradient
    values_BC: Tensor | None  # of the state before each token


class ValueHead(nn.Linear):
    """The value of a state from its last hidden state: linear, in float32, 0 before training."""

    def __init__(self, model: nn.Module) -> None:
        size = hidden_size_of(model)
        if size is None:
            raise ValueError(f"the hidden size of {type(unwrap(model)).__name__} is not in its config: PPO needs it.")
        super().__init__(size, 1, device=output_device(model), dtype=torch.float32)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return values [...] of hidden states [..., H]."""
        with torch.autocast(self.weight.device.type, enabled=False):
            values: Tensor = super().forward(hidden.to(self.weight))[..., 0]
        return values


def score_tokens(
    model: nn.Module,
    inputs: Mapping[str, Any],
    width: int,
    *,
    temperature: float,
    value_head: ValueHead | None = None,
    entropy: bool = False,
) -> TokenScores:
    """Return what a model in any wrapping says of the last ``width`` tokens of its inputs, in one forward pass.

    Probabilities are those of sampling at ``temperature`` from the whole vocabulary: log softmax(logits / temperature).
    """
    inner = unwrap(model)
    accepted = inspect.signature(type(inner).forward).parameters
    extra: dict[str, Any] = {}
    if "logits_to_keep" in accepted:  # logits of the prompt would take most of the memory
        extra["logits_to_keep"] = width + 1
    if "position_ids" in accepted and not _is_rotary(inner):
        extra["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)  # as generate counts them
    states = slice(-width - 1, -1)  # the state before each token
    with LastHiddenStateHook(model) as hook:
        logits_BCV = model(**inputs, **extra).logits[:, states].float() / temperature
        values_BC = None if value_head is None else value_head(hook.get()[:, states]).to(logits_BCV.device)
    logprobs_BCV = logits_BCV.log_softmax(-1)
    tokens_BC = inputs["input_ids"][:, -width:].to(logits_BCV.device)
    return TokenScores(
        logprobs_BC=logprobs_BCV.gather(-1, tokens_BC[..., None])[..., 0],
        entropy_BC=_entropy(logprobs_BCV.detach()) if entropy else None,
        values_BC=values_BC,
    )


def _is_rotary(model: nn.Module) -> bool:
    """Whether attention depends on differences of positions alone, so that left padding shifts nothing."""
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if config is not None else None
    return getattr(text, "rope_parameters", None) is not None


def _entropy(logprobs_BCV: Tensor) -> Tensor:
    # Row by row: another [B, C, V] would be the largest tensor of the step.
    return torch.stack([-(row_CV.exp() * row_CV).sum(-1) for row_CV in logprobs_BCV])


def disable_dropout(model: nn.Module) -> None:
    """Turn off dropout for good, that of functional calls included; warns when there was any.

    Modules stay in training mode, which gradient checkpointing asks for.
    """
    found = 0
    for module in model.modules():
        names = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else [n for n in vars(module) if "drop" in n]
        for name in names:
            if isinstance(rate := getattr(module, name), float) and rate > 0:
                setattr(module, name, 0.0)
                found += 1
    if found:
        warnings.warn(
            f"dropout was turned off in {found} places of the model: it would make the ratio of probabilities noise. "
            "Keep it with disable_dropout=False.",
            stacklevel=3,
        )


class Reference:
    """The policy that the KL penalty keeps close to: a given model, or the policy as it was before training.

    The latter is the model with its adapter disabled where that is new (a LoRA whose B is zero), else the model with
    the initial values of its trained weights put in (a trained adapter, or one that changed the base's weights such as
    PiSSA), and for a model without adapter a frozen copy.
    Errors: ValueError for a given model whose vocabulary has another size.
    """

    def __init__(self, model: Any, given: Any = None) -> None:
        self.model = model if given is None else given
        self.disable = False
        self.initial: dict[str, Tensor] = {}
        if given is not None:
            _check_vocabulary(model, given)
            given.requires_grad_(False).to(output_device(model)).eval()
        elif not hasattr(model, "disable_adapter"):
            self.model = copy.deepcopy(model).requires_grad_(False).eval()
        elif not _is_new_adapter(model):
            self.initial = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        else:
            self.disable = True

    @torch.no_grad()
    def logprobs(self, inputs: Mapping[str, Any], width: int, *, temperature: float) -> Tensor:
        """Return its log-probabilities [B, C] of the last ``width`` tokens."""
        with evaluating(self.model), self._in_place():
            return score_tokens(self.model, inputs, width, temperature=temperature).logprobs_BC

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        if self.disable:
            with self.model.disable_adapter():
                yield
            return
        parameters = dict(self.model.named_parameters()) if self.initial else {}
        trained = {name: parameters[name].data for name in self.initial}
        for name, value in self.initial.items():
            parameters[name].data = value
        try:
            yield
        finally:
            for name, value in trained.items():
                parameters[name].data = value


def _is_new_adapter(model: nn.Module) -> bool:
    """Whether disabling the adapter gives what the model computes now: all that is trained are LoRAs with B = 0."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    pairs = [(name, p) for name, p in trained if ".lora_" in name]
    seconds = [p for name, p in pairs if ".lora_B." in name or ".lora_embedding_B" in name]
    return bool(seconds) and len(pairs) == len(trained) and not any(bool(p.any()) for p in seconds)


def _check_vocabulary(model: Any, reference: Any) -> None:
    sizes: Sequence[int] = [unwrap(m).config.get_text_config(decoder=True).vocab_size for m in (model, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"ref_model has a vocabulary of {sizes[1]} tokens and the model one of {sizes[0]}: their probabilities "
            "cannot be compared. Give a reference with the same tokenizer, or none."
        )
