"""Texts to vectors with a stored encoder: from a list or a file, in blocks, to .npy or .parquet.

Axes: B texts, D embedding size.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from craft.pooling import PoolingStrategy
from inft.encoders.contrastive.encode import TextEncoder, longest_text
from inft.encoders.contrastive.export import POOLINGS, EmbeddingSettings
from inft.encoders.contrastive.load import check_fit, load_encoder
from inft.encoders.contrastive.tokenized import tokens_of
from inft.encoders.outputs import check_output
from inft.encoders.published import PublishedSettings, published_settings
from inft.encoders.stored import load_tokenizer
from inft.encoders.vectors import VectorWriter, check_ending, open_vectors
from params.encoder_resolve import load_encoder_params
from params.errors import UserError

Prompt = Literal["query", "document"]
BLOCK = 4096  # texts that are held and sorted by length together
BATCH_TOKENS = 16_384  # of one pass


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """A stored encoder that is ready: texts in, vectors out."""

    encoder: TextEncoder
    tokenizer: PreTrainedTokenizerBase
    settings: EmbeddingSettings
    batch_tokens: int = BATCH_TOKENS

    @property
    def size(self) -> int:
        """Numbers of a vector."""
        return int(self.encoder.model.config.hidden_size)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the stored settings were read."""
        return self.settings.notes if isinstance(self.settings, PublishedSettings) else ()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], *, prompt: Prompt = "document") -> np.ndarray:
        """Return float32 [B, D] in the order of the texts, which are cut at the longest allowed."""
        settings = self.settings
        prefix, longest = settings.document_prefix, settings.max_length
        if prompt == "query":
            prefix, longest = settings.query_prefix, settings.query_max_length or longest
        if isinstance(settings, PublishedSettings) and settings.lower_case:
            prefix, texts = prefix.lower(), [text.lower() for text in texts]
        tokens = tokens_of(texts, prefix, longest, self.tokenizer)
        vectors_BD = np.empty((len(texts), self.size), dtype=np.float32)
        for places in _by_tokens(tokens, self.batch_tokens):
            vectors_BD[places] = self.encoder([tokens[place] for place in places]).float().cpu().numpy()
        return vectors_BD


def open_embedder(
    model: str,
    *,
    pooling: PoolingStrategy | None = None,
    max_length: int | None = None,
    normalize: bool | None = None,
    batch_tokens: int = BATCH_TOKENS,
    device: torch.device | None = None,
) -> Embedder:
    """Load a model directory or hub id; what is not given is as stored with it.

    Errors: UserError when it cannot be loaded, when it does not say how to pool, and when it has parts that only
    sentence-transformers can run.
    """
    encoder, tokenizer = load_encoder(model), load_tokenizer(model)
    longest = min(longest_text(encoder.config) or 512, tokenizer.model_max_length)
    settings = stored_settings(model, longest, pooling)
    if max_length is not None:
        settings = replace(settings, max_length=max_length, query_max_length=None)
    if normalize is not None:
        settings = replace(settings, normalize=normalize)
    check_fit(encoder, tokenizer, max(settings.max_length, settings.query_max_length or 0))
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ready = TextEncoder(
        model=encoder.float().eval().to(device),
        pooling=settings.pooling,
        pad_token_id=tokenizer.pad_token_id,
        normalize=settings.normalize,
    )
    return Embedder(encoder=ready, tokenizer=tokenizer, settings=settings, batch_tokens=batch_tokens)


def stored_settings(model: str, longest: int, pooling: PoolingStrategy | None = None) -> EmbeddingSettings:
    """What a model was trained for: from a run's config.yaml, or from the files of sentence-transformers.

    Errors: UserError when neither says how to pool and `pooling` is not given.
    """
    config = Path(model) / "config.yaml"
    found: EmbeddingSettings | None = None
    if config.is_file():
        params = load_encoder_params(config)
        found = EmbeddingSettings.of(params) if params.task == "contrastive" else None
    else:
        found = published_settings(model, longest)
    if found is not None:
        return found if pooling is None else replace(found, pooling=pooling)
    if pooling is None:
        raise UserError(f"{model} does not say how to pool: add --pooling {'|'.join(POOLINGS)}.")
    return EmbeddingSettings(pooling=pooling, max_length=longest)


