from pathlib import Path

import pytest

from inft.data.batches import load_samples
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("own_cache")

LAYOUTS = ("parquet", "parquet_below_data", "parquet_per_split", "saved_splits", "saved_per_split", "saved_table")


def table(language: str, rows: range, picture) -> "datasets.Dataset":  # type: ignore[no-untyped-def]
    columns = {
        "image": [{"bytes": picture(number), "path": None} for number in rows],
        "title": [f"{language} title {number}" for number in rows],
        "content": [f"news {number}" for number in rows],
        "caption": [f"caption {number} in {language}" for number in rows],
    }
    text = datasets.Value("string")
    features = datasets.Features(image=datasets.Image(), title=text, content=text, caption=text)
    return datasets.Dataset.from_dict(columns, features=features)


def local_copy(directory: Path, layout: str, picture) -> Path:  # type: ignore[no-untyped-def]
    for shift, language in enumerate(("en", "ur")):
        place = directory / ("data" if layout == "parquet_below_data" else "") / language
        train = table(language, range(100 * shift, 100 * shift + 20), picture)
        test = table(language, range(100 * shift + 50, 100 * shift + 53), picture)
        if layout == "saved_splits":
            datasets.DatasetDict(train=train, test=test).save_to_disk(place)
        elif layout == "saved_per_split":
            train.save_to_disk(place / "train")
            test.save_to_disk(place / "test")
        elif layout == "saved_table":
            train.save_to_disk(place)
        elif layout == "parquet_per_split":
            (place / "train").mkdir(parents=True)
            train.to_parquet(place / "train" / "0000.parquet")
        else:
            place.mkdir(parents=True)
            for part in range(2):
                train.shard(2, part, contiguous=True).to_parquet(place / f"train-{part:05d}-of-00002.parquet")
            test.to_parquet(place / "test-00000-of-00001.parquet")
    return directory


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_local_copy_is_read(tmp_path: Path, picture, layout: str) -> None:
    config = MUNIChusLoadConfig(data=str(local_copy(tmp_path, layout, picture)), eval_fraction=0.2)
    loaded = load_samples(config, quarantine_file=None, with_images=True)
    assert loaded.source == "munichus"
    samples = loaded.train + loaded.heldout
    assert len(samples) == 40
    assert loaded.heldout
    assert list(loaded.rows_per_language) == ["en", "ur"]
    urdu = next(sample for sample in samples if sample.answer == "caption 117 in ur")
    assert urdu.meta["where"] == "ur train row 17"
    assert urdu.prompt.text == "Write a caption for this image in Urdu.\n\nnews 117"
    assert urdu.image.load().getpixel((0, 0)) == (117, 0, 40)


def test_the_test_split_can_be_chosen_and_is_never_held_out_from_training(tmp_path: Path, picture) -> None:
    directory = local_copy(tmp_path, "saved_splits", picture)
    config = MUNIChusLoadConfig(data=str(directory), split="test", eval_fraction=0.0)
    assert load_samples(config, quarantine_file=None, with_images=True).rows_per_language == {
        "en": (3, 0),
        "ur": (3, 0),
    }
    with pytest.raises(UserError, match=r"no split 'dev2'; it has .*train.*--set data\.split="):
        load_samples(MUNIChusLoadConfig(data=str(directory), split="dev2"), quarantine_file=None, with_images=True)


def test_a_validation_split_counts_only_when_every_language_has_it(tmp_path: Path, picture) -> None:
    directory = local_copy(tmp_path, "parquet", picture)
    table("en", range(60, 64), picture).to_parquet(directory / "en" / "validation-00000.parquet")
    config = MUNIChusLoadConfig(data=str(directory), eval_fraction=0.2)
    loaded = load_samples(config, quarantine_file=None, with_images=True)
    assert {s.meta["where"].split()[1] for s in loaded.heldout} == {"train"}
    table("ur", range(160, 166), picture).to_parquet(directory / "ur" / "validation-00000.parquet")
    loaded = load_samples(config, quarantine_file=None, with_images=True)
    assert loaded.rows_per_language == {"en": (20, 4), "ur": (20, 6)}


