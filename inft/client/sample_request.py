"""A request to sample, checked field by field."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inft.client.batches import require_text
from inft.client.errors import ClientError, InvalidRequest
from inft.client.images import DecodedImage
from inft.client.prompts import prompt_inputs
from inft.client.vision import Images, images_of
from params.errors import UserError

if TYPE_CHECKING:
    from inft.client.bases import Base

MOST_ROWS = 256  # of a request: prompts times num_samples
MOST_NEW_TOKENS = 2**19  # of a request: rows times max_tokens
MOST_STOPS = 64
MOST_STOP_CHARACTERS = 1024
FIELDS = (
    "prompts",
    "images",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "stop_sequences",
    "seed",
    "num_samples",
    "include_logprobs",
)


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """A checked request to sample."""

    prompts: tuple[str, ...]
    images: tuple[DecodedImage | None, ...]  # one for each prompt
    max_tokens: int
    temperature: float  # 0: greedy
    top_p: float
    top_k: int  # 0: off
    stop_sequences: tuple[str, ...]
    seed: int | None  # None: the caller's
    num_samples: int
    include_logprobs: bool
    longest: int  # tokens of the longest prompt


def check_sample(base: "Base", payload: Mapping[str, Any]) -> SampleRequest:
    """Return the request that a payload describes; reads only, so that other threads may call it.

    On a text model a prompt is raw text after the tokenizer's start token, as a training row's is. On a
    vision-language model it is the user's turn of the family's chat template, with its image if it has one.
    Errors: InvalidRequest with the field, and the row, for a field that is unknown, missing or out of its range, for
    more than MOST_ROWS rows, an image on a text model, and a prompt that with `max_tokens` exceeds `base.context`.
    """
    if not isinstance(payload, Mapping):
        raise InvalidRequest(f"sample takes a mapping with prompts, not {type(payload).__name__}.")
    unknown = next((name for name in payload if name not in FIELDS), None)
    if unknown is not None:
        raise InvalidRequest(f"sample has no field {unknown!r:.60}: it takes {', '.join(FIELDS)}.")
    prompts = _prompts(payload.get("prompts"))
    images = tuple(images_of(base, payload.get("images"), rows=len(prompts)))
    max_tokens = _whole(payload, "max_tokens", 128, 1, base.context)
    num_samples = _whole(payload, "num_samples", 1, 1, MOST_ROWS)
    _require_few(len(prompts), num_samples, max_tokens)
    return SampleRequest(
        prompts=prompts,
        images=images,
        max_tokens=max_tokens,
        temperature=_number(payload, "temperature", 0.7, 0.0, 1e6),
        top_p=_number(payload, "top_p", 0.9, 0.0, 1.0, open_below=True),
        top_k=_whole(payload, "top_k", 50, 0, sys.maxsize),
        stop_sequences=_stops(payload.get("stop_sequences")),
        seed=None if payload.get("seed") is None else _whole(payload, "seed", 0, 0, 2**63 - 1),
        num_samples=num_samples,
        include_logprobs=_flag(payload, "include_logprobs"),
        longest=_longest(base, prompts, images, max_tokens),
    )


def _require_few(prompts: int, num_samples: int, max_tokens: int) -> None:
    rows = prompts * num_samples
    if rows > MOST_ROWS:
        raise InvalidRequest(
            f"sample asks for {rows} completions ({prompts} prompts, num_samples {num_samples}), more than "
            f"{MOST_ROWS}: split the request.",
            rows=rows,
        )
    if rows * max_tokens > MOST_NEW_TOKENS:
        raise InvalidRequest(
            f"sample asks for {rows} completions of up to {max_tokens} tokens, more than {MOST_NEW_TOKENS} tokens "
            "together: lower max_tokens or split the request.",
            rows=rows,
        )


def _longest(base: "Base", prompts: Sequence[str], images: Images, max_tokens: int) -> int:
    """The tokens of the longest prompt; InvalidRequest for one that leaves too few for the completion."""
    try:
        inputs = prompt_inputs(base, prompts, images)
    except ClientError:
        raise
    except UserError as error:
        raise InvalidRequest(str(error)) from error
    for row, length in enumerate(lengths := inputs["attention_mask"].sum(1).tolist()):
        if length + max_tokens > base.context:
            raise InvalidRequest(
                f"prompts: row {row} has {length} tokens, and with max_tokens of {max_tokens} that is more than the "
                f"{base.context} of the model: shorten it or lower max_tokens.",
                row=row,
            )
    return int(max(lengths))


def _prompts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise InvalidRequest("prompts: expected a list of texts, with one or more.")
    if len(value) > MOST_ROWS:
        raise InvalidRequest(f"prompts has {len(value)} rows, more than {MOST_ROWS}: split the request.")
    for row, prompt in enumerate(value):
        require_text("prompts", row, prompt)
    return tuple(value)


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or len(value) > MOST_STOPS:
        raise InvalidRequest(f"stop_sequences: expected a list of at most {MOST_STOPS} texts.")
    for row, stop in enumerate(value):
        require_text("stop_sequences", row, stop)
        if not 0 < len(stop) <= MOST_STOP_CHARACTERS:
            raise InvalidRequest(
                f"stop_sequences: row {row} has {len(stop)} characters: give 1 to {MOST_STOP_CHARACTERS}.", row=row
            )
    return tuple(value)


def _whole(payload: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = payload.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise InvalidRequest(f"{name} is {value!r:.60}: give a whole number from {least} to {most}.")
    return value


def _number(
    payload: Mapping[str, Any], name: str, default: float, least: float, most: float, *, open_below: bool = False
) -> float:
    value = payload.get(name, default)
    fits = type(value) in (int, float) and least <= value <= most
    if not fits or (open_below and value == least):
        above = f"above {least:g} and up to" if open_below else f"from {least:g} to"
        raise InvalidRequest(f"{name} is {value!r:.60}: give a number {above} {most:g}.")
    return float(value)


def _flag(payload: Mapping[str, Any], name: str) -> bool:
    value = payload.get(name, False)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} is {value!r:.60}: give true or false.")
    return value
