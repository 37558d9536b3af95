import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import serve

from inft.data.batches import load_samples
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("own_cache")
ROOT = Path(__file__).parents[2]

# The hub's libraries read their address and cache at import: a process of its own for each.
PROGRAM = """
import json, sys
from inft.data.batches import load_samples
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig
for fields in json.loads(sys.argv[1]):
    try:
        loaded = load_samples(MUNIChusLoadConfig(**fields), quarantine_file=None, with_images=True)
        pixel = loaded.train[0].image.load().getpixel((0, 0))
        print(json.dumps([loaded.rows_per_language, loaded.train[0].meta["where"], pixel]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def ask(endpoint: str, home: Path, *configs: dict[str, object]) -> list[object]:
    """What load_samples answers to each configuration with the hub at an address and caches below `home`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(configs)],
        env={**environment, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def pictures(picture) -> list[bytes]:
    return [picture(number) for number in range(20)]


def test_the_hub_is_read_and_then_its_cache_without_it(tmp_path: Path, pictures: list[bytes]) -> None:
    asked: list[dict[str, object]] = [
        {"dataset_id": "o/n"},
        {"dataset_id": "o/n", "languages": ["en", "si"]},
        {"data": "hub:o/n:ur", "languages": ["ur"], "eval_fraction": 0.0},
        {"data": "hub:o/n"},
        {"data": "hub:o/none"},
    ]
    with serve(pictures=pictures) as address:
        online = ask(address, tmp_path, *asked)
    assert online[0] == [{"en": [19, 1], "ur": [19, 1]}, "en train row 0", [0, 0, 40]]
    assert "o/n has no language 'si'" in str(online[1])
    assert "['en', 'ur']" in str(online[1])
    assert online[2] == [{"ur": [20, 0]}, "train row 0", [0, 0, 40]]
    assert "--data hub:OWNER/NAME:CONFIGURATION" in str(online[3])
    assert "hf auth login" in str(online[4])
    offline = ask("http://127.0.0.1:9", tmp_path, *asked[:3])
    assert [offline[0], offline[2]] == [online[0], online[2]]
    assert "o/n has no language 'si'" in str(offline[1])


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_data_set_names_the_login_and_its_page(tmp_path: Path, status: int) -> None:
    with serve(pictures=[], refusal=(status, "GatedRepo")) as address:
        (message,) = ask(address, tmp_path, {"dataset_id": "o/n"})
    for words in ("gated", "hf auth login", "huggingface-cli login", "https://huggingface.co/datasets/o/n"):
        assert words in str(message)
    for words in ("--demo", "--data PATH", "--model PATH"):
        assert words in str(message)


def test_an_unreachable_hub_is_said_quickly(tmp_path: Path) -> None:
    start = time.monotonic()
    (message,) = ask("http://127.0.0.1:9", tmp_path, {})
    assert time.monotonic() - start < 20
    for words in ("cannot be reached", "tharindu/MUNIChus", "--demo", "--data PATH", "--model PATH"):
        assert words in str(message)


@pytest.mark.parametrize("name", ["csv", "a/b/c", "bad name", "/missing/path"])
def test_what_is_no_hub_id_is_refused_without_asking(name: str) -> None:
    with pytest.raises(UserError, match="neither a path that exists nor a hub id"):
        load_samples(MUNIChusLoadConfig(data=f"hub:{name}"), quarantine_file=None, with_images=True)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'inft\[hf\]'"):
        load_samples(MUNIChusLoadConfig(), quarantine_file=None, with_images=True)


@pytest.fixture
def flickr(tmp_path: Path, picture) -> Path:
    """A data set with columns of its own names, several captions a picture, as parquet."""
    rows = {
        "img": [{"bytes": picture(number), "path": None} for number in range(12)],
        "sentences": [[f"{number} a", f"{number} b"] for number in range(12)],
        "weight": [0.5] * 12,
    }
    features = datasets.Features(
        img=datasets.Image(), sentences=datasets.List(datasets.Value("string")), weight=datasets.Value("float32")
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    table.select(range(4)).to_parquet(tmp_path / "validation-00000-of-00001.parquet")
    return tmp_path


@pytest.mark.parametrize("prefix", ["", "hub:"])
def test_columns_of_other_names_are_mapped(flickr: Path, prefix: str) -> None:
    config = MUNIChusLoadConfig(data=f"{prefix}{flickr}", columns={"image": "img", "caption": "sentences"})
    loaded = load_samples(config, quarantine_file=None, with_images=True)
    assert loaded.source == "hub"
    assert loaded.rows_per_language == {"en": (24, 8)}
    assert [sample.answer for sample in loaded.train[:3]] == ["0 a", "0 b", "1 a"]
    assert loaded.train[2].image.load().getpixel((0, 0)) == (1, 0, 40)
    assert loaded.train[2].meta["where"] == "train row 1 caption 1"


def test_a_parquet_file_can_be_named(flickr: Path) -> None:
    file = flickr / "train-00000-of-00001.parquet"
    config = MUNIChusLoadConfig(data=str(file), columns={"image": "img", "caption": "sentences"}, eval_fraction=0.25)
    loaded = load_samples(config, quarantine_file=None, with_images=True)
    held = {sample.answer.split()[0] for sample in loaded.heldout}
    assert held
    assert not held & {sample.answer.split()[0] for sample in loaded.train}


def test_missing_columns_name_those_that_are_there(flickr: Path) -> None:
    with pytest.raises(
        UserError, match=r"no column 'caption' or 'captions'.*img, sentences, weight.*--set data\.columns"
    ):
        load_samples(MUNIChusLoadConfig(data=str(flickr)), quarantine_file=None, with_images=True)
    config = MUNIChusLoadConfig(data=str(flickr), columns={"caption": "sentences"})
    with pytest.raises(UserError, match=r"among img, sentences, weight.*--set data\.columns\.image=NAME"):
        load_samples(config, quarantine_file=None, with_images=True)
    assert load_samples(config, quarantine_file=None, with_images=False).train


def test_a_damaged_parquet_file_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [caplog.handler])
    with pytest.raises(UserError, match=r"train\.parquet: cannot be read as parquet"):
        load_samples(MUNIChusLoadConfig(data=str(tmp_path)), quarantine_file=None, with_images=True)
    assert caplog.messages == []
