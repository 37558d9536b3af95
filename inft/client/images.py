"""Images of a request: base64 texts of image files in, decoded images out; and the way back for the SDK."""

import base64
import binascii
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inft.client.errors import InvalidRequest
from inft.data.images import ImageError, decode

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_BYTES = 16 * 1024 * 1024  # of one image file: above what cameras write
MOST_PIXELS = 2**27  # of all images of a request together: 400 MB once decoded, which a small file can swell to
DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """An image in memory."""

    image: "Image"  # upright 8-bit RGB

    def load(self) -> "Image":
        """Return the image."""
        return self.image


def decode_images(images: Any, *, rows: int) -> list[DecodedImage | None]:
    """Return the image of each row, None where the row has null.

    Errors: InvalidRequest, with the row, for another number of images than rows, what is no base64 text, and a file
    that is damaged, of no known kind or too large.
    """
    if not isinstance(images, Sequence) or isinstance(images, str):
        raise InvalidRequest("images: expected a list with a base64 text or null for each row.")
    if len(images) != rows:
        raise InvalidRequest(f"images has {len(images)} entries for {rows} rows: give one for each, null for none.")
    decoded: list[DecodedImage | None] = []
    pixels = 0
    for row, text in enumerate(images):
        found = None if text is None else _decoded(text, row)
        decoded.append(found)
        pixels += 0 if found is None else found.image.width * found.image.height
        if pixels > MOST_PIXELS:
            raise InvalidRequest(
                f"images: rows 0 to {row} have {pixels} pixels, more than the {MOST_PIXELS} that a request may have: "
                "make the images smaller or send fewer rows.",
                row=row,
            )
    return decoded


def encode_image(image: "Image | bytes | str | Path") -> str:
    """Return the base64 text of an image: one of Pillow as PNG, the bytes of an image file, or a file by its path.

    The file is read here, by whoever calls this; nothing that receives the text opens a path.
    Errors: InvalidRequest for a file that cannot be read, and one above MOST_BYTES.
    """
    if isinstance(image, str | Path):
        try:
            content = Path(image).expanduser().read_bytes()
        except OSError as error:
            raise InvalidRequest(f"image {image}: {error.strerror or error}: give an image file.") from error
    elif isinstance(image, bytes):
        content = image
    elif callable(save := getattr(image, "save", None)):
        buffer = io.BytesIO()
        save(buffer, format="PNG")
        content = buffer.getvalue()
    else:
        raise InvalidRequest(f"an image is a PIL image, bytes or a path, not {type(image).__name__}.")
    if len(content) > MOST_BYTES:
        raise InvalidRequest(
            f"the image has {len(content)} bytes, more than the {MOST_BYTES} allowed: make it smaller."
        )
    return base64.b64encode(content).decode("ascii")


def _decoded(text: Any, row: int) -> DecodedImage:
    if not isinstance(text, str):
        raise InvalidRequest(f"images: row {row} is {type(text).__name__}: give the base64 text of a file.", row=row)
    prefix = DATA_URL.match(text)
    body = text[prefix.end() :] if prefix else text
    if len(body) > MOST_BYTES * 4 // 3 + 4:
        raise InvalidRequest(f"images: row {row} has more than the {MOST_BYTES} bytes allowed: shrink it.", row=row)
    try:
        content = base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"images: row {row} is no base64 text ({error}): encode the file.", row=row) from error
    try:
        return DecodedImage(image=decode(io.BytesIO(content)))
    except ImageError as error:
        raise InvalidRequest(f"images: row {row}: {error}.", row=row) from error
