"""Parameters of tiny loaders, and how batches are compared."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from encoder_data import make_tokenizer

from inft.encoders.data.batches import FlatBatch, LoaderState, PretrainingBatches
from inft.encoders.data.documents import open_data
from params.encoder import EncoderParams

TOKENIZER = make_tokenizer()


def data_params(path: Path | str | None, **changed: Any) -> EncoderParams:
    """Parameters of a loader over ``path``; ``changed`` has __ for the dot."""
    values: dict[str, Any] = {
        "model__vocab_size": 256,
        "model__max_position_embeddings": 128,
        "dataset__path": None if path is None else str(path),
        "dataset__max_seq_length": 64,
        "dataset__shuffle_buffer_size": 50,
        "trainer__per_device_train_batch_size": 4,
        **changed,
    }
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, field = name.partition("__")
        sections.setdefault(section, {})[field] = value
    params = EncoderParams(seed=sections.pop("seed", {}).get("", 1))
    return replace(params, **{name: replace(getattr(params, name), **fields) for name, fields in sections.items()})


def loader(params: EncoderParams, state: LoaderState | None = None, **how: Any) -> PretrainingBatches:
    """Training batches under the tiny tokenizer."""
    return PretrainingBatches(open_data(params, TOKENIZER), TOKENIZER, params, state=state, **how)


def take(batches: Any, count: int) -> list[FlatBatch]:
    """The next batches."""
    return list(islice(batches, count))


def equal(one: FlatBatch, other: FlatBatch) -> bool:
    """Whether two batches are the same to the bit."""
    names = ("input_ids_T", "labels_T", "position_ids_T", "cu_seqlens")
    words = ("max_seqlen", "tokens", "masked", "languages", "keys")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names) and all(
        getattr(one, name) == getattr(other, name) for name in words
    )


def documents(batch: FlatBatch) -> list[tuple[int, ...]]:
    """The token ids of each real document, as they were before they were masked."""
    ids = torch.where(batch.labels_T == -100, batch.input_ids_T, batch.labels_T).tolist()
    ends = batch.cu_seqlens.tolist()
    return [tuple(ids[ends[i] : ends[i + 1]]) for i in range(len(batch.keys))]


def token_ids(text: str) -> tuple[int, ...]:
    """The token ids of a text."""
    return tuple(TOKENIZER(text)["input_ids"])
