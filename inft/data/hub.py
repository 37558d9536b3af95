"""The hub source: a captions data set of the Hugging Face hub, or parquet files and saved data sets on disk.

Only parquet and arrow are read; tables are memory-mapped and images fetched one at a time, so a data set may be
larger than memory.
"""

import logging
import re
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inft.data.columns import Columns, Record, read_records
from inft.data.images import TableImage
from inft.data.locate import is_saved, known_split, missing_split, split_names, split_of_file
from inft.data.rows import BadRow, MissingSplit, Row, RowKind
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig

if TYPE_CHECKING:
    from datasets import Dataset

    from inft.sample import ImageRef

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # load_dataset would take a bare word for a file format
_PROBE_TIMEOUT = 8.0  # seconds for the hub's first answer


class MissingConfig(UserError):
    """The hub data set has no configuration of that name."""


def rows(
    config: MUNIChusLoadConfig, *, location: str, split: str, kind: RowKind = "captions"
) -> Iterator[Row | BadRow]:
    """Yield the rows of a split of ``OWNER/NAME``, ``OWNER/NAME:CONFIG`` or a local path.

    Errors: MissingSplit without the split; UserError for a hub that cannot be reached or does not let us in.
    """
    path, language = Path(location), None
    roots: tuple[Path, ...] = (path,)
    if path.exists():
        tables = local_tables(path)
    else:
        dataset_id, _, config_name = location.partition(":")
        tables, roots = hub_tables(dataset_id, config_name or None), cache_directories()
        # A configuration named by a language code, as MUNIChus has them, holds that language.
        language = config_name if config_name in config.language_names else None
    table = pick_split(tables, split, source=location)
    yield from table_rows(config, table, name=split, source=location, roots=roots, language=language, kind=kind)


def table_rows(
    config: MUNIChusLoadConfig,
    table: "Dataset",
    *,
    name: str,
    source: str,
    roots: tuple[Path, ...],
    language: str | None = None,
    kind: RowKind = "captions",
) -> Iterator[Row | BadRow]:
    """Yield the rows of one table; ``name`` stands in their ``where``, ``roots`` may hold images named by path."""
    columns = Columns(config, source=source, kind=kind)
    records = _records(table.with_format(None), columns, name=name, roots=roots)
    yield from read_records(config, records, columns=columns, known=table.column_names, language=language)


def _records(table: "Dataset", columns: Columns, *, name: str, roots: tuple[Path, ...]) -> Iterator[Record]:
    image_column = columns.find("image", table.column_names)
    images = None if image_column is None else undecoded(table, image_column).select_columns([image_column])
    for index, values in enumerate(table.select_columns(columns.read_of(table.column_names))):
        image: ImageRef
        if images is None or image_column is None:
            image = columns.no_image(dict.fromkeys(table.column_names))
        else:
            image = TableImage(table=images, index=index, column=image_column, roots=roots)
        yield Record(values=values, image=image, where=f"{name} row {index}")


def undecoded(table: "Dataset", column: str) -> "Dataset":
    """The table with the encoded bytes of its images: they are decoded by us, all in one way."""
    from datasets import Image, List

    feature, encoded = table.features[column], Image(decode=False)
    if isinstance(feature, List) and isinstance(feature.feature, Image):
        return table.cast_column(column, List(encoded))
    return table.cast_column(column, encoded) if isinstance(feature, Image) else table


def pick_split(tables: Mapping[str, "Dataset"], split: str, *, source: str) -> "Dataset":
    """Return the table of a split under any of its names; MissingSplit when there is none."""
    name = next((name for name in split_names(split) if name in tables), None)
    if name is None:
        raise MissingSplit(missing_split(source, split, tables))
    return tables[name]


def local_tables(path: Path) -> "dict[str, Dataset]":
    """Return split -> table of a parquet file, a directory of them, or data sets that save_to_disk wrote."""
    datasets = import_datasets()
    if path.is_dir() and is_saved(path):
        saved = _load_saved(path)
        return dict(saved) if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    if path.is_dir():
        children = [child for child in sorted(path.iterdir()) if child.is_dir() and is_saved(child)]
        if children:
            return {split_of_file(child / "state.json"): _load_saved(child) for child in children}
    return {split: _read_parquet(files) for split, files in _parquet_files(path).items()}


