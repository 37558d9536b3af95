"""The data of a pretraining run: which documents it trains on, which it is evaluated on, and what identifies them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inft.encoders.data.blocks import Source
from inft.encoders.data.sources import open_source, reserve
from inft.encoders.data.splits import EVALUATION_NAMES, Splits, find_splits, pick_split, require_split, shard_kinds
from inft.encoders.data.tokenised import Document, check_tokenizer, read_tokenised, require_length
from params.encoder import EncoderParams
from params.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Document", "TextData", "differences", "open_data"]


@dataclass(frozen=True, kw_only=True)
class TextData:
    """The documents of a run; the reserved ones are in ``heldout`` alone."""

    train: Source
    heldout: Source | None  # None: nothing to evaluate on
    reserved: int  # rows of the train split that are kept for evaluation
    location: str
    notices: tuple[str, ...]  # what a user should know: empty shards, an evaluation that is skipped

    def description(self) -> dict[str, Any]:
        """Return what identifies the data: names, sizes and samples of all shards, columns; json-able."""
        sources = {"train": self.train, "evaluation": self.heldout}
        return {
            "text column": self.train.reading.columns[0],
            "language column": self.train.reading.language_column,
            "reserved for evaluation": self.reserved,
            **{role: None if source is None else _described(source) for role, source in sources.items()},
        }

    @property
    def fingerprint(self) -> str:
        """Hexadecimal hash of the description."""
        return hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode()).hexdigest()

    def describe(self) -> str:
        """Return one line of what is read, and one for each notice."""
        held = "no evaluation"
        if self.heldout is not None and self.reserved:
            held = f"evaluation on its first {self.reserved:,} rows"
        elif self.heldout is not None:
            held = f"evaluation on split {self.heldout.split}{_size(self.heldout)}"
        train = f"data: {self.location}, split {self.train.split}{_size(self.train)}, {held}"
        return "\n".join((train, *self.notices))


def open_data(params: EncoderParams, tokenizer: "PreTrainedTokenizerBase") -> TextData:
    """Find the documents to train and to evaluate on (the guide's "Streaming Eval Strategy").

    The evaluation split is dataset.eval_split, or the first of validation, eval, test and dev that there is; without
    one the first eval_samples rows of the train split are kept for it, and skipped in training; else there is none.
    Shards are opened before training unless the data are streamed. Errors: UserError for everything amiss.
    """
    data, location, notices = params.dataset, str(params.dataset.path or params.dataset.name), list[str]()
    # A model that is loaded brings its own vocabulary and context, which are compared when it is.
    check_tokenizer(tokenizer, params.model.vocab_size if params.model.name is None else None)
    if data.max_seq_length > params.model.max_position_embeddings and params.model.name is None:
        raise UserError(
            f"dataset.max_seq_length {data.max_seq_length} is above model.max_position_embeddings "
            f"{params.model.max_position_embeddings}: raise the one or lower the other."
        )
    if data.path is not None and data.name is not None:
        notices.append(f"dataset.path is read; dataset.name {data.name} is not.")
    splits = find_splits(data)
    directory = None if data.path is None else Path(data.path).expanduser()
    stored = None if directory is None else read_tokenised(directory, tokenizer)
    if stored is not None and directory is not None:
        require_length(stored, directory, data.max_seq_length)
    if stored is not None and stored.long_documents != data.long_documents:
        notices.append(f"dataset.long_documents is not used: {location} was tokenised with {stored.long_documents}.")
    train_name = require_split(splits, data.train_split, source=location, field="dataset.train_split")
    train, told = open_source(params, tokenizer, splits, train_name, stored=stored)
    notices += told
    heldout, reserved = None, 0
    heldout_name = _evaluation_split(splits, params, location, train_name)
    if heldout_name is not None:
        heldout, told = open_source(params, tokenizer, splits, heldout_name, stored=stored)
        notices += [notice for notice in told if notice not in notices]
        if data.eval_samples is not None:
            notices.append(f"dataset.eval_samples is not used: there is a split {heldout_name}.")
    elif data.eval_samples is not None:
        train, heldout = reserve(train, data.eval_samples)
        reserved = data.eval_samples
    else:
        notices.append("evaluation is skipped: there is no split for it. dataset.eval_samples N keeps N rows for it.")
    return TextData(train=train, heldout=heldout, reserved=reserved, location=location, notices=tuple(notices))


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return in words how one description of data differs from another; none: they are the same."""
    found = []
    for role in dict.fromkeys((*before, *after)):
        old, new = before.get(role), after.get(role)
        if old == new:
            continue
        if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
            found.append(f"{role}: {_short(old)} -> {_short(new)}")
            continue
        if old["split"] != new["split"]:
            found.append(f"{role}: split {old['split']} -> {new['split']}")
        found += [f"{role}: {line}" for line in _shard_differences(old["shards"], new["shards"])]
    return found


def _short(value: Any) -> str:
    return f"split {value['split']}" if isinstance(value, Mapping) else str(value)


def _shard_differences(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [f"{name} is gone" for name in old if name not in new]
    lines += [f"{name} is new" for name in new if name not in old]
    for name in old:
        if name in new and old[name] != new[name]:
            changed = [key for key in new[name] if old[name].get(key) != new[name][key]]
            sizes = [f"{key} {old[name].get(key)} -> {new[name][key]}" for key in changed if key != "sample"]
            lines.append(f"{name}: {', '.join(sizes) or 'other content'}")
    return lines


def _evaluation_split(splits: Splits, params: EncoderParams, location: str, train: str) -> str | None:
    """The split to evaluate on: the one that is named, or the first that looks like one; never that of training."""
    told = params.dataset.eval_split
    if told is None:
        found = (pick_split(splits, names[0]) for names in EVALUATION_NAMES)
        return next((name for name in found if name not in (None, train)), None)
    name = require_split(splits, told, source=location, field="dataset.eval_split")
    if name == train:
        raise UserError(
            f"dataset.eval_split {told} is the split that is trained on: name another, or leave it out and keep rows "
            "for evaluation with dataset.eval_samples."
        )
    return name


def _described(source: Source) -> dict[str, Any]:
    return {"split": source.split, "shards": {part.shard.name: part.shard.description() for part in source.parts}}


def _size(source: Source) -> str:
    count = len(source.parts)
    shards = f"{count:,} shard{'s' if count > 1 else ''} of {shard_kinds(part.shard for part in source.parts)}"
    return f" ({shards}, streamed)" if source.streaming else f" ({source.total():,} rows in {shards})"
