"""Small data sets on disk, written by the tests that read them."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


def picture_bytes(number: int, *, size: tuple[int, int] = (6, 4), kind: str = "PNG") -> bytes:
    """An image file whose colour tells its number."""
    stream = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256 % 256, 40)).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def picture() -> Callable[..., bytes]:
    return picture_bytes


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as a jsonl file; an integer as image becomes the file of that picture."""

    def write(rows: Sequence[Mapping[str, Any]], *, name: str = "train.jsonl", directory: Path = tmp_path) -> Path:
        (directory / "images").mkdir(exist_ok=True, parents=True)
        lines = []
        for row in rows:
            values = dict(row)
            if isinstance(values.get("image"), int):
                number = values["image"]
                values["image"] = f"images/{number}.png"
                (directory / values["image"]).write_bytes(picture_bytes(number))
            lines.append(json.dumps(values, ensure_ascii=False))
        (directory / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return directory

    return write


@pytest.fixture
def news_rows() -> Callable[..., list[dict[str, Any]]]:
    """Rows of several articles, each captioned in every language."""

    def rows(languages: Sequence[str] = ("en", "ur"), *, articles: int = 20, first: int = 0) -> list[dict[str, Any]]:
        return [
            {
                "image": number,
                "title": f"Article {number}",
                "content": f"News text of article {number}.",
                "caption": f"caption {number} in {language}",
                "language": language,
            }
            for number in range(first, first + articles)
            for language in languages
        ]

    return rows


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what the datasets library caches out of the home directory."""
    config = pytest.importorskip("datasets").config
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
