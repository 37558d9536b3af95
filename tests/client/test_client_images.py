"""Images of a request: base64 in, pictures out, refusals with the row."""

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from inft.client import images
from inft.client.errors import InvalidRequest
from inft.client.images import decode_images, encode_image

RED = Image.new("RGB", (7, 5), (200, 30, 20))


def test_an_image_comes_back_pixel_by_pixel() -> None:
    (decoded,) = decode_images([encode_image(RED)], rows=1)
    assert decoded is not None
    assert decoded.load().size == (7, 5)
    assert decoded.load().tobytes() == RED.tobytes()


def test_a_path_bytes_and_a_picture_encode_to_the_same_picture(tmp_path: Path) -> None:
    RED.save(tmp_path / "red.png")
    content = (tmp_path / "red.png").read_bytes()
    texts = [encode_image(tmp_path / "red.png"), encode_image(str(tmp_path / "red.png")), encode_image(content)]
    assert texts == [base64.b64encode(content).decode()] * 3
    for decoded in decode_images([*texts, encode_image(RED)], rows=4):
        assert decoded is not None
        assert decoded.load().tobytes() == RED.tobytes()


def test_null_is_a_row_without_an_image() -> None:
    assert [found is None for found in decode_images([None, encode_image(RED), None], rows=3)] == [True, False, True]


@pytest.mark.parametrize(
    "prefix",
    [
        "data:image/png;base64,",
        "DATA:image/SVG+xml;BASE64,",
        "data:image/png;charset=utf-8;base64,",
        " data:image/PNG; name=a.png;\r\n base64,\n",
    ],
)
def test_a_data_url_is_its_base64(prefix: str) -> None:
    (decoded,) = decode_images([prefix + encode_image(RED)], rows=1)
    assert decoded is not None
    assert decoded.load().tobytes() == RED.tobytes()


def test_line_breaks_in_base64_are_no_damage() -> None:
    text = encode_image(RED)
    (decoded,) = decode_images([text[:40] + "\n" + text[40:] + "\r\n"], rows=1)
    assert decoded is not None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("not base64!", "no base64 text"),
        ("", "empty"),
        (base64.b64encode(b"plain words").decode(), "not an image"),
        (encode_image(RED)[:60], "damaged or truncated"),
        ("http://example.org/a.png", "no base64 text"),
        ("/etc/hostname", "no base64 text|not an image"),
        ("\u00e9" * 8, "no base64 text"),
        (7, "int"),
    ],
)
def test_a_wrong_image_is_refused_with_its_row(wrong: object, says: str) -> None:
    with pytest.raises(InvalidRequest, match=f"row 1.*({says})") as caught:
        decode_images([encode_image(RED), wrong], rows=2)
    assert caught.value.details == {"row": 1}


@pytest.mark.parametrize("wrong", [[None], "aGk=", {"0": None}, 3])
def test_images_are_one_for_each_row(wrong: object) -> None:
    with pytest.raises(InvalidRequest, match="images"):
        decode_images(wrong, rows=2)


def test_a_file_above_the_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = encode_image(RED)
    monkeypatch.setattr(images, "MOST_BYTES", 40)
    with pytest.raises(InvalidRequest, match="row 0 has more than the 40 bytes"):
        decode_images([text], rows=1)
    with pytest.raises(InvalidRequest, match="more than the 40 allowed"):
        encode_image(RED)


def test_small_files_that_swell_are_refused_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MOST_PIXELS", 2 * 7 * 5)
    assert len(decode_images([encode_image(RED)] * 2, rows=2)) == 2
    with pytest.raises(InvalidRequest, match="rows 0 to 2 have 105 pixels"):
        decode_images([encode_image(RED)] * 3, rows=3)


def test_transparency_is_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(buffer, format="PNG")
    (decoded,) = decode_images([encode_image(buffer.getvalue())], rows=1)
    assert decoded is not None
    assert decoded.load().tobytes() == b"\xff" * 12


@pytest.mark.parametrize("wrong", [Path("nowhere.png"), 3, None])
def test_what_is_no_image_cannot_be_encoded(wrong: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequest, match=r"nowhere\.png|not (int|NoneType)"):
        encode_image(wrong)  # type: ignore[arg-type]


def test_a_picture_in_memory_is_turned_and_laid_on_white_as_its_file_is(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    two_colours = Image.new("RGB", (8, 4), "white")
    two_colours.paste("red", (0, 0, 2, 4))
    two_colours.save(tmp_path / "turned.png", exif=exif)
    Image.new("LA", (3, 2), (10, 0)).save(tmp_path / "clear.png")
    Image.new("I;16", (3, 2), 40_000).save(tmp_path / "deep.png")
    for name in ("turned.png", "clear.png", "deep.png"):
        with Image.open(tmp_path / name) as opened:
            by_path, in_memory = decode_images([encode_image(tmp_path / name), encode_image(opened)], rows=2)
        assert by_path is not None
        assert in_memory is not None
        assert by_path.load().size == in_memory.load().size
        assert by_path.load().tobytes() == in_memory.load().tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "LA", "RGBX"])
def test_a_picture_of_any_mode_that_rgb_can_show_is_taken(mode: str) -> None:
    (decoded,) = decode_images([encode_image(Image.new("RGB", (7, 5)).convert(mode))], rows=1)
    assert decoded is not None
    assert decoded.load().mode == "RGB"


def unreadable(tmp_path: Path) -> Image.Image:
    """A picture of a file that has gone bad since it was opened."""
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:200])
    return Image.open(path)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (Image.new("F", (2, 2)), "of mode F .*convert it to RGB"),
        (Image.new("RGB", (0, 2)), "has 0 pixels"),
        (unreadable, "truncated"),
        ("a\0b.png", r"'a\\x00b.png'.*give an image file"),
        ("~nobody-of-this-name/a.png", "give an image file"),
        ("x" * 5000, "give an image file"),
    ],
)
def test_a_picture_that_cannot_be_used_is_a_users_mistake_and_told_shortly(
    image: object, says: str, tmp_path: Path
) -> None:
    given = image(tmp_path) if callable(image) else image
    with pytest.raises(InvalidRequest, match=says) as caught:
        encode_image(given)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 300


def test_a_small_file_of_many_pixels_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("1", (9400, 9400)).save(buffer, format="PNG")
    assert len(buffer.getvalue()) < 20_000
    monkeypatch.setattr(images, "decode", lambda file: pytest.fail("it was decoded"))
    with pytest.raises(InvalidRequest, match="row 0 has 9400 x 9400 pixels, more than the 33554432") as caught:
        decode_images([encode_image(buffer.getvalue())], rows=1)
    assert caught.value.details == {"row": 0}


def test_the_bound_lets_through_more_than_any_processor_reads() -> None:
    assert 10 * max(4 * 560 * 560, 13 * 364 * 364) < images.MOST_IMAGE_PIXELS