def embed_texts(
    embedder: Embedder,
    texts: Path | Iterable[str],
    output: Path,
    *,
    column: str = "text",
    prompt: Prompt = "document",
    overwrite: bool = False,
) -> int:
    """Embed a file or texts into `output`, .npy (float32 [B, D]) or .parquet (id, vector); returns how many.

    A .txt file has a text a line, a .jsonl file one in `column` of each; ids are the column id or _id where the first
    row has one, else numbers from 0. Memory holds one block of texts; the file appears whole or not at all.
    Errors: UserError that names the line of a text that is none, before any is embedded, and for an output that exists.
    """
    check_ending(output)
    check_output(output, overwrite=overwrite)
    if isinstance(texts, Path):
        for _ in read_texts(texts, column):  # a bad last line is to be told before the first is embedded
            pass
    rows = read_texts(texts, column) if isinstance(texts, Path) else enumerate(texts)
    written = 0
    with ExitStack() as stack:
        writer: VectorWriter | None = None
        while block := list(islice(rows, BLOCK)):
            vectors_BD = embedder.embed([text for _, text in block], prompt=prompt)
            writer = writer or stack.enter_context(open_vectors(output, embedder.size))
            writer.write([name for name, _ in block], vectors_BD)
            written += len(block)
        if writer is None:
            raise UserError(f"{texts if isinstance(texts, Path) else 'the list'} has no texts.")
    return written


def read_texts(file: Path, column: str = "text") -> Iterator[tuple[int | str, str]]:
    """Yield (id, text) of each line of a .txt or .jsonl file; empty lines may stand at its end.

    Errors: UserError that names a line without a text.
    """
    name: str | None = None
    for number, text in _lines(file):
        where = f"{file} line {number + 1}"
        if file.suffix == ".txt":
            yield number, text
            continue
        values = _values(text, column, where)
        if number == 0:
            name = next((key for key in ("id", "_id") if key in values), None)
        yield _identity(values, name, number, where), values[column]


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number from 0, text) of each line up to the last that is not empty."""
    if file.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{file}: give a .txt file with a text a line, or .jsonl with one in a column.")
    if not file.is_file():
        raise UserError(f"{file}: there is no such file.")
    empty: int | None = None  # number of the first empty line
    with file.open("rb") as lines:
        for number, line in enumerate(lines):
            try:
                text = line.decode("utf-8-sig" if number == 0 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file} line {number + 1}: not UTF-8 ({error.reason}): save the file as UTF-8."
                ) from error
            if not text.strip():
                empty = number if empty is None else empty
                continue
            if empty is not None:
                raise UserError(
                    f"{file} line {empty + 1} is empty: drop it, so that line and vector keep the same number."
                )
            yield number, text


def _values(line: str, column: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}).") from error
    if not isinstance(values, dict) or not isinstance(values.get(column), str) or not values[column].strip():
        fields = ", ".join(values) if isinstance(values, dict) else "no fields"
        raise UserError(f"{where} has no text in {column!r} (it has: {fields}): name the column by --column.")
    return values


def _identity(values: dict[str, Any], name: str | None, number: int, where: str) -> int | str:
    if name is None:
        return number
    if not isinstance(values.get(name), int | str):
        raise UserError(f"{where} has no {name}, as the first line has: give every line one, or none.")
    return str(values[name])


def _by_tokens(tokens: Sequence[np.ndarray], budget: int) -> Iterator[list[int]]:
    """Places of texts of similar length that fill a pass together, padding counted."""
    order = sorted(range(len(tokens)), key=lambda place: len(tokens[place]))
    batch: list[int] = []
    for place in order:
        if batch and (len(batch) + 1) * len(tokens[place]) > budget:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
