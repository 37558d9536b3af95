"""Images that are read when they are needed, always as upright 8-bit RGB on white."""

import hashlib
import io
import os
import re
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageOps

from inft.sample import ImageRef
from params.errors import UserError

# Pixels only: Pillow would start Ghostscript for an EPS.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "TGA")
# What Pillow's readers raise on damaged files; a bomb is refused before a pixel is read.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError, RuntimeError, struct.error)
# First bytes of a file -> the layout and place of width and height: Pillow takes an image of 0 pixels for no image.
_SIZES = {b"\x89PNG\r\n\x1a\n": (">II", 16), b"GIF8": ("<HH", 6), b"BM": ("<ii", 18)}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")
_PORTION = 256  # images between two progress reports
_SIXTEEN_TO_EIGHT = [value // 257 for value in range(65536)]  # 65535 -> 255: white stays white


class ImageError(UserError):
    """An image that cannot be used; the message is the reason."""


@dataclass(frozen=True, slots=True)
class FileImage:
    """An image file."""

    path: Path

    def load(self) -> Image.Image:
        """Return the image as RGB, upright, alpha composited on white; ImageError when it cannot be read."""
        if os.path.isdir(self.path):
            raise ImageError(f"image {self.path} is a directory")
        if not os.path.isfile(self.path):  # unlike Path.is_file it takes a name that is too long for the file system
            raise ImageError(f"image {self.path} does not exist")
        try:
            return decode(self.path)
        except ImageError as error:
            raise ImageError(f"image {self.path}: {error}") from error


@dataclass(frozen=True, slots=True, eq=False)
class TableImage:
    """An image in a table of the datasets library, whose files are memory-mapped: the row is read when it is needed."""

    table: Any  # table[index] is a mapping with the column
    index: int
    column: str
    roots: tuple[Path, ...]  # directories that a row without bytes may name a file of

    def load(self) -> Image.Image:
        """Return the image as RGB, upright, alpha composited on white; ImageError when it cannot be read."""
        value = self.table[self.index][self.column]
        if isinstance(value, list | tuple):
            if len(value) != 1:
                raise ImageError(f"it has {len(value)} images: a row has one")
            value = value[0]
        content = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(content, bytes):
            return decode(io.BytesIO(content))
        path = value.get("path") if isinstance(value, dict) else value
        inside = [file_image(root, path) for root in self.roots]
        return next((image for image in inside if isinstance(image, FileImage)), inside[0]).load()


@dataclass(frozen=True, slots=True)
class BadImage:
    """The image of a row that names none that may be read: loading it raises the reason."""

    reason: str

    def load(self) -> Image.Image:
        """Raise ImageError with the reason."""
        raise ImageError(self.reason)


def peek_size(image: ImageRef) -> tuple[int, int] | None:
    """Return (width, height) of an image file from its header alone; None where only decoding would tell."""
    return header_size(image.path) if isinstance(image, FileImage) else None


def header_size(file: Path | IO[bytes]) -> tuple[int, int] | None:
    """Return (width, height) as the header of an image file says; None where it says nothing."""
    try:
        with Image.open(file, formats=_FORMATS) as opened:
            return opened.size
    except (*_DAMAGE, Image.DecompressionBombError):
        return None


def file_image(directory: Path, name: Any) -> FileImage | BadImage:
    """Return the image that a row names by its path in ``directory``; a BadImage for a URL or a path that leaves it.

    A list of one path is that path. A link inside the directory may point elsewhere: its owner set it, not the text of
    a row.
    """
    if isinstance(name, list | tuple):
        if len(name) != 1:
            return BadImage(f"it has {len(name)} images: a row has one")
        name = name[0]
    if not isinstance(name, str) or not name.strip():
        return BadImage(f"its image is {name!r:.60}, not a path")
    if _URL.match(name):
        return BadImage(f"image {name!r:.120} is a URL: download the images and name the files")
    base = os.path.abspath(directory)
    path = os.path.normpath(os.path.join(base, name))
    if os.path.commonpath([base, path]) != base:
        return BadImage(f"image {name!r:.120} lies outside {directory}")
    return FileImage(Path(path))


def decode(file: Path | IO[bytes]) -> Image.Image:
    """Decode an image file whole: first frame, EXIF turned, RGB, 8 bits a channel, transparency on white.

    Errors: ImageError with the reason when it is damaged, no image, empty or above Pillow's decompression limit.
    """
    try:
        with Image.open(file, formats=_FORMATS) as opened:
            _check_size(opened.size)
            opened.load()
            return _upright(opened)
    except Image.UnidentifiedImageError as error:
        raise ImageError(_why_unknown(file)) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"too large: {error}") from error
    except ImageError:
        raise
    except _DAMAGE as error:
        raise ImageError(f"damaged or truncated ({error})") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an image in memory as `decode` returns a file's: EXIF turned, RGB, 8 bits, transparency on white.

    Errors: ImageError with the reason when it has no pixels, cannot be read or has no meaning in RGB.
    """
    if 0 in image.size:
        raise ImageError(f"has 0 pixels ({image.width} x {image.height})")
    try:
        return _upright(image)
    except ImageError:
        raise
    except _DAMAGE as error:
        raise ImageError(f"cannot be used ({error})") from error


def _upright(image: Image.Image) -> Image.Image:
    return _rgb(ImageOps.exif_transpose(image))


def _why_unknown(file: Path | IO[bytes]) -> str:
    """Why Pillow finds no image in a file: it is empty, has 0 pixels, or is of another kind."""
    with file.open("rb") if isinstance(file, Path) else nullcontext(file) as stream:
        stream.seek(0)
        head = stream.read(32)
    if not head:
        return "is empty (0 bytes)"
    for signature, (layout, place) in _SIZES.items():
        if head.startswith(signature) and len(head) >= place + struct.calcsize(layout):
            width, height = struct.unpack_from(layout, head, place)
            if 0 in (width, height):
                return f"has 0 pixels ({width} x {height})"
    return f"not an image of a known kind ({', '.join(_FORMATS)})"


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ImageError(f"too large: {width} x {height} pixels, above Pillow's limit of {limit}")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _eight_bit(image)
    if image.mode == "F":
        raise ImageError("floating-point pixels have no defined white; save it with 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit greyscale to 8 bits; Pillow's own convert would clip it at 255."""
    wide = image.convert("I")
    extrema: Any = wide.getextrema()
    if extrema[0] < 0 or extrema[1] > 65535:
        raise ImageError(f"pixel values {extrema[0]} to {extrema[1]} do not fit 16 bits; save it with 8 or 16 bits")
    return wide.point(_SIXTEEN_TO_EIGHT, "L")


def pixel_digest(image: Image.Image) -> str:
    """Return the sha256 of a decoded image: equal for equal pictures, whatever their file."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def check_images(
    images: Iterable[ImageRef], *, on_progress: Callable[[int], None] | None = None
) -> dict[ImageRef, str | ImageError]:
    """Decode each distinct image once and return its pixel digest, or why it cannot be used.

    ``on_progress`` hears how many images are done.
    """
    distinct = list(dict.fromkeys(images))
    results: dict[ImageRef, str | ImageError] = {}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        # In portions, so that a data set of a million images does not queue a million futures.
        for start in range(0, len(distinct), _PORTION):
            portion = distinct[start : start + _PORTION]
            results.update(zip(portion, threads.map(_digest_or_error, portion), strict=True))
            if on_progress is not None:
                on_progress(len(results))
    return results


def _digest_or_error(image: ImageRef) -> str | ImageError:
    try:
        return pixel_digest(image.load())
    except ImageError as error:
        return error