def test_a_requested_language_without_a_directory_is_an_error(tmp_path: Path, picture) -> None:
    directory = local_copy(tmp_path, "parquet", picture)
    config = MUNIChusLoadConfig(data=str(directory), languages=("si",))
    with pytest.raises(UserError, match=r"no rows in language 'si': .* has en, ur\."):
        load_samples(config, quarantine_file=None, with_images=True)


def test_a_directory_in_capitals_holds_its_language(tmp_path: Path, picture) -> None:
    directory = local_copy(tmp_path, "parquet", picture)
    (directory / "ur").rename(directory / "UR")
    loaded = load_samples(MUNIChusLoadConfig(data=str(directory)), quarantine_file=None, with_images=True)
    assert list(loaded.rows_per_language) == ["en", "ur"]


def test_an_unreadable_picture_in_a_table_is_quarantined(tmp_path: Path, picture) -> None:
    broken = table("en", range(20), picture).cast_column("image", datasets.Image(decode=False)).to_dict()
    broken["image"][3] = {"bytes": b"no image", "path": None}
    broken["image"][4] = None
    broken["image"][5] = {"bytes": None, "path": "/etc/hostname"}
    (tmp_path / "en").mkdir()
    datasets.Dataset.from_dict(broken).to_parquet(tmp_path / "en" / "train.parquet")
    config = MUNIChusLoadConfig(data=str(tmp_path), max_bad_fraction=0.5, eval_fraction=0.0)
    loaded = load_samples(config, quarantine_file=None, with_images=True)
    assert (len(loaded.train), loaded.quarantined) == (17, 3)
    assert loaded.bad[0].where == "en train row 3"
    assert "not a path" in loaded.bad[1].reason
    assert "lies outside" in loaded.bad[2].reason


def test_samples_of_a_table_can_be_sent_to_another_process(tmp_path: Path, picture) -> None:
    import pickle

    directory = local_copy(tmp_path, "parquet", picture)
    config = MUNIChusLoadConfig(data=str(directory), eval_fraction=0.0)
    sample = load_samples(config, quarantine_file=None, with_images=True).train[5]
    assert len(pickle.dumps(sample)) < 20_000
    assert pickle.loads(pickle.dumps(sample)).image.load().getpixel((0, 0)) == (5, 0, 40)


def test_a_damaged_saved_data_set_is_a_clear_error(tmp_path: Path, picture) -> None:
    directory = local_copy(tmp_path, "saved_table", picture)
    for file in (directory / "ur").glob("*.arrow"):
        file.write_bytes(b"no arrow")
    with pytest.raises(UserError, match="ur: cannot be read as a saved data set"):
        load_samples(MUNIChusLoadConfig(data=str(directory)), quarantine_file=None, with_images=True)


def test_a_table_saved_with_a_tensor_format_is_read_as_text(tmp_path: Path, picture) -> None:
    table("en", range(20), picture).with_format("numpy").save_to_disk(tmp_path / "en")
    config = MUNIChusLoadConfig(data=str(tmp_path), eval_fraction=0.0)
    loaded = load_samples(config, quarantine_file=None, with_images=True)
    assert (loaded.quarantined, loaded.train[1].image.load().getpixel((0, 0))) == (0, (1, 0, 40))


def test_a_replaced_parquet_file_is_read_anew(tmp_path: Path, picture) -> None:
    (tmp_path / "en").mkdir()
    config = MUNIChusLoadConfig(data=str(tmp_path), eval_fraction=0.0)
    for rows in (range(20), range(20, 45)):
        table("en", rows, picture).to_parquet(tmp_path / "en" / "train.parquet")
        assert len(load_samples(config, quarantine_file=None, with_images=True).train) == len(rows)
