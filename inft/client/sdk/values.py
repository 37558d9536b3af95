"""A user's values as plain JSON values: tensors, arrays, images and paths become lists, numbers and texts.

What they mean is checked by the engine, which names the row; here only what JSON cannot hold is refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from os import PathLike
from typing import Any

from params.errors import UserError

PLAIN = (int, float, type(None))
_AT_ONCE = {int, float, bool, type(None)}  # types of a list's items that one look at all of them settles
MOST_DEPTH = 64  # lists and mappings in each other, as the service takes them
# No path of an image file looks so: it has a suffix, and the smallest of image files has more characters.
BASE64 = re.compile(r"[A-Za-z0-9+/]{64,}={0,2}")


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


def plain_value(value: Any, *, name: str, depth: int = 0) -> Any:
    """Return numbers, texts, lists, mappings, dataclasses, paths, arrays and tensors as JSON has them.

    Errors: UserError with the field for anything else, for half characters, and for lists in each other without end.
    """
    if depth > MOST_DEPTH:
        raise UserError(
            f"{name} has more than {MOST_DEPTH} lists and mappings in each other, or holds itself: make it flatter."
        )
    if hasattr(value, "tolist"):  # tensors and arrays, without importing either's library; a scalar becomes a number
        return plain_value(value.tolist(), name=name, depth=depth + 1)  # one of objects holds anything
    if isinstance(value, str):
        return _whole_text(value, name)
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, PathLike):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {
            _whole_text(str(key), name): plain_value(item, name=f"{name}.{key}" if depth < 2 else name, depth=depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        if set(map(type, value)) <= _AT_ONCE:  # rows of tokens
            return list(value)
        rows = enumerate(value)
        return [plain_value(item, name=name if depth else f"{name}: row {row}", depth=depth + 1) for row, item in rows]
    raise UserError(f"{name} holds {type(value).__name__}: give numbers, texts, lists, arrays or tensors.")


def _whole_text(text: str, name: str) -> str:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{name} has half of a surrogate pair, which is no text: give whole characters.")
    return text


def _plain_image(image: Any, row: int) -> str | None:
    from inft.client.images import encode_image  # brings Pillow, which a batch of texts does not need

    if image is None or (isinstance(image, str) and _is_encoded(image)):
        return image
    try:
        return encode_image(image)
    except UserError as error:
        raise UserError(f"images: row {row}: {error}") from error


def _is_encoded(text: str) -> bool:
    """Whether a text is base64 or a data URL, and no path; what is wrong in it is said by whoever decodes it."""
    plain = "".join(text.split())
    return plain[:5].lower() == "data:" or BASE64.fullmatch(plain) is not None
