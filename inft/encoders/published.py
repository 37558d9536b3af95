"""Settings of an embedding model in the files of sentence-transformers, from a directory or the hub."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craft.pooling import PoolingStrategy
from inft.encoders.contrastive.export import LENGTHS, MODULES, POOLING, POOLINGS, PROMPTS, EmbeddingSettings
from params.errors import UserError

KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")  # of sentence-transformers
DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # names under which models store it, in their order there


@dataclass(frozen=True, kw_only=True)
class PublishedSettings(EmbeddingSettings):
    """What the files say, and how they were read where that is not plain."""

    lower_case: bool = False  # prefix and text, before they are cut into tokens
    notes: tuple[str, ...] = ()


def published_settings(place: str, longest: int) -> PublishedSettings | None:
    """Return what a model's files say, None where it has no modules.json; `longest` is the length without another.

    Errors: UserError for files that cannot be read, parts that only sentence-transformers runs, a default prompt that
    is not there, and a hub that cannot be reached.
    """
    files = _Files(place)
    modules = files.read(MODULES)
    if modules is None:
        return None
    kinds = [_field(module, "type", place).rsplit(".", 1)[-1] for module in modules]
    if unknown := [name for name in kinds if name not in KNOWN_MODULES]:
        raise UserError(f"{place} has {', '.join(unknown)}, which only sentence-transformers runs: embed there.")
    below = next((module.get("path") for module in modules if str(module["type"]).endswith("Pooling")), POOLING)
    pooling = files.read(f"{below}/config.json")
    if pooling is None:
        raise UserError(f"{place} has {MODULES} but no {below}/config.json: copy or download the model again.")
    lengths = files.read(LENGTHS) or {}
    query, document, notes = _prompts(files.read(PROMPTS) or {}, place)
    if files.unknown:
        missing = ", ".join(files.unknown)
        notes += (f"the hub cannot be reached, and {missing} of {place} is not in the cache: taken as not there.",)
    return PublishedSettings(
        pooling=_pooling(pooling, place),
        max_length=lengths.get("max_seq_length") or longest,
        query_prefix=query,
        document_prefix=document,
        normalize="Normalize" in kinds,
        lower_case=bool(lengths.get("do_lower_case")),
        notes=notes,
    )


class _Files:
    """Small JSON files of a directory, or of a hub id, of which only these are fetched."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.directory: Path | None = Path(place).expanduser()
        self.cached_only = False
        self.unknown: list[str] = []  # asked for, not in the cache, and the hub does not answer
        if not self.directory.is_dir():
            from inft.models.loading import hub_source

            self.directory = None
            self.cached_only = hub_source(place, elsewhere="give a local directory").local_files_only

    def read(self, name: str) -> Any:
        """What a file holds; None where the model has no such file."""
        file = self._from_hub(name) if self.directory is None else self.directory / name
        if file is None or not file.is_file():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}. Copy the model again.") from error

    def _from_hub(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError

        if self.cached_only:
            found = try_to_load_from_cache(self.place, name)
            if found is None:
                self.unknown.append(name)
            return Path(found) if isinstance(found, str) else None
        try:
            return Path(hf_hub_download(self.place, name))
        except EntryNotFoundError as error:
            if not isinstance(error, LocalEntryNotFoundError):  # which means that the hub stopped answering
                return None
            raise UserError(f"{self.place}: {name} cannot be fetched: {error}. Try again.") from error
        except (HTTPError, OSError) as error:
            raise UserError(f"{self.place}: {name} cannot be fetched: {error}. Try again.") from error


def _prompts(stored: Mapping[str, Any], place: str) -> tuple[str, str, tuple[str, ...]]:
    """Prefixes of a query and of a document as encode_query and encode_document choose them, and what to tell."""
    prompts = {name: text for name, text in (stored.get("prompts") or {}).items() if text}
    default = stored.get("default_prompt_name")
    if default is not None and default not in (stored.get("prompts") or {}):
        raise UserError(
            f"{place}: default_prompt_name {default!r} is none of the prompts in {PROMPTS}: mend the file, or embed "
            "with sentence-transformers."
        )
    name = next((name for name in DOCUMENT_PROMPTS if name in prompts), None)
    notes = []
    if name not in (None, DOCUMENT_PROMPTS[0]):
        notes.append(f'{place} has no prompt "document": its prompt {name!r} takes that place.')
    missing = [kind for kind, there in (("query", "query" in prompts), ("document", name is not None)) if not there]
    fallback = prompts.get(default, "") if default is not None else ""
    if missing and fallback:
        notes.append(f"{place} has no prompt for a {' or a '.join(missing)}: its default prompt {default!r} is used.")
    return prompts.get("query", fallback), fallback if name is None else prompts[name], tuple(notes)


def _pooling(config: Mapping[str, Any], place: str) -> PoolingStrategy:
    mode = config.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else mode
    if modes is None:
        modes = [
            key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on
        ]
    ours = {name.removesuffix("_tokens").removesuffix("_token"): pooling for pooling, name in POOLINGS.items()}
    found = [name.removesuffix("_tokens").removesuffix("_token") for name in modes]
    if len(found) != 1 or found[0] not in ours or not config.get("include_prompt", True):
        raise UserError(f"{place} pools by {', '.join(modes)}, which only sentence-transformers does: embed there.")
    return ours[found[0]]


def _field(module: Any, name: str, place: str) -> str:
    if not isinstance(module, dict) or not isinstance(module.get(name), str):
        raise UserError(f"{place}: {MODULES} has an entry without {name!r}: copy or download the model again.")
    return str(module[name])
