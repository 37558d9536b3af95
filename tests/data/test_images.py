import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from inft.data.images import BadImage, FileImage, ImageError, TableImage, check_images, file_image


def saved(tmp_path: Path, image: Image.Image, name: str, **options: object) -> FileImage:
    image.save(tmp_path / name, **options)
    return FileImage(tmp_path / name)


def close(colour: object, other: tuple[int, int, int], tolerance: int = 6) -> bool:
    assert isinstance(colour, tuple)
    return all(abs(a - b) <= tolerance for a, b in zip(colour, other, strict=True))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    image = saved(tmp_path, Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "cyan.jpg", quality=95).load()
    assert image.mode == "RGB"
    assert close(image.getpixel((3, 3)), (0, 255, 255))


@pytest.mark.parametrize("name", ["wide.png", "wide.tiff"])
def test_16_bit_greyscale_is_scaled_and_not_clipped(tmp_path: Path, name: str) -> None:
    wide = Image.new("I;16", (4, 1))
    for x, value in enumerate((0, 257, 32768, 65535)):
        wide.putpixel((x, 0), value)
    image = saved(tmp_path, wide, name).load()
    assert [image.getpixel((x, 0)) for x in range(4)] == [(0,) * 3, (1,) * 3, (127,) * 3, (255,) * 3]


def test_pixels_beyond_16_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="16 bits"):
        saved(tmp_path, Image.new("I", (2, 2), 70000), "deep.tiff").load()
    with pytest.raises(ImageError, match="floating-point"):
        saved(tmp_path, Image.new("F", (2, 2), 0.5), "float.tiff").load()


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "RGB", "RGBA"])
def test_every_common_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    assert saved(tmp_path, Image.new(mode, (5, 3)), "any.png").load().mode == "RGB"


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(tmp_path: Path, mode: str) -> None:
    clear = Image.new(mode, (2, 1), 0)
    clear.putpixel((1, 0), (0,) * (len(mode) - 1) + (255,))
    image = saved(tmp_path, clear, "clear.png").load()
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 0)) == (0, 0, 0)


def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path) -> None:
    image = saved(tmp_path, Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "half.png").load()
    assert close(image.getpixel((0, 0)), (127, 127, 127), tolerance=1)


def test_palette_transparency_is_composited_on_white(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    image = saved(tmp_path, palette, "palette.png", transparency=0).load()
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 0)) == (0, 0, 200)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    photo = Image.new("RGB", (16, 8), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown, it is 8 wide and 16 high
    assert saved(tmp_path, photo, "turned.jpg", exif=exif).load().size == (8, 16)


def test_the_first_picture_of_a_stereo_photo_is_taken(tmp_path: Path) -> None:
    sides = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    image = saved(tmp_path, sides[0], "stereo.mpo", save_all=True, append_images=sides[1:]).load()
    assert close(image.getpixel((4, 4)), (254, 0, 0))


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    image = saved(tmp_path, frames[0], "moving.gif", save_all=True, append_images=frames[1:]).load()
    assert image.size == (4, 4)
    assert image.getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize(("kind", "side"), [("PNG", 130), ("JPEG", 290)])
def test_a_truncated_image_is_refused(tmp_path: Path, kind: str, side: int) -> None:
    stream = io.BytesIO()
    Image.effect_noise((side, side), 100).convert("RGB").resize((side, side + 1)).save(stream, kind)
    assert len(stream.getvalue()) > 10_000
    (tmp_path / "cut").write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    with pytest.raises(ImageError, match=r"cut: damaged or truncated"):
        FileImage(tmp_path / "cut").load()


@pytest.mark.parametrize(
    ("name", "content"), [("note.png", b"dear editor"), ("page.png", b"<html>"), ("short.png", b"\x89PNG\r\n\x1a\n")]
)
def test_a_file_that_is_no_image_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=f"{name}: not an image of a known kind"):
        FileImage(tmp_path / name).load()


def test_an_empty_file_is_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "none.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"none\.png: is empty \(0 bytes\)"):
        FileImage(tmp_path / "none.png").load()
    with pytest.raises(ImageError, match="is empty"):
        TableImage(table=[{"image": b""}], index=0, column="image", roots=()).load()


