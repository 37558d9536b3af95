"""Captions that a model writes for samples."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from inft.models.collate import CaptionCollator
from inft.sample import Sample

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Search:
    """How the next token is chosen: greedy by default."""

    do_sample: bool = False
    temperature: float = 1.0  # when sampling
    top_p: float = 1.0  # nucleus, when sampling
    num_beams: int = 1  # 1: no beam search
    seed: int = 0  # when sampling


def generate_captions(
    model: "PreTrainedModel",
    collator: CaptionCollator,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    batch_size: int,
    search: Search | None = None,
    shots: Sequence[Sequence[Sample]] = (),
) -> list[str]:
    """Return one caption a sample, in order, as plain text; greedy unless `search` says otherwise.

    A caption ends at one of the model's end tokens, at the one that ends a supervised answer, or after `max_new_tokens`
    tokens. `shots` are the examples that each sample's prompt follows, none by default. The model's training mode and
    torch's random state are as before afterwards.
    Errors: UserError when a prompt does not fit into the collator's max_length.
    """
    written = generate_tokens(
        model, collator, samples, max_new_tokens=max_new_tokens, batch_size=batch_size, search=search, shots=shots
    )
    return decode_captions(collator, written)


def generate_tokens(
    model: "PreTrainedModel",
    collator: CaptionCollator,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    batch_size: int,
    search: Search | None = None,
    shots: Sequence[Sequence[Sample]] = (),
) -> list[list[int]]:
    """Return the tokens of one caption a sample, up to and with its end token; all else is as generate_captions."""
    search = search or Search()
    config = _generation_config(model, collator, max_new_tokens=max_new_tokens, search=search)
    captions: list[list[int]] = []
    with evaluating(model), _random_state_kept(model), torch.no_grad():
        if search.do_sample:
            torch.manual_seed(search.seed)
        for start in range(0, len(samples), batch_size):
            part = slice(start, start + batch_size)
            prompts = collator.prompts(samples[part], shots[part])
            prompts = {name: tensor.to(model.device) for name, tensor in prompts.items()}
            written = model.generate(**prompts, generation_config=config)
            new = written[:, prompts["input_ids"].shape[1] :].tolist()
            captions += [_up_to_end(tokens, config.eos_token_id) for tokens in new]
    return captions


def _up_to_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    first = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: first + 1]


def decode_captions(collator: CaptionCollator, written: torch.Tensor | Sequence[Sequence[int]]) -> list[str]:
    """Return the plain text of generated tokens (rows, tokens), without special and template tokens."""
    texts = collator.tokenizer.batch_decode(written, skip_special_tokens=True) if len(written) else []
    # Some releases declare turn markers such as <|END_RESPONSE|> as ordinary added tokens.
    return [collator.control.sub("", text).strip() for text in texts]


def _generation_config(
    model: "PreTrainedModel", collator: CaptionCollator, *, max_new_tokens: int, search: Search
) -> "GenerationConfig":
    """The model's own generation config with this call's length and search, and end and padding tokens set."""
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    config.max_new_tokens, config.max_length = max_new_tokens, None
    config.do_sample, config.num_beams = search.do_sample, search.num_beams
    config.use_cache = True  # training turns it off in the model's config; decoding without it would be quadratic
    # The released values of a model are for sampling: greedy search would warn of them.
    config.temperature = search.temperature if search.do_sample else None
    config.top_p = search.top_p if search.do_sample else None
    config.top_k = 0 if search.do_sample else None  # transformers' own default, 50, would cut off what top_p keeps
    own = collator.tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    # Tuning teaches the template's end of turn, which a base model's own config need not name.
    config.eos_token_id = sorted({collator.end_token_id, *(own if isinstance(own, list) else [own])})
    config.pad_token_id = collator.tokenizer.pad_token_id
    return config


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and each module back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _random_state_kept(model: "PreTrainedModel") -> Iterator[None]:
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
