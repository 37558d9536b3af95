"""Rollouts: completions are sampled after left-padded prompts, and both become inputs of one forward pass.

Axes: B rows, P tokens of the padded prompts, C tokens of the longest completion.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from craft.sampler import mixed_seed

ZERO_AFTER_PROMPT = ("token_type_ids", "mm_token_type_ids")  # 0: text
PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id")  # of a processor
# Sampling is from the model's own distribution, whatever a release's generation_config.json adds to it.
NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}
NEUTRAL_SAMPLING = {"min_p": 0.0, "typical_p": 1.0}


def generation_config(
    model: Any, args: Any, *, end_ids: Sequence[int], never: Sequence[int], pad_token_id: int, do_sample: bool
) -> GenerationConfig:
    """Return how completions are generated: by ``args`` (a PPOConfig), or greedily without ``do_sample``.

    They end with a token of ``end_ids``, and none of ``never`` is written.
    """
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    config.max_new_tokens, config.max_length, config.min_new_tokens = args.max_completion_length, None, None
    config.do_sample = do_sample
    for name, value in (NEUTRAL | NEUTRAL_SAMPLING).items():
        setattr(config, name, value if do_sample or name in NEUTRAL else None)
    config.temperature = args.temperature if do_sample else 1.0
    config.top_p = args.top_p if do_sample else 1.0
    config.top_k = args.top_k if do_sample else 50  # the default, of which greedy search does not warn
    config.eos_token_id = list(end_ids) or None
    config.suppress_tokens = [*(config.suppress_tokens or []), *never] or None
    config.pad_token_id = pad_token_id
    config.use_cache = True  # a trainer turns it off in the model's config
    return config


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return every token that ends a completion: those of the model's generation config and the tokenizer's own."""
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    return sorted({token for token in (*declared, tokenizer.eos_token_id) if token is not None})


def placeholder_ids(processing_class: Any) -> list[int]:
    """Return the tokens that stand for images and the like: written by a model, they would ask for one more."""
    found = (getattr(processing_class, name, None) for name in PLACEHOLDERS)
    return [token for token in found if token is not None]


def ended(input_ids_BT: Tensor, completion_mask_BC: Tensor, end_ids: Sequence[int]) -> Tensor:
    """Return whether each completion, the last C of the tokens, ended by itself [B], and not at the longest length."""
    ids_BC = input_ids_BT[:, -completion_mask_BC.shape[1] :]
    return (torch.isin(ids_BC, torch.tensor(end_ids).to(ids_BC)) & completion_mask_BC).any(1)


def sample_completions(
    model: Any, prompts: Mapping[str, Tensor], config: GenerationConfig, *, seed: int
) -> tuple[Tensor, Tensor]:
    """Return completions of left-padded prompts, [B, C], and the mask of their tokens, up to and with the end token.

    The draws depend on ``seed`` and the model alone. Modules' modes and torch's random state are as before afterwards.
    """
    device = prompts["input_ids"].device
    devices = [device] if device.type == "cuda" else []
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        written = model.generate(**prompts, generation_config=config)
    ids_BC = written[:, prompts["input_ids"].shape[1] :]
    ended_BC = torch.isin(ids_BC, torch.tensor(config.eos_token_id or [], device=device, dtype=ids_BC.dtype))
    mask_BC = (ended_BC.int().cumsum(1) - ended_BC.int()) == 0  # no end token before this one
    longest = int(mask_BC.sum(1).max())
    return ids_BC[:, :longest].clone(), mask_BC[:, :longest]


def with_completions(
    prompts: Mapping[str, Tensor], completion_ids_BC: Tensor, completion_mask_BC: Tensor
) -> dict[str, Tensor]:
    """Return model inputs of prompts followed by their completions: what is per token goes on, the rest stays.

    A completion's token sees what the prompt's last token sees of the images (cross_attention_mask), and is text
    (token_type_ids, mm_token_type_ids).
    """
    new = completion_ids_BC.shape[1]
    inputs = dict(prompts)
    inputs["input_ids"] = torch.cat([prompts["input_ids"], completion_ids_BC], dim=1)
    mask_BP = prompts["attention_mask"]
    inputs["attention_mask"] = torch.cat([mask_BP, completion_mask_BC.to(mask_BP.dtype)], dim=1)
    if "cross_attention_mask" in prompts:
        seen = prompts["cross_attention_mask"]  # [B, P, images, tiles]
        inputs["cross_attention_mask"] = torch.cat([seen, seen[:, -1:].expand(-1, new, *seen.shape[2:])], dim=1)
    for name in ZERO_AFTER_PROMPT:
        if name in prompts:
            types_BP = prompts[name]
            inputs[name] = torch.cat([types_BP, types_BP.new_zeros(len(types_BP), new)], dim=1)
    return inputs


def rollout_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of a rollout: another one for each optimizer step and process."""
    return mixed_seed(seed, step, rank)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and each module back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
