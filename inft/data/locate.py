"""Where data.data points to, and which file or table of it holds a split."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from inft.data import SOURCES
from inft.data.rows import MissingSplit
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig

# A split -> the names it goes by in the wild.
SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_KNOWN_SPLITS = {name: split for split, names in SPLIT_NAMES.items() for name in names}
_FILE_SOURCES = {".jsonl": "jsonl", ".csv": "folder", ".parquet": "hub"}
METADATA_FILES = ("metadata.jsonl", "metadata.csv")


def find_source(config: MUNIChusLoadConfig) -> tuple[str, str]:
    """Return the name in SOURCES and the location that ``config.data`` stands for.

    Errors: UserError for a word or path that is no data set, listing what is one.
    """
    data = config.data
    if data is None or data == "munichus":
        return "munichus", config.dataset_id
    if data in _names():
        return data, ""
    if data.startswith("hub:"):
        return "hub", data.removeprefix("hub:")
    path = Path(data).expanduser()
    if path.is_file() and path.suffix.lower() in _FILE_SOURCES:
        return _FILE_SOURCES[path.suffix.lower()], str(path)
    if path.is_dir():
        return directory_source(path), str(path)
    raise UserError(
        f"--data {data!r} is neither a source nor a path that exists. Give {', '.join(_names())}, hub:OWNER/NAME, "
        f"a file ({', '.join('*' + suffix for suffix in _FILE_SOURCES)}) or a directory. {_LAYOUTS}"
    )


def _names() -> list[str]:
    """The sources that a name alone stands for; the others read a place that must be named."""
    return [name for name in SOURCES if name not in _FILE_SOURCES.values()]


_LAYOUTS = (
    "A directory holds train.jsonl (and validation.jsonl), captions.jsonl, metadata.csv or metadata.jsonl beside "
    "images, parquet files, a saved data set, or one sub-directory of these last two per language."
)


def directory_source(directory: Path) -> str:
    """Return the name of the source that reads a directory, by the files it finds there."""
    if any(file.stem in (*_KNOWN_SPLITS, "captions") for file in directory.glob("*.jsonl")):
        return "jsonl"
    if metadata_file(directory) or any(metadata_file(directory / name) for name in _KNOWN_SPLITS):
        return "folder"
    if holds_tables(directory):
        return "hub"
    if language_directories(directory):
        return "munichus"
    if any(directory.glob("*.jsonl")):
        return "jsonl"
    found = ", ".join(sorted(entry.name for entry in directory.iterdir())[:12]) or "nothing"
    raise UserError(f"--data {directory}: no data set among its files ({found}). {_LAYOUTS}")


def metadata_file(directory: Path) -> Path | None:
    """Return the metadata file that captions the images beside it, or None."""
    return next((directory / name for name in METADATA_FILES if (directory / name).is_file()), None)


def is_saved(directory: Path) -> bool:
    """Whether `save_to_disk` of the datasets library wrote the directory (one table or several splits)."""
    return (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file()


def holds_tables(directory: Path) -> bool:
    """Whether a directory holds parquet files or saved data sets, of itself or in a sub-directory per split."""
    places = [directory, *(directory / name for name in _KNOWN_SPLITS)]
    return any(is_saved(place) or any(place.glob("*.parquet")) for place in places)


def language_directories(directory: Path) -> dict[str, Path]:
    """Return language -> its sub-directory of tables, as a copy of MUNIChus has them (also below ``data/``)."""
    for parent in (directory, directory / "data"):
        if parent.is_dir():
            found = {child.name: child for child in sorted(parent.iterdir()) if child.is_dir() and holds_tables(child)}
            if found:
                return found
    return {}


def split_names(split: str) -> tuple[str, ...]:
    """Return the names that a split may have, its own first."""
    return SPLIT_NAMES.get(split, (split,))


def split_of_file(file: Path) -> str:
    """Return the split that a file's name (``train-00000-of-00001.parquet``) or its directory tells; else train."""
    for name in (file.stem.replace("_", "-").replace(".", "-").split("-")[0], file.parent.name):
        if name in _KNOWN_SPLITS:
            return _KNOWN_SPLITS[name]
    return "train"


def tells_split(file: Path, split: str) -> bool:
    """Whether a file may be read as a split: as train, as its name or directory tells, or by its name itself."""
    return split in (*split_names("train"), *split_names(split_of_file(file)), file.stem)


def require_split_of_file(file: Path, split: str, *, own: str) -> None:
    """Raise MissingSplit unless a single file is the split; ``own`` is the only one that it may stand for."""
    if split != own or not tells_split(file, split):
        raise MissingSplit(missing_split(str(file), split, [own if split != own else split_of_file(file)]))


def known_split(name: str) -> bool:
    """Whether a name is that of a split."""
    return name in _KNOWN_SPLITS


def missing_split(source: str, split: str, available: Iterable[str]) -> str:
    """The message for a split that a data set does not have."""
    has = ", ".join(available) or "no split that is known"
    return f"{source} has no split {split!r}; it has {has}. Choose with --set data.split=NAME."
