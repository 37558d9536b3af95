"""Images beside texts and token rows, through the collator of the base's family.

Axes: B rows, T positions.
"""

import copy
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inft.client.errors import InvalidRequest
from inft.client.images import DecodedImage, decode_images
from inft.sample import Prompt, Sample

if TYPE_CHECKING:
    from inft.client.bases import Base
    from inft.models.collate import CaptionCollator

# A tokenizer keeps its padding as a state that a call sets: two threads in one at a time would read each other's.
TOKENIZER = threading.RLock()

Images = Sequence[DecodedImage | None]  # one for each row


def images_of(base: "Base", images: Any, *, rows: int) -> list[DecodedImage | None]:
    """Return each row's image; none without `images`. Errors: InvalidRequest as decode_images, and on a text model."""
    if images is None:
        return [None] * rows
    given = images if isinstance(images, Sequence) and not isinstance(images, str) else ()
    row = next((number for number, image in enumerate(given) if image is not None), None)
    if row is not None and not base.spec.takes_images:
        raise InvalidRequest(
            f"images: row {row} has an image, and {base.name} is a text model: leave images out, or take a "
            "vision-language model such as embedded/llama32.",
            row=row,
        )
    return decode_images(images, rows=rows)


def chat_sample(prompt: str, *, image: DecodedImage | None, row: int, completion: str = "") -> Sample:
    """Return a row as the families' collators take it."""
    return Sample(
        image=image, prompt=Prompt(instruction=prompt), answer=completion, language="", meta={"where": f"row {row}"}
    )


def unbounded(collator: "CaptionCollator") -> "CaptionCollator":
    """Return the collator without a bound, which would shorten or drop rows: here a row that is too long is refused."""
    same = copy.copy(collator)
    same.max_length = sys.maxsize
    return same


def chat_prompts(base: "Base", prompts: Sequence[str], images: Images) -> dict[str, Tensor]:
    """Return prompts as user's turns that end in the generation prompt, padded on the left, with their images."""
    rows = [
        chat_sample(prompt, image=image, row=row)
        for row, (prompt, image) in enumerate(zip(prompts, images, strict=True))
    ]
    with TOKENIZER:
        return unbounded(base.collator).prompts(rows)


def image_tokens(base: "Base", input_ids_BT: Tensor) -> Tensor:
    """Return where the placeholders of images stand [B, T]; nowhere for a text model."""
    if not base.spec.takes_images:
        return torch.zeros_like(input_ids_BT, dtype=torch.bool)
    return input_ids_BT == base.processor.image_token_id


def vision_of_rows(base: "Base", input_ids_BT: Tensor, images: Images) -> Mapping[str, Tensor]:
    """Return what the model takes beside token rows that have placeholders of their images, as sampled prompts do.

    Errors: InvalidRequest, with the row, for another number of placeholders than its image takes.
    """
    where_BT = image_tokens(base, input_ids_BT)
    if all(image is None for image in images):
        _require_placeholders(where_BT, torch.zeros(len(images), dtype=torch.int64))
        return {}
    vision = chat_prompts(base, [""] * len(images), images)
    model_ids = vision.pop("input_ids")
    grid = vision.pop("attention_mask").shape
    _require_placeholders(where_BT, image_tokens(base, model_ids).sum(1))
    # What is said of each token, such as which tiles it may look at, holds from the image's placeholder on.
    seen_BT = where_BT.cumsum(1) > 0
    return {
        name: _from_placeholder(tensor, seen_BT) if tensor.ndim > 2 and tensor.shape[:2] == grid else tensor
        for name, tensor in vision.items()
    }


def _from_placeholder(tensor: Tensor, seen_BT: Tensor) -> Tensor:
    """The values of the last token [B, T', ...] at all tokens that are seen [B, T], 0 elsewhere."""
    last = tensor[:, -1:]
    seen = seen_BT.reshape(*seen_BT.shape, *[1] * (tensor.ndim - 2))
    return torch.where(seen, last, torch.zeros_like(last))


def _require_placeholders(where_BT: Tensor, wanted_B: Tensor) -> None:
    for row, (found, wanted) in enumerate(zip(where_BT.sum(1).tolist(), wanted_B.tolist(), strict=True)):
        if found != wanted:
            what = f"its image takes {wanted}" if wanted else "it has no image"
            raise InvalidRequest(
                f"input_ids: row {row} has {found} image tokens, and {what}: give images and the prompt_tokens that "
                "sample returned for them, or prompt and completion.",
                row=row,
            )
