"""Where a data set lies and which of its shards make up which split; no document is read."""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from inft.data.hub import import_datasets
from inft.data.locate import is_saved
from inft.data.rows import MissingSplit
from inft.encoders.data.lines import SUFFIXES, LineShard, line_suffix
from inft.encoders.data.shards import ParquetShard, Shard, TableShard, is_remote, open_arrow, url_filesystem
from inft.training.storage import disk_trouble
from params.encoder import DatasetParams
from params.errors import UserError

Splits = Mapping[str, tuple[Shard, ...]]

# Names that a split goes by; the first of each row is the one asked for, in the order of the search for an evaluation.
EVALUATION_NAMES = (("validation", "valid", "val"), ("eval", "evaluation"), ("test", "testing"), ("dev",))
_ALIASES = (("train", "training"), *EVALUATION_NAMES)
_KNOWN = {name for names in _ALIASES for name in names}
_TABLES = (".parquet", ".arrow")
_NO_DATA = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json")
_TOKENIZER = "tokenizer_config.json"  # in a directory of a tokenizer, whose vocabulary may be a .txt file
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FORMATS = ", ".join(f"*{suffix}" for suffix in (*SUFFIXES, *_TABLES))


def find_splits(params: DatasetParams) -> Splits:
    """Return split -> its shards, in the order of their names; UserError when there is nothing to read."""
    if params.path is not None:
        return _located(params.path, params)
    if params.name is None:
        raise UserError("no data: set dataset.path to a file or directory, or dataset.name to a hub id.")
    return _hub_streamed(params) if params.streaming else _hub_loaded(params)


def pick_split(splits: Splits, name: str) -> str | None:
    """The split of this name, or of another name for the same."""
    names = next((names for names in _ALIASES if name in names), (name,))
    return next((found for found in (name, *names) if found in splits), None)


def require_split(splits: Splits, name: str, *, source: str, field: str) -> str:
    """The split of this name; MissingSplit, a UserError, lists those that there are."""
    found = pick_split(splits, name)
    if found is None:
        raise MissingSplit(f"{source} has no split {name!r}; it has {', '.join(splits)}. Choose one with {field}.")
    return found


def _located(location: str, params: DatasetParams) -> Splits:
    if is_remote(location):
        return _remote(location, params)
    path = Path(location).expanduser()
    if path.is_dir() and (saved := _saved(path)) is not None:
        return saved
    if path.is_file():
        return {params.train_split: (_shard(path, path.name, params),)}  # whatever its name tells: it was chosen
    root, files = _files(path)
    if not files:
        what = "holds no file" if path.is_dir() else "is neither a file, a directory nor a glob that matches files"
        hub = f" A hub id belongs into dataset.name: {location}." if _HUB_ID.fullmatch(location) else ""
        raise UserError(f"dataset.path {location} {what} that can be read ({_FORMATS}, also compressed).{hub}")
    splits: dict[str, list[Shard]] = {}
    for file in files:
        name = file.relative_to(root).as_posix()
        splits.setdefault(_split_of(name) or params.train_split, []).append(_shard(file, name, params))
    return {split: tuple(shards) for split, shards in splits.items()}


def _files(path: Path) -> tuple[Path, list[Path]]:
    """The files of a directory or a glob that hold documents, sorted, and the directory that they are named from."""
    root, pattern = path, "**/*"
    while not root.is_dir():
        root, pattern = root.parent, "/".join(path.parts[len(root.parent.parts) :])
    found = [file for file in sorted(root.glob(pattern)) if file.is_file() and _is_data(file.relative_to(root))]
    found = [file for file in found if not (file.parent / _TOKENIZER).exists()]
    others = [file for file in found if line_suffix(file) != ".json"]
    return root, others or found  # beside other formats a .json file describes data instead of holding them


def _is_data(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts)
    return not hidden and file.name not in _NO_DATA and line_suffix(file) in (*SUFFIXES, *_TABLES)


def _split_of(name: str) -> str | None:
    """The split that a file's name (``validation-00000.parquet``), or else that of a directory above it, tells."""
    file, *above = reversed(name.split("/"))
    words = re.split(r"[-_.]", file)
    return next((word for word in (words[0], *above) if word.lower() in _KNOWN), None)


def _shard(file: Path, name: str, params: DatasetParams) -> Shard:
    if file.suffix.lower() == ".parquet":
        return _parquet(name, str(file), params)
    if file.suffix.lower() == ".arrow":
        return TableShard(name, str(file), open_arrow(file))
    if line_suffix(file) in _TABLES:
        raise UserError(f"{file}: a compressed table cannot be read. Unpack it: its columns are compressed anyway.")
    if line_suffix(file) not in SUFFIXES:
        raise UserError(f"{file}: no format that can be read ({_FORMATS}, also compressed).")
    return LineShard(name, file, params.text_column)


