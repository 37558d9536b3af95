"""From a user's batch to what a model is called with: token rows, texts, and images with their texts.

Axes: B rows, T positions.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inft.client.errors import ClientError, InvalidRequest
from inft.client.losses.batch import Batch, parse_batch
from inft.client.losses.inputs import IGNORED
from inft.client.vision import TOKENIZER, chat_sample, image_tokens, images_of, unbounded, vision_of_rows
from params.errors import UserError

if TYPE_CHECKING:
    from inft.client.bases import Base

TEXTS = ("prompt", "completion")


@dataclass(frozen=True, kw_only=True)
class ModelBatch:
    """A checked batch on the CPU, and what its images became."""

    batch: Batch
    vision: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))  # as the family's model names it


def prepare_batch(base: "Base", mapping: Mapping[str, Any], *, max_length: int, batch_size: int) -> ModelBatch:
    """Return a user's batch, checked and ready for `base`.

    Token rows are taken as they are. Those of images hold their placeholders, as `prompt_tokens` of `sample` do; a
    placeholder, and a token after padding, is never supervised.
    On a text model `prompt` and `completion` are tokenised plainly, as inft.client.losses.texts says. On a
    vision-language model they are the two turns of the family's chat template, labelled on the answer and its end of
    turn, whether the row has an image in `images` or not: rows with and without one are framed alike, and as `sample`
    frames its prompts. No row is shortened or dropped.
    Errors: InvalidRequest that names the field and row, with the remedy: more rows than `batch_size`, a row above
    `max_length` tokens, image tokens included, an image on a text model, placeholders that do not fit the images,
    and all that `parse_batch` and `decode_images` refuse.
    """
    try:
        return _prepared(base, mapping, max_length=max_length, batch_size=batch_size)
    except ClientError:
        raise
    except UserError as error:
        raise InvalidRequest(str(error)) from error


def model_inputs(base: "Base", model_batch: ModelBatch) -> dict[str, Tensor]:
    """Return the keyword arguments of a forward pass on base.device, labels left out.

    Positions are counted over real tokens where a row has padding on its left, so that it reads as it does alone;
    other batches are called without positions, as a plain call of the model is.
    """
    batch = model_batch.batch
    mask_BT = batch.attention_mask_BT
    inputs = {"input_ids": batch.input_ids_BT, "attention_mask": mask_BT, **model_batch.vision}
    shifted = bool((mask_BT[:, 1:] > mask_BT[:, :-1]).any())
    # A model that takes no positions, such as one with ALiBi, derives them from the mask.
    if shifted and "position_ids" in inspect.signature(base.model.forward).parameters:
        inputs["position_ids"] = (mask_BT.cumsum(1) - 1).clamp(min=0)
    return {name: tensor.to(base.device) for name, tensor in inputs.items()}


def require_text(name: str, row: int, text: Any) -> None:
    """Raise InvalidRequest for what is no text, and for half characters, which JSON can hold and UTF-8 cannot."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{name}: row {row} is {_kind(text)}: give a text.", row=row)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidRequest(f"{name}: row {row} has half of a surrogate pair: give whole characters.", row=row)


def _prepared(base: "Base", mapping: Mapping[str, Any], *, max_length: int, batch_size: int) -> ModelBatch:
    if not isinstance(mapping, Mapping):
        raise InvalidRequest(f"a batch is a mapping with input_ids, or prompt and completion, not {_kind(mapping)}.")
    if "image" in mapping:
        raise InvalidRequest("the batch has a field 'image'; did you mean 'images'?")
    _require_few_rows(mapping, batch_size)
    plain = {name: value for name, value in mapping.items() if name != "images"}
    if base.spec.takes_images and "input_ids" not in mapping and all(name in mapping for name in TEXTS):
        return _chat_batch(base, plain, mapping.get("images"), max_length=max_length)
    plain |= {name: _texts(name, plain[name]) for name in TEXTS if name in plain}
    with TOKENIZER:
        batch = parse_batch(plain, vocab_size=_most_ids(base), max_length=max_length, tokenizer=base.tokenizer)
    images = images_of(base, mapping.get("images"), rows=len(batch.input_ids_BT))
    vision = vision_of_rows(base, batch.input_ids_BT, images)
    return ModelBatch(batch=replace(batch, labels_BT=_predictable(base, batch)), vision=MappingProxyType(dict(vision)))


def _predictable(base: "Base", batch: Batch) -> Tensor:
    """The labels without those of images' placeholders, and of a token after padding, which nothing predicts."""
    mask_BT = batch.attention_mask_BT
    after_padding_BT = torch.zeros_like(mask_BT, dtype=torch.bool)
    after_padding_BT[:, 1:] = mask_BT[:, :-1] == 0
    return batch.labels_BT.masked_fill(after_padding_BT | image_tokens(base, batch.input_ids_BT), IGNORED)


def _chat_batch(base: "Base", mapping: Mapping[str, Any], images: Any, *, max_length: int) -> ModelBatch:
    prompts, completions = (_texts(name, mapping[name]) for name in TEXTS)
    if len(prompts) != len(completions):
        raise InvalidRequest(f"prompt has {len(prompts)} rows and completion {len(completions)}: give as many.")
    decoded = images_of(base, images, rows=len(prompts))
    samples = [
        chat_sample(prompt, image=image, row=row, completion=completion)
        for row, (prompt, completion, image) in enumerate(zip(prompts, completions, decoded, strict=True))
    ]
    with TOKENIZER:
        tensors = unbounded(base.collator)(samples)
    lengths = tensors["attention_mask"].sum(1).tolist()
    for row, length in enumerate(lengths):
        if length > max_length:
            of_image = ", those of its image included" if decoded[row] is not None else ""
            raise InvalidRequest(
                f"row {row} has {length} tokens{of_image}, more than the {max_length} allowed: shorten its texts.",
                row=row,
            )
    rows = {name: tensors.pop(name) for name in ("input_ids", "attention_mask", "labels")}
    extras = {name: value for name, value in mapping.items() if name not in TEXTS}
    batch = parse_batch({**extras, **rows}, vocab_size=_most_ids(base), max_length=max_length)
    return ModelBatch(batch=batch, vision=MappingProxyType(tensors))


def _most_ids(base: "Base") -> int:
    """How many token ids there are: the placeholder of an image may stand outside the vocabulary that is predicted."""
    if not base.spec.takes_images:
        return base.vocab_size
    return max(base.vocab_size, int(base.processor.image_token_id) + 1)


def _texts(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not texts:
        raise InvalidRequest(f"{name}: expected a text or a list of texts.")
    for row, text in enumerate(texts):
        require_text(name, row, text)
    return list(texts)


def _require_few_rows(mapping: Mapping[str, Any], batch_size: int) -> None:
    for name in ("input_ids", *TEXTS):
        value: Any = mapping.get(name)
        rows = len(value) if isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0 else 1
        if rows > batch_size:
            raise InvalidRequest(
                f"{name} has {rows} rows, more than the client's batch_size of {batch_size}: split the batch over "
                "several forward_backward, or create the client with a larger batch_size.",
                rows=rows,
            )


def _kind(value: Any) -> str:
    return type(value).__name__
