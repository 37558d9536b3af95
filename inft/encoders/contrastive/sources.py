"""The named sources of a run: found, tokenised where they are raw, and a few rows of each kept for evaluation."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from inft.encoders.contrastive.rows import EVALUATION_NAMES, evaluation_files, file_stem, is_glob, row_files
from inft.encoders.contrastive.tokenized import (
    NOTE,
    Tokenization,
    TokenizedPairs,
    check_intact,
    check_tokenization,
    tokenize_source,
)
from params.encoder import EncoderParams
from params.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PairRows:
    """Some rows of a tokenised source, from `first` on."""

    name: str
    pairs: TokenizedPairs
    first: int
    rows: int

    def __str__(self) -> str:
        return f"{self.name} {self.rows:,} ({self.pairs.with_negatives(self.first, self.rows):,} with negatives)"


@dataclass(frozen=True, kw_only=True)
class PairSources:
    """What is trained on, by name, and what is held out."""

    train: Sequence[PairRows]
    heldout: Sequence[PairRows]
    unused: Sequence[str] = ()  # further evaluation splits

    def describe(self) -> str:
        """One line for the console."""
        trained, held = (", ".join(map(str, sources)) for sources in (self.train, self.heldout))
        unused = f"; neither trained on nor evaluated: {', '.join(self.unused)}" if self.unused else ""
        return f"rows: {trained}; held out: {held or 'none, so there is no evaluation'}{unused}"

    @property
    def description(self) -> dict[str, Any]:
        """What a resumed run must find again: rows, and the files that they were made of."""
        return {
            part: {
                source.name: {"first": source.first, "rows": source.rows, **_made_of(source.pairs)}
                for source in sources
            }
            for part, sources in (("train", self.train), ("heldout", self.heldout))
        }


def _made_of(pairs: TokenizedPairs) -> dict[str, Any]:
    return {name: pairs.note[name] for name in ("tokenizer", "files", "tokens")}


def locate_sources(params: EncoderParams, tokenizer: Any, console: Console) -> dict[str, str]:
    """Return the directory of each tokenised source by name; raw ones are tokenised first.

    They go below dataset.pre_tokenized_dir or the output directory. One process does this for all. A file that
    dataset.eval_split names becomes a source of that name.
    """
    how = Tokenization.of(params, tokenizer)
    work = Path(params.dataset.pre_tokenized_dir or Path(params.trainer.output_dir) / "pre_tokenized")
    found = named_sources(params)
    split = params.dataset.eval_split
    if split is not None and not any(split in (name, kind_of(name)) for name in found):
        path = Path(split).expanduser()
        if not path.exists():
            raise UserError(
                f"dataset.eval_split {split} is neither a source ({', '.join(found)}) nor a file: name one of these, "
                "or set dataset.eval_samples."
            )
        found[split] = path
    located = {}
    for name, path in found.items():
        located[name] = str(path)
        if not (path / NOTE).is_file():
            output = work / (f"eval-{file_stem(path)}" if name == split else name)
            console.print(f"{name}: rows of {path}, their tokens in {output}", highlight=False, soft_wrap=True)
            pairs = tokenize_source(path, output, tokenizer, how)
            located[name] = str(pairs.directory)
            if pairs.note["unread"]:
                unread = ", ".join(pairs.note["unread"])
                console.print(f"{name}: fields that are not read: {unread}", highlight=False, soft_wrap=True)
        else:
            check_intact(path)
    return located


def check_places(params: EncoderParams) -> None:
    """UserError when there are no rows where the parameters look for them; nothing is read."""
    for path in named_sources(params).values():
        if not (path / NOTE).is_file():
            row_files(path)


def open_sources(params: EncoderParams, tokenizer: Any, located: Mapping[str, str]) -> PairSources:
    """Return the run's sources from what `locate_sources` found.

    Held out are the sources that dataset.eval_split names, else those of the first evaluation split that there is
    (validation, eval, test, dev), else dataset.eval_samples rows, the first ones of each source in proportion to its
    size. What is named as an evaluation split is never trained on where there is anything else.
    Errors: UserError for tokens of another tokenizer, prefix or length, and when nothing is left to train on.
    """
    how = Tokenization.of(params, tokenizer)
    found = {name: TokenizedPairs(Path(directory)) for name, directory in located.items()}
    for pairs in found.values():
        check_tokenization(pairs, how)
    whole = [PairRows(name=name, pairs=pairs, first=0, rows=len(pairs)) for name, pairs in found.items()]
    kinds = {kind_of(name) for name in found}
    split = params.dataset.eval_split
    if split is None and (None in kinds or len(kinds) > 1):
        split = next((kind for kind in EVALUATION_NAMES if kind in kinds), None)
    if split is None:
        return _reserve(whole, params.dataset.eval_samples or 0)
    held = [source for source in whole if split in (source.name, kind_of(source.name))]
    others = [source for source in whole if source not in held]
    train = [source for source in others if kind_of(source.name) is None] or others
    return PairSources(
        train=_some(train), heldout=held, unused=[source.name for source in others if source not in train]
    )


def kind_of(name: str) -> str | None:
    """The evaluation split that a source is: "validation" of nli.validation, or of validation itself."""
    last = name.rpartition(".")[2]
    return last if last in EVALUATION_NAMES else None


def named_sources(params: EncoderParams) -> dict[str, Path]:
    """The sources by name: dataset.sources, the preprocessed ones in dataset.path, or that path alone."""
    path = Path(params.dataset.path).expanduser() if params.dataset.path else None
    inside = {} if path is None else _preprocessed_inside(path)
    return inside or raw_sources(params)


def _preprocessed_inside(path: Path) -> dict[str, Path]:
    """The sources that preprocessing wrote into a directory, by name."""
    if not path.is_dir() or (path / NOTE).is_file():
        return {}
    return {entry.name: entry for entry in sorted(path.iterdir()) if (entry / NOTE).is_file()}


def _name_of(path: Path) -> str:
    """The name of a source after its file or directory; of a glob, after the last directory before the pattern."""
    if not is_glob(path):
        return file_stem(path.resolve())
    fixed = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
    return fixed.resolve().name or "rows"


def raw_sources(params: EncoderParams) -> dict[str, Path]:
    """dataset.sources, or dataset.path under the name of its file or directory.

    A directory's evaluation splits are sources of their own: pairs/validation.jsonl is pairs.validation.
    """
    data = params.dataset
    if data.name is not None:
        raise UserError("dataset.name: contrastive rows are read from files: set dataset.path or dataset.sources.")
    if data.path is None and not data.sources:
        raise UserError("there are no rows to train on: set dataset.path or dataset.sources.")
    for name in data.sources:
        if Path(name).name != name:
            raise UserError(f"dataset.sources: {name!r} is no name for a directory: leave out / and dots alone.")
    named = {name: Path(path).expanduser() for name, path in data.sources.items()}
    if data.path is not None:
        path = Path(data.path).expanduser()
        named = {_name_of(path): path}
    found = {}
    for name, path in named.items():
        if inside := _preprocessed_inside(path):
            field = "path" if data.path is not None else f"sources.{name}"
            places = " or ".join(map(str, inside.values()))
            raise UserError(f"dataset.{field}: {path} holds what was preprocessed: set it to {places}.")
        found[name] = path
        if not (path / NOTE).is_file():
            found |= {f"{name}.{kind}": file for kind, file in evaluation_files(path).items()}
    return found


def _reserve(sources: list[PairRows], samples: int) -> PairSources:
    """Take the first rows of each source, in proportion to its size, `samples` in all."""
    total = sum(source.rows for source in sources)
    if samples >= total:
        raise UserError(
            f"dataset.eval_samples {samples} leaves none of {total} rows to train on: lower it or add rows."
        )
    ends = [0]  # cumulative shares, rounded: they add up to `samples` exactly
    for source in sources:
        ends.append(ends[-1] + source.rows)
    shares = [samples * end // total for end in ends]
    train, heldout = [], []
    for source, low, high in zip(sources, shares, shares[1:], strict=False):
        held = high - low
        heldout += [PairRows(name=source.name, pairs=source.pairs, first=0, rows=held)] if held else []
        rest = source.rows - held
        train += [PairRows(name=source.name, pairs=source.pairs, first=held, rows=rest)] if rest else []
    return PairSources(train=_some(train), heldout=heldout)


def _some(sources: list[PairRows]) -> list[PairRows]:
    if not sources:
        raise UserError("every source is held out: add one to train on.")
    return sources
