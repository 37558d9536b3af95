from pathlib import Path

import pytest

from inft.data import SOURCES, load_source
from inft.data.locate import find_source, split_of_file
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (None, ("munichus", "tharindu/MUNIChus")),
        ("munichus", ("munichus", "tharindu/MUNIChus")),
        ("sample", ("sample", "")),
        ("hub:owner/name", ("hub", "owner/name")),
    ],
)
def test_a_word_names_a_source(data: str | None, found: tuple[str, str]) -> None:
    assert find_source(MUNIChusLoadConfig(data=data)) == found


def test_a_new_source_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "mine", "mine:rows")
    assert find_source(MUNIChusLoadConfig(data="mine")) == ("mine", "")
    with pytest.raises(UserError, match="munichus, sample, mine, hub:OWNER/NAME"):
        find_source(MUNIChusLoadConfig(data="jsonl"))  # it reads a path


@pytest.mark.parametrize(
    ("files", "source"),
    [
        (["train.jsonl", "images/metadata.csv"], "jsonl"),
        (["captions.jsonl"], "jsonl"),
        (["pets.jsonl"], "jsonl"),
        (["metadata.csv"], "folder"),
        (["metadata.jsonl"], "folder"),
        (["train/metadata.jsonl"], "folder"),
        (["train-00000-of-00001.parquet"], "hub"),
        (["dataset_dict.json"], "hub"),
        (["train/state.json"], "hub"),
        (["en/train.parquet", "ur/train.parquet"], "munichus"),
        (["data/en/dataset_dict.json"], "munichus"),
        (["en/train/0000.parquet"], "munichus"),
    ],
)
def test_a_directory_is_known_by_its_files(tmp_path: Path, files: list[str], source: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    assert find_source(MUNIChusLoadConfig(data=str(tmp_path))) == (source, str(tmp_path))


def test_what_is_no_data_set_gets_the_list_of_what_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"(?s)no data set among its files \(notes.txt\).*train\.jsonl.*parquet"):
        find_source(MUNIChusLoadConfig(data=str(tmp_path)))
    for word in ("emoji", str(tmp_path / "missing"), str(tmp_path / "notes.txt")):
        with pytest.raises(UserError, match=r"munichus, sample, hub:OWNER/NAME, a file \(\*\.jsonl"):
            find_source(MUNIChusLoadConfig(data=word))


def test_the_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.jsonl").write_text("")
    assert find_source(MUNIChusLoadConfig(data="~/mine.jsonl")) == ("jsonl", str(tmp_path / "mine.jsonl"))


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("train-00000-of-00003.parquet", "train"),
        ("val_0.parquet", "validation"),
        ("dev/0000.parquet", "validation"),
        ("testing.parquet", "test"),
        ("en/0000.parquet", "train"),
    ],
)
def test_a_file_name_tells_its_split(file: str, split: str) -> None:
    assert split_of_file(Path(file)) == split


def test_every_source_can_be_loaded() -> None:
    assert all(callable(load_source(name)) for name in SOURCES)
    with pytest.raises(UserError, match="unknown data source 'csv'"):
        load_source("csv")
