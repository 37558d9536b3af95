"""The munichus source: one table per language, from the hub or a local copy (arXiv 2603.10613)."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from inft.data.hub import (
    MissingConfig,
    cache_directories,
    hub_tables,
    local_tables,
    pick_split,
    table_rows,
)
from inft.data.languages import any_language_will_do, available_languages, known_code
from inft.data.locate import language_directories
from inft.data.rows import BadRow, Row, RowKind
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig

if TYPE_CHECKING:
    from datasets import Dataset


def rows(
    config: MUNIChusLoadConfig, *, location: str, split: str, kind: RowKind = "captions"
) -> Iterator[Row | BadRow]:
    """Yield the rows of a split in each requested language; ``location`` is a hub id or a local copy's directory.

    A split counts only when every language has it, so that no language goes without held-out rows.

    Errors: MissingSplit; UserError for a language that the data set does not have.
    """
    directory = Path(location)
    local = directory.is_dir()
    tables = _local(config, directory) if local else _from_hub(config, location)
    picked = {
        language: pick_split(splits, split, source=f"{location} ({language})") for language, splits in tables.items()
    }
    for language, table in picked.items():
        yield from table_rows(
            config,
            table,
            name=f"{language} {split}",
            source=f"{location} ({language})",
            roots=(directory, directory / language) if local else cache_directories(),
            language=language,
            kind=kind,
        )


def _local(config: MUNIChusLoadConfig, directory: Path) -> "dict[str, dict[str, Dataset]]":
    places = {known_code(config, name): place for name, place in language_directories(directory).items()}
    if not places:
        raise UserError(f"{directory} holds no sub-directory per language with parquet files or saved data sets.")
    languages = available_languages(config, places, source=str(directory))
    return {language: local_tables(places[language]) for language in languages}


def _from_hub(config: MUNIChusLoadConfig, dataset_id: str) -> "dict[str, dict[str, Dataset]]":
    tables: dict[str, dict[str, Dataset]] = {}
    missing: MissingConfig | None = None
    for language in config.languages:
        try:
            tables[language] = hub_tables(dataset_id, language)
        except MissingConfig as error:
            missing = error
            if not any_language_will_do(config):
                raise UserError(f"{dataset_id} has no language {language!r}: {error}") from error
    if missing is not None and not tables:
        raise missing
    return tables
