"""Images of a request: base64 texts of image files in, decoded images out; and the way back for the SDK."""

import base64
import binascii
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from inft.client.errors import InvalidRequest
from inft.data.images import ImageError, as_rgb, decode, header_size

MOST_BYTES = 16 * 1024 * 1024  # of one image file: above what cameras write
# A small file can swell to them, at 4 bytes each in memory. The families' processors read 2 million of an image at
# most: 4 tiles of 560 x 560 (Llama 3.2), 13 of 364 x 364 (Aya).
MOST_IMAGE_PIXELS = 2**25
MOST_PIXELS = 2**26  # of all images of a request together
MOST_SHOWN = 80  # characters of a path in a message
DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+(;[a-z0-9-]+=[^;,]*)*;base64,", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """An image in memory."""

    image: Image  # upright 8-bit RGB

    def load(self) -> Image:
        """Return the image."""
        return self.image


def decode_images(images: Any, *, rows: int) -> list[DecodedImage | None]:
    """Return the image of each row, None where the row has null.

    Errors: InvalidRequest, with the row, for another number of images than rows, what is no base64 text, and a file
    that is damaged, of no known kind or too large. The sizes are those of the headers, so that nothing that is too
    large is decoded.
    """
    if not isinstance(images, Sequence) or isinstance(images, str):
        raise InvalidRequest("images: expected a list with a base64 text or null for each row.")
    if len(images) != rows:
        raise InvalidRequest(f"images has {len(images)} entries for {rows} rows: give one for each, null for none.")
    decoded: list[DecodedImage | None] = []
    pixels = 0
    for row, text in enumerate(images):
        if text is None:
            decoded.append(None)
            continue
        content = _content(text, row)
        pixels += _pixels(content, row)
        if pixels > MOST_PIXELS:
            raise InvalidRequest(
                f"images: rows 0 to {row} have {pixels} pixels, more than the {MOST_PIXELS} that a request may have: "
                "make the images smaller or send fewer rows.",
                row=row,
            )
        decoded.append(_decoded(content, row))
    return decoded


def encode_image(image: Image | bytes | str | Path) -> str:
    """Return the base64 text of an image: one of Pillow as PNG, the bytes of an image file, or a file by its path.

    One of Pillow is turned as its EXIF says and laid on white, as its file would be. A file is read here, by whoever
    calls this; nothing that receives the text opens a path.
    Errors: InvalidRequest for what cannot be read or is no picture, and for a file above MOST_BYTES.
    """
    if isinstance(image, str | Path):
        content = _file_content(image)
    elif isinstance(image, bytes):
        content = image
    elif isinstance(image, Image):
        content = _png(image)
    else:
        raise InvalidRequest(f"an image is a PIL image, bytes or a path, not {type(image).__name__}.")
    if len(content) > MOST_BYTES:
        raise InvalidRequest(
            f"the image has {len(content)} bytes, more than the {MOST_BYTES} allowed: make it smaller."
        )
    return base64.b64encode(content).decode("ascii")


def _file_content(path: str | Path) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL in it; RuntimeError: ~ of nobody
        said = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"image {str(path)!r:.{MOST_SHOWN}}: {said}: give an image file.") from error


def _png(image: Image) -> bytes:
    try:
        upright = as_rgb(image)
    except ImageError as error:
        raise InvalidRequest(f"the image of mode {image.mode} {error}: convert it to RGB.") from error
    buffer = io.BytesIO()
    upright.save(buffer, format="PNG")
    return buffer.getvalue()


def _content(text: Any, row: int) -> bytes:
    """The bytes of an image file that a base64 text or a data URL holds."""
    if not isinstance(text, str):
        raise InvalidRequest(f"images: row {row} is {type(text).__name__}: give the base64 text of a file.", row=row)
    plain = "".join(text.split())
    prefix = DATA_URL.match(plain)
    body = plain[prefix.end() :] if prefix else plain
    if len(body) > MOST_BYTES * 4 // 3 + 4:
        raise InvalidRequest(f"images: row {row} has more than the {MOST_BYTES} bytes allowed: shrink it.", row=row)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"images: row {row} is no base64 text ({error}): encode the file.", row=row) from error


def _pixels(content: bytes, row: int) -> int:
    """What the header says; 0 where it says nothing, which decoding gives the reason of."""
    width, height = header_size(io.BytesIO(content)) or (0, 0)
    if width * height > MOST_IMAGE_PIXELS:
        raise InvalidRequest(
            f"images: row {row} has {width} x {height} pixels, more than the {MOST_IMAGE_PIXELS} that an image may "
            "have: make it smaller.",
            row=row,
        )
    return width * height


def _decoded(content: bytes, row: int) -> DecodedImage:
    try:
        return DecodedImage(image=decode(io.BytesIO(content)))
    except ImageError as error:
        raise InvalidRequest(f"images: row {row}: {error}.", row=row) from error