def test_a_directory_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "dir.png").mkdir()
    with pytest.raises(ImageError, match=r"dir\.png is a directory"):
        file_image(tmp_path, "dir.png").load()


def test_postscript_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="known kind"):
        FileImage(tmp_path / "page.png").load()


def empty_png(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (empty_png(0, 0), "0 x 0"),
        (empty_png(7, 0), "7 x 0"),
        (b"GIF89a" + struct.pack("<HHBBB", 0, 5, 0, 0, 0) + b";", "0 x 5"),
        (b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 0, 0, 1, 24, 0, 0, 0, 0, 0, 0), "0 x 0"),
    ],
)
def test_an_image_without_pixels_is_refused(tmp_path: Path, content: bytes, size: str) -> None:
    (tmp_path / "none.png").write_bytes(content)
    with pytest.raises(ImageError, match=rf"none\.png: has 0 pixels \({size}\)"):
        FileImage(tmp_path / "none.png").load()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [60, 20])  # Pillow itself warns above the limit and refuses above twice the limit
def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    image = saved(tmp_path, Image.new("RGB", (10, 10)), "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match="too large"):
        image.load()


@pytest.mark.parametrize("name", ["images/none.png", "x" * 5000, "nul\0byte.png"])
def test_a_missing_image_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        file_image(tmp_path, name).load()


@pytest.mark.parametrize("name", ["../secret.png", "images/../../secret.png", "/etc/hostname", "..", "//etc/hostname"])
def test_a_path_that_leaves_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    assert isinstance(file_image(tmp_path, name), BadImage)
    with pytest.raises(ImageError, match="lies outside"):
        file_image(tmp_path, name).load()


@pytest.mark.parametrize(
    "name", ["https://x.org/a.png", "HTTP://x.org/a", "file:///etc/hostname", "data:image/png;base64,AA"]
)
def test_a_url_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match="is a URL"):
        file_image(tmp_path, name).load()


@pytest.mark.parametrize("name", [None, 7, "", [["a.png"]], {"a": 1}])
def test_what_is_no_path_is_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(ImageError, match="not a path"):
        file_image(tmp_path, name).load()


@pytest.mark.parametrize(("names", "count"), [([], 0), (["a.png", "a.png"], 2)])
def test_a_row_has_one_image(tmp_path: Path, names: list[str], count: int, picture) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    assert file_image(tmp_path, ["a.png"]) == file_image(tmp_path, "a.png")
    for image in (
        file_image(tmp_path, names),
        TableImage(table=[{"images": names}], index=0, column="images", roots=(tmp_path,)),
    ):
        with pytest.raises(ImageError, match=f"it has {count} images: a row has one"):
            image.load()


def test_an_absolute_path_inside_the_directory_is_taken(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    assert file_image(tmp_path, str(tmp_path / "a.png")).load().size == (2, 2)


def test_a_link_inside_the_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "disk" / "a.png")
    (tmp_path / "data" / "images").symlink_to(tmp_path / "disk")
    assert file_image(tmp_path / "data", "images/a.png").load().size == (2, 2)


def test_a_table_may_name_files_in_its_roots_only(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "data" / "a.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "b.png")
    rows = [{"image": {"bytes": None, "path": "a.png"}}, {"image": {"bytes": None, "path": str(tmp_path / "b.png")}}]
    images = [TableImage(table=rows, index=i, column="image", roots=(tmp_path / "data",)) for i in range(2)]
    assert images[0].load().size == (2, 2)
    with pytest.raises(ImageError, match="lies outside"):
        images[1].load()


class CountingImage:
    """An image that counts how often it is decoded."""

    def __init__(self, colour: str):
        self.colour, self.loads = colour, 0

    def load(self) -> Image.Image:
        self.loads += 1
        return Image.new("RGB", (2, 2), self.colour)


def test_each_distinct_image_is_decoded_once() -> None:
    red, also_red, blue = (CountingImage(colour) for colour in ("red", "red", "blue"))
    heard: list[int] = []
    digests = check_images([red, blue, also_red, red, red], on_progress=heard.append)
    assert [image.loads for image in (red, also_red, blue)] == [1, 1, 1]
    assert digests[red] == digests[also_red] != digests[blue]
    assert heard == [3]
