from pathlib import Path

import pytest

from inft.data.jsonl import rows
from inft.data.rows import BadRow, MissingSplit, Row
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig

CONFIG = MUNIChusLoadConfig()


def read(path: Path, config: MUNIChusLoadConfig = CONFIG, split: str = "train") -> list[Row | BadRow]:
    return list(rows(config, location=str(path), split=split))


def test_the_split_chooses_the_file(write_jsonl) -> None:
    for name in ("train", "valid", "test"):
        directory = write_jsonl([{"caption": name}], name=f"{name}.jsonl")
    for split, caption in {"train": "train", "validation": "valid", "test": "test"}.items():
        assert [row.caption for row in read(directory, split=split)] == [caption]


def test_a_file_is_the_configured_split_and_no_other(write_jsonl) -> None:
    file = write_jsonl([{"caption": "a"}], name="mine.jsonl") / "mine.jsonl"
    assert len(read(file)) == 1
    with pytest.raises(MissingSplit, match="has no split 'validation'"):
        read(file, split="validation")


def test_a_split_that_neither_file_nor_directory_tells_is_an_error(write_jsonl) -> None:
    directory = write_jsonl([{"caption": "a"}], name="pets.jsonl")
    for place in (directory, directory / "pets.jsonl"):
        for split in ("nosuch", "test"):
            with pytest.raises(MissingSplit, match=rf"has no split '{split}'.*--set data\.split=NAME"):
                read(place, MUNIChusLoadConfig(split=split), split)


def test_a_file_may_be_called_by_the_split_of_its_name(write_jsonl) -> None:
    for name, split in (("dev", "validation"), ("test-0", "test"), ("pets", "pets"), ("any", "training")):
        file = write_jsonl([{"caption": "a"}], name=f"{name}.jsonl") / f"{name}.jsonl"
        assert len(read(file, MUNIChusLoadConfig(split=split), split)) == 1
    config = MUNIChusLoadConfig(data=str(file.parent / "dev.jsonl"))  # read as training rows, it is not held out too
    with pytest.raises(MissingSplit):
        read(file.parent / "dev.jsonl", config, "validation")


def test_the_only_other_file_of_a_directory_is_its_training_split(write_jsonl) -> None:
    directory = write_jsonl([{"caption": "a"}], name="pets.jsonl")
    assert len(read(directory)) == 1
    with pytest.raises(MissingSplit):
        read(directory, split="validation")
    write_jsonl([{"caption": "a"}], name="birds.jsonl")
    with pytest.raises(UserError, match=r"several jsonl files \(birds.jsonl, pets.jsonl\)"):
        read(directory)


def test_captions_jsonl_with_a_list_gives_a_row_for_each_caption(write_jsonl) -> None:
    directory = write_jsonl([{"image": 1, "captions": ["a", "b"]}, {"image": 2, "captions": []}], name="captions.jsonl")
    found = read(directory)
    assert [row.caption for row in found] == ["a", "b", ""]
    assert found[0].image == found[1].image
    assert [row.where for row in found[:2]] == ["captions.jsonl line 1 caption 1", "captions.jsonl line 1 caption 2"]


def test_columns_can_have_other_names(write_jsonl) -> None:
    config = MUNIChusLoadConfig(
        columns={"image": "photo", "title": "head", "content": "body", "caption": "texts", "language": "lang"}
    )
    row = {"photo": "images/a.png", "head": "H", "body": "B", "texts": ["one", "two"], "lang": "ur", "caption": "no"}
    found = read(write_jsonl([row]), config)
    assert [(row.title, row.content, row.caption, row.language) for row in found] == [
        ("H", "B", "one", "ur"),
        ("H", "B", "two", "ur"),
    ]
    assert str(found[0].image.path).endswith("images/a.png")


def test_rows_without_a_language_have_the_default_one(write_jsonl) -> None:
    config = MUNIChusLoadConfig(default_language="fr")
    found = read(
        write_jsonl([{"caption": "a"}, {"caption": "b", "language": None}, {"caption": "c", "language": "si"}]), config
    )
    assert [row.language for row in found] == ["fr", "fr", "si"]


def test_a_column_missing_everywhere_is_an_error_that_names_the_columns(write_jsonl) -> None:
    directory = write_jsonl([{"image": 1, "txt": "a"}])
    with pytest.raises(
        UserError, match=r"no column 'caption' or 'captions'.*image, txt.*--set data\.columns\.caption="
    ):
        read(directory)


def test_a_mapped_column_that_is_nowhere_is_an_error(write_jsonl) -> None:
    with pytest.raises(UserError, match=r"no column 'headline'.*--set data\.columns\.title="):
        read(write_jsonl([{"caption": "a", "title": "b"}]), MUNIChusLoadConfig(columns={"title": "headline"}))


def test_an_unknown_key_of_the_mapping_is_an_error(write_jsonl) -> None:
    config = MUNIChusLoadConfig(columns={"captoin": "x"})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="'captoin', which is none of our columns"):
        read(write_jsonl([{"caption": "a"}]), config)


def test_a_caption_missing_in_one_row_is_a_bad_row(write_jsonl) -> None:
    found = read(write_jsonl([{"caption": "a"}, {"title": "T", "language": "ur"}]))
    assert found[1] == BadRow(
        where="train.jsonl line 2", reason="no caption column among title, language", language="ur", title="T"
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{oops", "not JSON"),
        ("[1, 2]", "a JSON list, not an object"),
        ("[" * 100_000, "not JSON"),
        ('{"caption": 7}', "its caption is int '7', not text"),
        ('{"caption": ["a", {"b": 1}]}', "its caption is dict"),
        ('{"caption": "a", "title": ["x"]}', "its title is list"),
        ('{"caption": "a", "language": 3}', "its language is int"),
        (b'{"caption": "\xff"}', "not UTF-8"),
    ],
)
def test_a_line_that_cannot_be_read_is_a_bad_row(tmp_path: Path, line: str | bytes, reason: str) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "train.jsonl").write_bytes(b'\xef\xbb\xbf{"caption": "good"}\n\n' + raw + b"\n")
    found = read(tmp_path)
    assert isinstance(found[0], Row)
    assert isinstance(found[-1], BadRow)
    assert found[-1].where == "train.jsonl line 3"
    assert reason in found[-1].reason
