"""A user's values on their way to JSON: what is converted, what is refused, and in which words."""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from inft.client.images import decode_images
from inft.client.sdk.values import MOST_DEPTH, plain_images, plain_value
from params.errors import UserError


def png(*, size: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), "red").save(buffer, format="PNG")
    return buffer.getvalue()


@dataclass
class Section:
    rate: Any
    path: Path


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(4), 4),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (torch.tensor(3), 3),
        ([np.int64(1), 2], [1, 2]),
        (np.array([np.float64(1.5), None, "a"], dtype=object), [1.5, None, "a"]),
        ({"a": (np.int64(1), [torch.tensor([1, 2])])}, {"a": [1, [[1, 2]]]}),
        (Section(rate=np.float64(0.1), path=Path("a")), {"rate": 0.1, "path": "a"}),
        (range(3), [0, 1, 2]),
        ([True, None, 1, 2.5], [True, None, 1, 2.5]),
    ],
)
def test_values_become_what_json_has(value: Any, plain: Any):
    found = plain_value(value, name="x")
    assert json.dumps(found) == json.dumps(plain)


def holds_itself() -> list[Any]:
    value: list[Any] = [1]
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (holds_itself(), "holds itself"),
        (["a", "\ud800"], "x: row 1 has half of a surrogate pair"),
        ({"a": "b\udfff"}, "x.a has half of a surrogate pair"),
        ({"\ud800": 1}, "x has half of a surrogate pair"),
        (np.array([1j]), "holds complex"),
        (np.array([object()], dtype=object), "holds object"),
        ([b"a"], "holds bytes"),
        ({1, 2}, "holds set"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_its_field(value: Any, words: str):
    with pytest.raises(UserError, match=words):
        plain_value(value, name="x")


@given(st.integers(0, MOST_DEPTH - 1))
def test_lists_in_each_other_are_taken_as_deep_as_the_service_takes_them(depth: int):
    value: Any = []
    for _ in range(depth):
        value = [value]
    assert plain_value(value, name="x") == value


CODE = base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    "text",
    [
        CODE,
        "\n".join(CODE[i : i + 76] for i in range(0, len(CODE), 76)),
        f"data:image/PNG;base64,{CODE}",
        f"Data:image/png;charset=utf-8;base64,{CODE}",
        f" data:image/png;base64,\r\n{CODE}\n",
    ],
)
def test_base64_is_no_path_however_it_is_broken_into_lines(text: str):
    (decoded,) = decode_images(plain_images([text]), rows=1)
    assert decoded is not None
    assert decoded.load().size == (40, 40)


def test_a_path_is_still_a_path(tmp_path: Path):
    place = tmp_path / ("long directory name with spaces " * 3)
    place.mkdir()
    (place / "red.png").write_bytes(png())
    assert plain_images([str(place / "red.png"), None]) == [CODE, None]


@pytest.mark.parametrize(
    "wrong", [Image.new("F", (2, 2)), "a\0b.png", f"!{CODE}", "nowhere.png", 3, b"x" * (16 * 1024 * 1024 + 1)]
)
def test_what_is_no_image_is_refused_with_its_row_and_shortly(wrong: Any):
    with pytest.raises(UserError, match="images: row 1: ") as caught:
        plain_images([None, wrong])
    assert len(str(caught.value)) < 300
