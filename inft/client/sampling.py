"""Completions from the current weights: batched generation with a cache, and rows with seeds of their own.

A row's randomness comes from a generator of its own, seeded by the request's seed, the row's prompt and image, and how
many rows before it have the same: so it does not depend on its neighbours or its place, `num_samples` of n is the same
as the prompt n times, and a prompt sampled alone gets what it gets among others.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from inft.client.drawing import AllStopped, Draw, Row
from inft.client.prompts import padding_of, prompt_inputs
from inft.client.sample_request import SampleRequest, check_sample
from inft.data.images import pixel_digest
from inft.evaluation.generate import evaluating

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from inft.client.bases import Base

__all__ = ["SampleRequest", "check_sample", "sample"]

ROWS_AT_ONCE = 32  # in one generation
TOKENS_AT_ONCE = 2**17  # of all rows in one generation, which bounds its cache


def sample(base: "Base", request: SampleRequest, *, seed: int, step: int) -> dict[str, Any]:
    """Return {"samples": [...], "model_step": step}: `num_samples` completions of each prompt, next to each other.

    `seed` counts where the request has none. `tokens` are all that were drawn, the end token or the stop text's own
    tokens included, and `tokens_generated` counts them; `completion` is their text without special tokens, up to where
    a stop text begins. `logprobs` are those of the model itself, before temperature, top_k and top_p.
    The model's mode, its generation config and every global random state are as before afterwards.
    Errors: NotFinite for logits that are not finite.
    """
    seed = seed if request.seed is None else request.seed
    numbers = [number for number in range(len(request.prompts)) for _ in range(request.num_samples)]
    generators = _generators(request, numbers, seed)
    rows = max(1, min(ROWS_AT_ONCE, TOKENS_AT_ONCE // (request.longest + request.max_tokens)))
    samples: list[dict[str, Any]] = []
    with evaluating(base.model):
        for start in range(0, len(numbers), rows):
            part = slice(start, start + rows)
            samples += _generate(base, request, numbers[part], generators[part])
    return {"samples": samples, "model_step": step}


def _generate(
    base: "Base", request: SampleRequest, numbers: Sequence[int], generators: Sequence[torch.Generator]
) -> list[dict[str, Any]]:
    from transformers import LogitsProcessorList, StoppingCriteriaList

    inputs = prompt_inputs(
        base, [request.prompts[number] for number in numbers], [request.images[number] for number in numbers]
    )
    prompts = [
        ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    ends, stops = _ends(base, request.stop_sequences)
    rows = [
        Row(tokenizer=base.tokenizer, last=ids[-1], generator=generator, ends=ends, stops=stops)
        for ids, generator in zip(prompts, generators, strict=True)
    ]
    draw = Draw(rows, temperature=request.temperature, top_k=request.top_k, top_p=request.top_p)
    with _plainly(base.model, max_new_tokens=request.max_tokens, padding=padding_of(base)) as config:
        base.model.generate(
            **{name: tensor.to(base.device) for name, tensor in inputs.items()},
            generation_config=config,
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList([AllStopped(rows)]),
        )
    found = zip(numbers, rows, prompts, strict=True)
    return [_result(base, request, number, row, ids) for number, row, ids in found]


def _result(base: "Base", request: SampleRequest, number: int, row: Row, prompt: list[int]) -> dict[str, Any]:
    text = row.text()
    if base.spec.takes_images:  # templates write markers that not every tokenizer declares as special
        text = base.collator.control.sub("", text).strip()
    result = {
        "prompt": request.prompts[number],
        "completion": text,
        "tokens_generated": len(row.tokens),
        "finish_reason": "stop" if row.stopped else "length",
    }
    if request.include_logprobs:
        result |= {"prompt_tokens": prompt, "tokens": row.tokens, "logprobs": row.logprobs}
    return result


@contextmanager
def _plainly(model: "PreTrainedModel", *, max_new_tokens: int, padding: int) -> Iterator["GenerationConfig"]:
    """A generation config with nothing between the logits and the draw.

    `generate` fills what a config leaves out from the model's own, which may hold a repetition penalty or suppressed
    tokens, so the model has this one meanwhile. No end token: rows end where Draw says.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    # Training turns the cache off in the model's config; decoding without it would be quadratic.
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, pad_token_id=padding)
    model.generation_config = config
    try:
        yield config
    finally:
        model.generation_config = own


def _ends(base: "Base", stop_sequences: Sequence[str]) -> tuple[frozenset[int], list[str]]:
    """The tokens that end a completion, and the stop texts that are no token of their own.

    Tuning on texts teaches the tokenizer's end token, tuning on turns the template's; the model's own are its makers'.
    """
    own = base.model.generation_config.eos_token_id
    ends = {base.tokenizer.eos_token_id, base.collator.end_token_id, *(own if isinstance(own, list) else [own])}
    # The text leaves special tokens out, so as texts they would never be found.
    special = {str(token): number for number, token in base.tokenizer.added_tokens_decoder.items() if token.special}
    ends |= {special[stop] for stop in stop_sequences if stop in special}
    return frozenset(ends - {None}), [stop for stop in stop_sequences if stop not in special]


def _generators(request: SampleRequest, numbers: Sequence[int], seed: int) -> list[torch.Generator]:
    pictures = ["" if image is None else pixel_digest(image.load()) for image in request.images]
    seen: Counter[tuple[str, str]] = Counter()
    generators = []
    for number in numbers:
        key = request.prompts[number], pictures[number]
        digest = hashlib.sha256(repr((seed, *key, seen[key])).encode()).digest()
        seen[key] += 1
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))
    return generators