def _parquet(name: str, url: str, params: DatasetParams) -> Shard:
    """A parquet file: as it is when streaming, else as a table, whose rows can be had in any order.

    The table is made in the cache of the datasets library, of the columns that are read.
    """
    shard = ParquetShard(name, url)
    if params.streaming or not shard.open().count:  # a corrupt file is told by its footer, in our words
        return shard
    datasets = import_datasets()
    # Its reader logs the error that it raises; ours names the file and the cause once.
    logging.getLogger("datasets.packaged_modules.parquet.parquet").setLevel(logging.CRITICAL)
    read = [column for column in (params.text_column, params.language_column) if column in shard.columns()]
    columns = read if params.text_column in read else list(shard.columns())
    try:
        table = datasets.Dataset.from_parquet(url, columns=columns)
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        reason = disk_trouble(error) or disk_trouble(error.__cause__ or error) or error.__cause__ or error
        raise UserError(f"{url}: cannot be read as parquet ({reason}). Replace the file.") from error
    return TableShard(name, url, table)


def _saved(path: Path) -> Splits | None:
    """The splits of what save_to_disk wrote: one table, several, or one in each sub-directory; None if it is none."""
    datasets = import_datasets()
    if is_saved(path):
        loaded = _load_saved(path)
        tables = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
        return {split: (TableShard(split, str(path), table),) for split, table in tables.items()}
    children = [child for child in sorted(path.iterdir()) if child.is_dir() and is_saved(child)]
    if not children:
        return None
    splits: dict[str, list[Shard]] = {}
    for child in children:
        shard = TableShard(child.name, str(child), _load_saved(child))
        splits.setdefault(_split_of(child.name) or "train", []).append(shard)
    return {split: tuple(shards) for split, shards in splits.items()}


def _load_saved(path: Path) -> Any:
    import pyarrow as pa

    try:
        return import_datasets().load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as a saved data set ({error}). Write it again.") from error


def _remote(location: str, params: DatasetParams) -> Splits:
    """Parquet files behind a URL, which may be a glob or a directory."""
    filesystem, path = url_filesystem(location)
    protocol = location.split("://", 1)[0]
    if any(sign in path for sign in "*?["):
        found = filesystem.glob(path)
    else:
        found = filesystem.find(path) if filesystem.isdir(path) else [path]
    urls = sorted(f"{protocol}://{str(file).lstrip('/')}" for file in found)
    _require_parquet([url for url in urls if _is_data(Path(url.split("://", 1)[1]))], location, params)
    tables = [url for url in urls if url.endswith(".parquet")]
    splits: dict[str, list[Shard]] = {}
    for url in tables:
        name = url.split("/")[-1] if len(tables) == 1 else _below(url, tables)
        splits.setdefault(_split_of(name) or params.train_split, []).append(_parquet(name, url, params))
    return {split: tuple(shards) for split, shards in splits.items()}


def _below(url: str, urls: list[str]) -> str:
    """A URL's name from the directory on that all share."""
    parents = [one.split("/")[:-1] for one in urls]
    shared = next((i for i, parts in enumerate(zip(*parents, strict=False)) if len(set(parts)) > 1), None)
    return "/".join(url.split("/")[shared if shared is not None else min(map(len, parents)) :])


def _require_parquet(files: list[str], source: str, params: DatasetParams) -> None:
    other = [file for file in files if not file.endswith(".parquet")]
    if not files:
        raise UserError(f"{source}: no parquet file there.")
    if other and params.streaming:
        raise UserError(
            f"{source} is stored as {other[0].rsplit('/', 1)[-1]}, which cannot be read from the middle over a "
            "network: a resumed run could not go on exactly where it stopped. Set dataset.streaming false, which "
            "downloads the files, or give parquet files."
        )


def _hub_loaded(params: DatasetParams) -> Splits:
    tables = _ask_hub(import_datasets().load_dataset, params)
    return {split: (TableShard(split, str(params.name), table),) for split, table in tables.items()}


def _hub_streamed(params: DatasetParams) -> Splits:
    return builder_splits(_ask_hub(import_datasets().load_dataset_builder, params), params)


def _ask_hub(load: Callable[..., Any], params: DatasetParams) -> Any:
    """The answer to a question about dataset.name; UserError when there is no such data set, or no way to it."""
    from huggingface_hub.errors import HTTPError

    name = str(params.name)
    if not _HUB_ID.fullmatch(name):  # the library would take a bare word for a file format
        raise UserError(f"dataset.name {name!r} is no hub id such as OWNER/NAME; dataset.path takes files.")
    try:
        return load(name, params.config)
    except (import_datasets().exceptions.DatasetsError, HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"the hub data set {name} cannot be opened ({type(error).__name__}: {error}). dataset.config names a "
            "configuration, dataset.path takes local files; if access is restricted, log in with `hf auth login`."
        ) from error


def builder_splits(builder: Any, params: DatasetParams) -> Splits:
    """The splits of a data set that is stored as parquet files, from the library's builder for it."""
    files = builder.config.data_files or {}
    splits = {str(split): [str(url) for url in urls] for split, urls in files.items()}
    urls = [url for found in splits.values() for url in found]
    _require_parquet(urls, params.name or str(builder.dataset_name), params)
    return {
        split: tuple(ParquetShard(_below(url, urls) if len(urls) > 1 else url.rsplit("/", 1)[-1], url) for url in found)
        for split, found in splits.items()
    }


def shard_kinds(shards: Iterable[Shard]) -> str:
    """The formats of shards, for one line about a data set."""
    return ", ".join(sorted({Path(shard.name).suffix.lstrip(".") or "table" for shard in shards}))