def _load_saved(path: Path) -> Any:
    try:
        return import_datasets().load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a saved data set ({error}).") from error


def _parquet_files(path: Path) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    below = [child for child in path.iterdir() if child.is_dir() and known_split(child.name)] if path.is_dir() else []
    files = [path] if path.is_file() else [file for place in (path, *below) for file in place.glob("*.parquet")]
    for file in sorted(files):
        splits.setdefault(split_of_file(file), []).append(str(file))
    return splits


def _read_parquet(files: list[str]) -> "Dataset":
    datasets = import_datasets()
    from pyarrow import ArrowException

    # Its reader logs the error that it raises; ours below names the file and the cause once.
    logging.getLogger("datasets.packaged_modules.parquet.parquet").setLevel(logging.CRITICAL)
    try:
        return datasets.Dataset.from_parquet(files)
    except (datasets.exceptions.DatasetGenerationError, ArrowException) as error:
        raise UserError(f"{', '.join(files)}: cannot be read as parquet ({error.__cause__ or error}).") from error


@lru_cache(maxsize=32)  # a run asks for two splits of each language, and each load asks the hub several questions
def hub_tables(dataset_id: str, config_name: str | None) -> "dict[str, Dataset]":
    """Return split -> table of a hub data set, downloaded or from the local cache.

    Errors: MissingConfig for an unknown configuration; UserError when the hub is out of reach or refuses.
    """
    if not _HUB_ID.fullmatch(dataset_id):
        raise UserError(f"{dataset_id!r} is neither a path that exists nor a hub id such as OWNER/NAME.")
    datasets = import_datasets()
    from huggingface_hub.errors import HTTPError

    unreachable = "offline mode" if datasets.config.HF_HUB_OFFLINE else _probe(dataset_id)
    if unreachable is not None:
        # Without this every request is tried for 23 s before the cache is looked at.
        datasets.config.HF_HUB_OFFLINE = True
    try:
        return dict(datasets.load_dataset(dataset_id, config_name))
    except datasets.exceptions.DatasetNotFoundError as error:
        raise _refused(dataset_id, str(error)) from error
    except ConnectionError as error:
        raise _out_of_reach(dataset_id, unreachable or str(error)) from error
    except (datasets.exceptions.DatasetsError, HTTPError, OSError) as error:
        raise UserError(f"the hub data set {dataset_id} cannot be read ({type(error).__name__}: {error}).") from error
    except ValueError as error:
        raise MissingConfig(
            f"the hub data set {dataset_id} cannot be opened with the configuration {config_name!r}: {error} "
            "(--data hub:OWNER/NAME:CONFIGURATION names one)"
        ) from error


def _probe(dataset_id: str) -> str | None:
    """Ask the hub once for the data set; return why it cannot be reached, None when it answers."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(dataset_id, timeout=_PROBE_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise _refused(dataset_id, "no such data set, or no access to it") from error
    except (HTTPError, OSError) as error:  # refused, timed out, no name service, offline mode, server error
        return f"{type(error).__name__}: {error}"
    return None


def _refused(dataset_id: str, reason: str) -> UserError:
    page = f"https://huggingface.co/datasets/{dataset_id}"
    return UserError(
        f"the hub does not give out {dataset_id}: {reason.rstrip('.')}. If it is gated, ask for access on {page} "
        "and log in with `hf auth login` (formerly `huggingface-cli login`). Or give local copies with --data PATH "
        "and --model PATH, or run --demo with --data sample, which need no hub."
    )


def _out_of_reach(dataset_id: str, reason: str) -> UserError:
    return UserError(
        f"the hub cannot be reached for {dataset_id} ({reason}) and it is not in the local cache. "
        "Give local copies with --data PATH and --model PATH, or run --demo with --data sample, which need no hub."
    )


def cache_directories() -> tuple[Path, ...]:
    """The directories into which the hub's libraries download: a table may name image files there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(import_datasets().config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)


def import_datasets() -> Any:
    """Return the datasets library; UserError naming the extra when it is not installed."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise UserError(
            "reading hub, parquet and saved data sets needs the library `datasets`: pip install 'inft[hf]'."
        ) from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # in a log file every stroke of a bar is a line
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # no telemetry unless the user asks for it
    return datasets
