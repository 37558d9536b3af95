"""Tokenise a data set once and keep it: a saved data set of token ids, and beside it what made them.

The documents keep the keys that they had as text, so that training on them masks the same tokens.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from inft.data.hub import import_datasets
from inft.encoders.build import load_tokenizer
from inft.encoders.data.blocks import Source
from inft.encoders.data.counts import Counts, Tally
from inft.encoders.data.reader import (
    BlockPlan,
    BlockReader,
    MaskedDocuments,
    ReadBlock,
    loader_settings,
    name_bad_rows,
    raise_error,
    read_blocks,
)
from inft.encoders.data.sources import open_source
from inft.encoders.data.splits import Splits, find_splits
from inft.encoders.data.tokenised import (
    IDS_COLUMN,
    KEY_COLUMN,
    LANGUAGE_COLUMN,
    PIECE_COLUMN,
    TOKENISED_FILE,
    Tokenised,
    check_tokenizer,
    read_tokenised,
    tokenizer_fingerprint,
)
from inft.training.processes import on_main
from inft.training.storage import staged
from params.encoder import DatasetParams, EncoderParams, TokenizerParams
from params.encoder_resolve import ENCODER
from params.errors import UserError
from params.layers import user_error
from params.schema import fields_of
from params.yamlfile import Given

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from transformers import PreTrainedTokenizerBase

PRE_TOKENIZED = "pre_tokenized"  # below trainer.output_dir, unless dataset.pre_tokenized_dir says otherwise
FILE_TOKENS = 100_000_000  # of an arrow file: 400 MB


@dataclass(frozen=True, kw_only=True)
class SplitResult:
    """What became of a split."""

    counts: Counts
    bad_rows: tuple[str, ...]  # the first that could not be read
    rows: int  # documents and pieces that were written
    tokens: int


def preprocess(
    params: EncoderParams, output: Path, console: "Console", *, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> Tokenised:
    """Tokenise every split of dataset.* into a directory that takes the place of ``output`` when all is done.

    Errors: UserError for everything amiss in the data, and when the disk is full; ``output`` is untouched then.
    """
    tokenizer = tokenizer or load_tokenizer(params)
    check_tokenizer(tokenizer, None)
    params, splits = _read_in_order(params)
    results: dict[str, SplitResult] = {}
    with staged(output, what="the tokenised data", remedy="Free space there and start again.") as staging:
        for split in splits:
            results[split] = _write_split(params, tokenizer, splits, split, staging / split, console)
        if not any(result.rows for result in results.values()):
            raise UserError(f"{params.dataset.path or params.dataset.name}: every document is empty or left out.")
        (staging / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}), encoding="utf-8")
        told = _told(params, tokenizer, splits, results)
        (staging / TOKENISED_FILE).write_text(json.dumps(asdict(told), indent=1) + "\n", encoding="utf-8")
    for split, result in results.items():
        for line in (_line(split, result), *(f"left out: {row}" for row in result.bad_rows)):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"tokenised: {output}", highlight=False, markup=False, soft_wrap=True)
    return told


def tokenize_dataset(
    dataset: str,
    output: Path,
    tokenizer: str,
    max_length: int,
    console: "Console",
    *,
    config: str | None = None,
    text_column: str = "text",
    language_column: str | None = None,
    long_documents: Literal["split", "drop"] = "split",
    max_bad_fraction: float = DatasetParams.max_bad_fraction,
    num_workers: int = 0,
) -> Tokenised:
    """Tokenise a hub data set, or a file, directory or glob, without a configuration; see ``preprocess``.

    Errors: also UserError for values that are out of range, by the names of the script's options.
    """
    numbers = {
        "dataset.max_seq_length": Given(max_length, "--max-length"),
        "dataset.max_bad_fraction": Given(max_bad_fraction, "--max-bad-fraction"),
        "dataset.num_workers": Given(num_workers, "--num-workers"),
    }
    problems: list[str] = []
    checked = fields_of(ENCODER.checked(numbers, problems), "dataset")
    if problems:
        raise user_error(problems)
    local = Path(dataset).expanduser().exists() or any(sign in dataset for sign in "*?[") or dataset.count("/") != 1
    params = EncoderParams(
        tokenizer=TokenizerParams(name=tokenizer),
        dataset=DatasetParams(
            name=None if local else dataset,
            path=dataset if local else None,
            config=config,
            text_column=text_column,
            language_column=language_column,
            long_documents=long_documents,
            **checked,
        ),
    )
    return preprocess(params, output, console)


def pre_tokenized_directory(params: EncoderParams) -> Path:
    """Where the tokenised data of a run lie."""
    told = params.dataset.pre_tokenized_dir
    return Path(told).expanduser() if told else Path(params.trainer.output_dir) / PRE_TOKENIZED


def use_tokenised(params: EncoderParams, tokenizer: "PreTrainedTokenizerBase", console: "Console") -> EncoderParams:
    """With dataset.pre_tokenize, tokenise the data unless that is done, and return parameters that read the result.

    Errors: UserError when the directory holds something else, or was made of other data or settings.
    """
    if not params.dataset.pre_tokenize:
        return params
    directory = pre_tokenized_directory(params)
    on_main(lambda: _ensure(params, directory, tokenizer, console))
    return replace(params, dataset=replace(params.dataset, name=None, config=None, path=str(directory)))


def _ensure(params: EncoderParams, directory: Path, tokenizer: "PreTrainedTokenizerBase", console: "Console") -> None:
    if not directory.exists() or not any(directory.iterdir()):
        preprocess(params, directory, console, tokenizer=tokenizer)
        return
    found = read_tokenised(directory, tokenizer)
    if found is None:
        raise UserError(f"{directory} holds no tokenised data: empty it, or choose another dataset.pre_tokenized_dir.")
    ordered, splits = _read_in_order(params)
    if (found.source, found.max_seq_length) != (_fingerprint(ordered, splits), params.dataset.max_seq_length):
        raise UserError(
            f"{directory} was made of other data or with other settings (dataset.max_seq_length was "
            f"{found.max_seq_length}). Remove it to tokenise again, or choose another dataset.pre_tokenized_dir."
        )
    console.print(f"tokenised before: {directory}", highlight=False, markup=False, soft_wrap=True)


def _read_in_order(params: EncoderParams) -> tuple[EncoderParams, Splits]:
    """Local files are read as a stream: a table would be copied into the cache first for nothing."""
    data = replace(params.dataset, streaming=params.dataset.streaming or params.dataset.path is not None)
    if data.path is not None and (Path(data.path).expanduser() / TOKENISED_FILE).is_file():
        raise UserError(f"dataset.path {data.path} is tokenised already.")
    return replace(params, dataset=data), find_splits(data)


def _write_split(
    params: EncoderParams,
    tokenizer: "PreTrainedTokenizerBase",
    splits: Splits,
    split: str,
    directory: Path,
    console: "Console",
) -> SplitResult:
    from rich.progress import Progress

    source, notices = open_source(params, tokenizer, splits, split)
    for notice in notices:
        console.print(notice, highlight=False, markup=False, soft_wrap=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"tokenising {split}", total=source.total())
        return _write(params, source, directory, progress, task)


def _write(params: EncoderParams, source: Source, directory: Path, progress: "Progress", task: "TaskID") -> SplitResult:
    writer = _Writer(directory, with_language=source.reading.language_column is not None)
    tally = Tally(params.dataset.max_bad_fraction)
    plan = BlockPlan(source, None, epochs=1)
    try:
        for block in read_blocks(BlockReader(source, None), plan, loader_settings(params.dataset, "cpu")):
            found: ReadBlock = raise_error(block)
            tally.add(found.counts, name_bad_rows(source, found))
            tally.check()
            if found.documents is not None:
                writer.write(found.documents)
            progress.update(task, advance=found.counts.documents)
        tally.check(ended=True)
    finally:
        writer.close()
    writer.finish()
    return SplitResult(counts=tally.counts, bad_rows=tally.bad_rows, rows=writer.rows, tokens=writer.tokens)


class _Writer:
    """Writes documents as the datasets library's save_to_disk does, without ever holding them all."""

    def __init__(self, directory: Path, *, with_language: bool) -> None:
        datasets = import_datasets()
        columns = {IDS_COLUMN: datasets.List(datasets.Value("int32")), KEY_COLUMN: datasets.Value("int64")}
        columns[PIECE_COLUMN] = datasets.Value("int32")
        if with_language:
            columns[LANGUAGE_COLUMN] = datasets.Value("string")
        self._features = datasets.Features(columns)
        self._schema = self._features.arrow_schema
        self._directory = directory
        self._stream: Any = None
        self._room = 0
        self._digest = hashlib.sha256()
        self.files: list[str] = []
        self.rows = self.tokens = 0
        directory.mkdir()

    def write(self, documents: MaskedDocuments) -> None:
        """Append documents."""
        import pyarrow as pa

        if self._room <= 0:
            self._next_file()
        offsets = pa.array(np.concatenate([[0], documents.ends_N]).astype(np.int32))
        columns: dict[str, Any] = {
            IDS_COLUMN: pa.ListArray.from_arrays(offsets, pa.array(documents.input_ids_T.astype(np.int32))),
            KEY_COLUMN: pa.array(documents.keys_N.astype(np.int64)),
            PIECE_COLUMN: pa.array(documents.pieces_N.astype(np.int32)),
            LANGUAGE_COLUMN: pa.array(documents.languages, pa.string()),
        }
        arrays = [columns[name] for name in self._features]
        self._stream.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._digest.update(documents.input_ids_T.tobytes())
        self.rows += len(documents.ends_N)
        self.tokens += len(documents.input_ids_T)
        self._room -= len(documents.input_ids_T)

    def close(self) -> None:
        """End the file in hand."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def finish(self) -> None:
        """Write what makes the files a saved data set."""
        if not self.files:
            self._next_file()
            self.close()
        import_datasets().DatasetInfo(features=self._features).write_to_directory(str(self._directory))
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in self.files],
            "_fingerprint": self._digest.hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        (self._directory / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")

    def _next_file(self) -> None:
        import pyarrow as pa

        self.close()
        self.files.append(f"data-{len(self.files):05d}.arrow")
        self._stream = pa.ipc.new_stream(str(self._directory / self.files[-1]), self._schema)
        self._room = FILE_TOKENS


def _told(
    params: EncoderParams, tokenizer: "PreTrainedTokenizerBase", splits: Splits, results: dict[str, SplitResult]
) -> Tokenised:
    return Tokenised(
        tokenizer=tokenizer_fingerprint(tokenizer),
        tokenizer_name=str(tokenizer.name_or_path or params.tokenizer.name),
        max_seq_length=params.dataset.max_seq_length,
        long_documents=params.dataset.long_documents,
        source=_fingerprint(params, splits),
        text_column=params.dataset.text_column,
        counts={
            split: {**result.counts.asdict(), "rows": result.rows, "tokens": result.tokens}
            for split, result in results.items()
        },
    )


def _fingerprint(params: EncoderParams, splits: Splits) -> str:
    """Hash of the text and of what is read of it."""
    data = params.dataset
    shards = {split: {shard.name: shard.description() for shard in found} for split, found in splits.items()}
    words = [shards, data.text_column, data.language_column, data.long_documents]
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


def _line(split: str, result: SplitResult) -> str:
    return f"{split}: {result.counts.words()}; {result.rows:,} rows, {result.tokens:,} tokens"
