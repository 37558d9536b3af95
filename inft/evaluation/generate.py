"""Captions that a model writes for samples."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from inft.models.collate import CaptionCollator
from inft.sample import Sample

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


def generate_captions(
    model: "PreTrainedModel",
    collator: CaptionCollator,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    batch_size: int,
    do_sample: bool = False,
) -> list[str]:
    """Return one caption a sample, in order: greedy (or sampled as the model's generation config says), plain text.

    A caption ends at one of the model's end tokens, at the one that ends a supervised answer, or after `max_new_tokens`
    tokens. The model's training mode and torch's random state are as before afterwards.
    Errors: UserError when a prompt does not fit into the collator's max_length.
    """
    config = _generation_config(model, collator, max_new_tokens=max_new_tokens, do_sample=do_sample)
    captions: list[str] = []
    with _evaluating(model), _random_state_kept(model), torch.no_grad():
        for start in range(0, len(samples), batch_size):
            prompts = collator.prompts(samples[start : start + batch_size])
            prompts = {name: tensor.to(model.device) for name, tensor in prompts.items()}
            written = model.generate(**prompts, generation_config=config)
            captions += decode_captions(collator, written[:, prompts["input_ids"].shape[1] :])
    return captions


def decode_captions(collator: CaptionCollator, written: torch.Tensor) -> list[str]:
    """Return the plain text of generated tokens (rows, tokens), without special and template tokens."""
    texts = collator.tokenizer.batch_decode(written, skip_special_tokens=True)
    # Some releases declare turn markers such as <|END_RESPONSE|> as ordinary added tokens.
    return [collator.control.sub("", text).strip() for text in texts]


def _generation_config(
    model: "PreTrainedModel", collator: CaptionCollator, *, max_new_tokens: int, do_sample: bool
) -> "GenerationConfig":
    """The model's own generation config with this call's length and search, and end and padding tokens set."""
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    config.max_new_tokens, config.max_length = max_new_tokens, None
    config.do_sample, config.num_beams = do_sample, 1
    config.use_cache = True  # training turns it off in the model's config; decoding without it would be quadratic
    if not do_sample:
        config.temperature = config.top_p = config.top_k = None  # released values; greedy search would warn of them
    own = collator.tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    # Tuning teaches the template's end of turn, which a base model's own config need not name.
    config.eos_token_id = sorted({collator.end_token_id, *(own if isinstance(own, list) else [own])})
    config.pad_token_id = collator.tokenizer.pad_token_id
    return config


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
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
