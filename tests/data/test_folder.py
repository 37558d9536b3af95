import json
from pathlib import Path

import pytest

from inft.data.batches import load_samples
from inft.data.folder import rows
from inft.data.rows import BadRow, MissingSplit
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig

CONFIG = MUNIChusLoadConfig()


@pytest.fixture
def pets(tmp_path: Path, picture) -> Path:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    return tmp_path


def test_a_csv_beside_its_images_is_read(pets: Path) -> None:
    text = 'file_name,caption,language\n0.png,"a cat, asleep",en\n1.png,"two\nlines",ur\n2.png,بلی,ur\n'
    (pets / "metadata.csv").write_text("\ufeff" + text, encoding="utf-8")
    config = MUNIChusLoadConfig(data=str(pets), languages=("en", "ur"), eval_fraction=0.0)
    loaded = load_samples(config, quarantine_file=None, with_images=True)
    assert [(s.answer, s.language) for s in loaded.train] == [
        ("a cat, asleep", "en"),
        ("two lines", "ur"),
        ("بلی", "ur"),
    ]
    assert loaded.train[2].image.load().getpixel((0, 0)) == (2, 0, 40)
    assert loaded.source == "folder"


def test_a_jsonl_beside_its_images_is_read(pets: Path) -> None:
    (pets / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "caption": "a dog"}))
    config = MUNIChusLoadConfig(data=str(pets), eval_fraction=0.0)
    assert load_samples(config, quarantine_file=None, with_images=True).train[0].answer == "a dog"


def test_each_split_has_a_sub_directory(pets: Path) -> None:
    for split in ("train", "val"):
        (pets / split).mkdir()
        (pets / split / "metadata.csv").write_text(f"file_name,caption\na.png,{split}\n")
    for split, caption in {"train": "train", "validation": "val"}.items():
        assert [row.caption for row in rows(CONFIG, location=str(pets), split=split)] == [caption]
    with pytest.raises(MissingSplit, match="'test'; it has train, val"):
        list(rows(CONFIG, location=str(pets), split="test"))


def test_metadata_beside_the_images_has_no_split_but_train(pets: Path) -> None:
    (pets / "metadata.csv").write_text("file_name,caption\n0.png,a cat\n")
    for place in (pets, pets / "metadata.csv"):
        assert len(list(rows(CONFIG, location=str(place), split="train"))) == 1
        with pytest.raises(MissingSplit, match="has no split 'nosuch'; it has train"):
            list(rows(MUNIChusLoadConfig(split="nosuch"), location=str(place), split="nosuch"))


def test_a_line_with_too_many_or_too_few_fields_is_a_bad_row(pets: Path) -> None:
    (pets / "metadata.csv").write_text("file_name,caption\n0.png,a cat\n1.png,a dog, brown\n2.png\n")
    found = list(rows(CONFIG, location=str(pets), split="train"))
    assert [type(row) for row in found[1:]] == [BadRow, BadRow]
    assert "more fields" in found[1].reason
    assert found[1].where == "metadata.csv line 3"
    assert "fewer fields" in found[2].reason


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file_name,caption\n0.png,caf\xe9\n", "not UTF-8"),
        (b'file_name,caption\n0.png,"' + b"x" * 200_000, "quotation"),
    ],
)
def test_a_csv_that_cannot_be_read_is_a_clear_error(pets: Path, content: bytes, message: str) -> None:
    (pets / "metadata.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"metadata.csv.*{message}"):
        list(rows(CONFIG, location=str(pets), split="train"))


def test_a_csv_file_can_be_named(pets: Path) -> None:
    (pets / "pets.csv").write_text("image,caption\n0.png,a cat\n")
    config = MUNIChusLoadConfig(data=str(pets / "pets.csv"), eval_fraction=0.0)
    assert load_samples(config, quarantine_file=None, with_images=True).source == "folder"
