"""A user's batch as plain JSON values: tensors, arrays, images and paths become lists, numbers and texts.

What a batch means is checked by the engine, which names the row; here only what JSON cannot hold is refused.
"""

import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

from params.errors import UserError

PLAIN = (str, int, float, type(None))
# No path of an image file looks so: it has a suffix, and the smallest of image files has more characters.
BASE64 = re.compile(r"(data:image/[a-z0-9.+-]+;base64,)?[A-Za-z0-9+/]{64,}={0,2}")


def plain_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch as plain values; `images` may hold PIL images, paths, bytes or base64 texts of image files, None.

    Errors: UserError with the field for what is none of them, and for images that cannot be read.
    """
    if not isinstance(batch, Mapping):
        raise UserError(f"a batch is a mapping such as {{'input_ids': ...}}, not {type(batch).__name__}: give that.")
    plain = {str(name): plain_value(value, name=str(name)) for name, value in batch.items() if name != "images"}
    return plain | ({"images": plain_images(batch["images"])} if "images" in batch else {})


def plain_images(images: Any) -> list[str | None] | None:
    """Return images as base64 texts of image files, None for a row without one.

    Errors: UserError with the row for what is no image.
    """
    if images is None:
        return None
    if isinstance(images, str | bytes | PathLike) or not hasattr(images, "__iter__"):
        raise UserError("images: give a list with one entry for each row: an image, a path, or None.")
    return [_plain_image(image, row) for row, image in enumerate(images)]


def plain_value(value: Any, *, name: str) -> Any:
    """Return numbers, texts, lists, mappings, arrays and tensors as JSON has them.

    Errors: UserError with the field for anything else.
    """
    if hasattr(value, "tolist"):  # tensors and arrays, without importing either's library; a scalar becomes a number
        return value.tolist()
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, PathLike):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain_value(item, name=f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        if set(map(type, value)) <= {int, float}:  # rows of tokens: one look at all of them
            return list(value)
        return [plain_value(item, name=name) for item in value]
    raise UserError(f"{name} holds {type(value).__name__}: give numbers, texts, lists, arrays or tensors.")


def _plain_image(image: Any, row: int) -> str | None:
    from inft.client.images import encode_image  # brings Pillow, which a batch of texts does not need

    if image is None or (isinstance(image, str) and BASE64.fullmatch(image)):
        return image
    try:
        return encode_image(image)
    except UserError as error:
        raise UserError(f"images: row {row}: {error}") from error
