"""Tokenised data: the same documents under the same masks, recognised, and refused where they do not fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk
from encoder_batches import TOKENIZER, data_params, documents, equal, loader, take, token_ids
from encoder_data import language_of, make_tokenizer, sentences, write_jsonl, write_parquet
from rich.console import Console

from inft.encoders.data import preprocess as module
from inft.encoders.data.batches import EvaluationBatches, LoaderState
from inft.encoders.data.documents import open_data
from inft.encoders.data.preprocess import preprocess, tokenize_dataset, use_tokenised
from params.errors import UserError

pytestmark = pytest.mark.usefixtures("cache")

QUIET = Console(quiet=True)
LONG = " ".join(sentences(12, seed=5))
TEXTS = [*sentences(30), LONG, "", *sentences(30, seed=1), LONG + " old"]
LANGUAGES = [language_of(i) for i in range(len(TEXTS))]


@pytest.fixture
def corpus(tmp_path):
    """Two training shards and a validation shard, and the tokenizer."""
    write_jsonl(tmp_path / "corpus" / "train-0.jsonl", TEXTS[:40], language=LANGUAGES[:40])
    write_parquet(tmp_path / "corpus" / "train-1.parquet", TEXTS[40:], language=LANGUAGES[40:])
    write_jsonl(tmp_path / "corpus" / "validation.jsonl", TEXTS[:10], language=LANGUAGES[:10])
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def params_of(corpus, place="corpus", **changed):
    return data_params(
        corpus / place,
        tokenizer__name=str(corpus / "tokenizer"),
        **{"dataset__language_column": "language", **changed},
    )


def by_document(batches, count: int):
    """(key, language, tokens seen, labels) of each document in some batches."""
    found = set()
    for batch in take(batches, count):
        ends = batch.cu_seqlens.tolist()
        for i, (key, language) in enumerate(zip(batch.keys, batch.languages, strict=True)):
            span = slice(ends[i], ends[i + 1])
            found.add((key, language, *batch.input_ids_T[span].tolist(), *batch.labels_T[span].tolist()))
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_tokenised_data_give_the_same_documents_under_the_same_masks(corpus, workers):
    output = corpus / "ids"
    told = preprocess(params_of(corpus, dataset__num_workers=workers), output, QUIET)
    assert told.counts["train"]["documents"] == len(TEXTS)
    assert (told.counts["train"]["split"], told.counts["train"]["empty"]) == (2, 1)
    single = {"trainer__per_device_train_batch_size": 1}
    rows = told.counts["train"]["rows"]
    assert rows > len(TEXTS)
    text, ids = (loader(params_of(corpus, place, **single)) for place in ("corpus", "ids"))
    assert by_document(text, rows) == by_document(ids, rows)
    both = [params_of(corpus, place) for place in ("corpus", "ids")]
    held = [EvaluationBatches(open_data(params, TOKENIZER), TOKENIZER, params) for params in both]
    assert all(equal(one, other) for one, other in zip(*held, strict=True))
    assert len(list(held[0])) == 1


def test_what_is_written_is_a_saved_data_set(corpus, monkeypatch):
    monkeypatch.setattr(module, "FILE_TOKENS", 300)  # several files
    told = preprocess(params_of(corpus), corpus / "ids", QUIET)
    saved = load_from_disk(str(corpus / "ids"))
    assert set(saved) == {"train", "validation"}
    assert len(saved["train"]) == told.counts["train"]["rows"]
    assert sum(map(len, saved["train"]["input_ids"])) == told.counts["train"]["tokens"]
    assert saved["validation"]["input_ids"] == [list(token_ids(text)) for text in TEXTS[:10]]
    assert saved["validation"]["language"] == LANGUAGES[:10]
    assert len(list((corpus / "ids" / "train").glob("*.arrow"))) == 2  # one for each block
    assert json.loads((corpus / "ids" / "tokenised.json").read_text())["max_seq_length"] == 64


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_training_on_tokenised_data_is_resumed_exactly(corpus, tmp_path, streaming, packed):
    preprocess(params_of(corpus), corpus / "ids", QUIET)
    params = params_of(corpus, "ids", dataset__streaming=streaming, datacollator__pack_sequences=packed)
    whole = take(loader(params), 60)
    cut = loader(params)
    take(cut, 23)
    cut.state().save(tmp_path)
    assert all(map(equal, whole[23:], take(loader(params, LoaderState.load(tmp_path)), 37)))


def test_reserved_rows_of_tokenised_data_keep_the_pieces_of_a_document_together(corpus):
    (corpus / "corpus" / "validation.jsonl").unlink()
    preprocess(params_of(corpus), corpus / "ids", QUIET)
    params = params_of(
        corpus, "ids", dataset__eval_samples=31, trainer__per_device_train_batch_size=1
    )  # row 31 is the first piece of the long document
    data = open_data(params, TOKENIZER)
    held = {key for batch in EvaluationBatches(data, TOKENIZER, params) for key in batch.keys}
    assert held == set(range(31))
    train = {key for batch in take(loader(params), data.train.total()) for key in batch.keys}
    assert not held & train
    assert held | train == {key for key in range(40) if TEXTS[key]} | {(1 << 40) + i for i in range(len(TEXTS) - 40)}


def test_tokenised_data_of_another_tokenizer_or_longer_documents_are_refused(corpus):
    preprocess(params_of(corpus), corpus / "ids", QUIET)
    with pytest.raises(UserError, match=r"was tokenised with .*tokenizer.*Set tokenizer\.name"):
        open_data(params_of(corpus, "ids"), make_tokenizer(vocab_size=150))
    with pytest.raises(UserError, match=r"up to 64 tokens, dataset\.max_seq_length is 32"):
        open_data(params_of(corpus, "ids", dataset__max_seq_length=32), TOKENIZER)
    TOKENIZER(TEXTS[0], truncation=True, max_length=8, padding="max_length")  # leaves its mark on the tokenizer
    assert (
        "dataset.long_documents is not used"
        in open_data(params_of(corpus, "ids", dataset__long_documents="drop"), TOKENIZER).describe()
    )
    with pytest.raises(UserError, match="is tokenised already"):
        preprocess(params_of(corpus, "ids"), corpus / "again", QUIET)


@pytest.mark.parametrize("long_documents", ["split", "drop"])
def test_a_longer_context_than_long_documents_were_cut_for_is_refused(corpus, long_documents):
    preprocess(params_of(corpus, dataset__long_documents=long_documents), corpus / "ids", QUIET)
    longer = {"dataset__max_seq_length": 128, "dataset__long_documents": long_documents}
    with pytest.raises(UserError, match=r"2 documents .*Tokenise .*max_seq_length 128, or lower it to 64"):
        open_data(params_of(corpus, "ids", **longer), TOKENIZER)
    for name in ("train-0.jsonl", "train-1.parquet"):
        (corpus / "corpus" / name).unlink()
    write_jsonl(corpus / "corpus" / "train.jsonl", TEXTS[:10], language=LANGUAGES[:10])
    preprocess(params_of(corpus, dataset__long_documents=long_documents), corpus / "ids", QUIET)
    open_data(params_of(corpus, "ids", **longer), TOKENIZER)  # nothing was cut


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_rows_are_left_out_and_told(corpus, workers):
    lines = (corpus / "corpus" / "train-0.jsonl").read_text().splitlines()
    (corpus / "corpus" / "train-0.jsonl").write_text("\n".join([*lines[:5], "{", *lines[5:]]))
    with pytest.raises(UserError, match=r"train-0\.jsonl line 6: not JSONL.*raise dataset\.max_bad_fraction"):
        preprocess(params_of(corpus, dataset__num_workers=workers), corpus / "ids", QUIET)
    assert not (corpus / "ids").exists()
    console = Console(record=True, width=200)
    params = params_of(corpus, dataset__num_workers=workers, dataset__max_bad_fraction=0.1)
    told = preprocess(params, corpus / "ids", console)
    assert told.counts["train"]["bad"] == 1
    assert told.counts["train"]["documents"] == len(TEXTS) + 1
    words = console.export_text()
    assert "1 unreadable" in words
    assert "train-0.jsonl line 6: not JSONL" in words


def test_a_failure_leaves_what_was_there(corpus):
    preprocess(params_of(corpus), corpus / "ids", QUIET)
    before = (corpus / "ids" / "tokenised.json").read_text()
    write_jsonl(corpus / "corpus" / "train-2.jsonl", ["fine", 17])
    with pytest.raises(UserError, match=r"train-2\.jsonl line 2"):
        preprocess(params_of(corpus), corpus / "ids", QUIET)
    assert (corpus / "ids" / "tokenised.json").read_text() == before
    assert sorted(path.name for path in corpus.iterdir()) == ["corpus", "ids", "tokenizer"]


def test_text_without_a_document_is_refused(tmp_path):
    write_jsonl(tmp_path / "corpus" / "train.jsonl", ["", " "])
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="every document is empty"):
        preprocess(params_of(tmp_path, dataset__language_column=None), tmp_path / "ids", QUIET)
    assert not (tmp_path / "ids").exists()


def test_pre_tokenize_tokenises_once_and_again_only_on_demand(corpus):
    def used(**changed):
        told = {"dataset__pre_tokenize": True, "trainer__output_dir": str(corpus / "run"), **changed}
        return use_tokenised(params_of(corpus, **told), TOKENIZER, QUIET)

    place = corpus / "run" / "pre_tokenized"
    assert used().dataset.path == str(place)
    assert open_data(used(), TOKENIZER).train.reading.tokenised
    written = (place / "tokenised.json").stat().st_mtime_ns
    used()
    assert (place / "tokenised.json").stat().st_mtime_ns == written
    elsewhere = used(dataset__pre_tokenized_dir=str(corpus / "elsewhere"))
    assert elsewhere.dataset.path == str(corpus / "elsewhere")
    with pytest.raises(UserError, match="max_seq_length was 64"):
        used(dataset__max_seq_length=96)
    write_jsonl(corpus / "corpus" / "train-2.jsonl", ["more"])
    with pytest.raises(UserError, match="was made of other data"):
        used()
    with pytest.raises(UserError, match="holds no tokenised data"):
        used(dataset__pre_tokenized_dir=str(corpus / "corpus"))
    assert use_tokenised(params_of(corpus), TOKENIZER, QUIET).dataset.path == str(corpus / "corpus")


def test_a_data_set_is_tokenised_without_a_configuration(corpus):
    told = tokenize_dataset(
        str(corpus / "corpus"), corpus / "ids", tokenizer=str(corpus / "tokenizer"), max_length=96, console=QUIET
    )
    assert told.max_seq_length == 96
    params = params_of(corpus, "ids", dataset__max_seq_length=96, dataset__language_column=None)
    short = {token_ids(text) for text in TEXTS if text and len(token_ids(text)) <= 96}
    assert short < {ids for batch in take(loader(params), 30) for ids in documents(batch)}
    with pytest.raises(UserError, match=r"dataset\.language_column when you preprocess"):
        open_data(params_of(corpus, "ids", dataset__max_seq_length=96), TOKENIZER)
    Dataset.from_dict({"text": TEXTS}).save_to_disk(corpus / "saved")
    again = tokenize_dataset(str(corpus / "saved"), corpus / "ids", str(corpus / "tokenizer"), 96, QUIET)
    assert set(again.counts) == {"train"}


def script(corpus, *options):
    """Run the standalone script in this process on the corpus of a test; what it told the console is shown."""
    path = Path(__file__).parents[2] / "scripts" / "pretraining" / "tokenize_dataset.py"
    given = ["--dataset", corpus / "corpus", "--output", corpus / "ids", "--tokenizer", corpus / "tokenizer", *options]
    found = subprocess.run(
        [sys.executable, str(path), *map(str, given)],
        capture_output=True,
        text=True,
        check=False,
        cwd=path.parents[2],
    )
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--max-length", 2, "--max-length: dataset.max_seq_length must be at least 32, got 2"),
        ("--max-length", 0, "--max-length: dataset.max_seq_length must be at least 32"),
        ("--max-length", -5, "--max-length: dataset.max_seq_length must be at least 32"),
        ("--num-workers", -1, "--num-workers: dataset.num_workers must be at least 0"),
        ("--max-bad-fraction", 1.5, "--max-bad-fraction: dataset.max_bad_fraction must be"),
    ],
)
def test_options_out_of_range_are_refused_by_their_names(corpus, option, value, words):
    code, _, told = script(corpus, option, value)
    assert code == 2
    assert told.startswith(f"error: {words}")
    assert len(told.splitlines()) == 1


def test_the_script_takes_languages_and_says_nothing_of_libraries(corpus):
    code, out, told = script(corpus, "--max-length", 64, "--language-column", "language")
    assert (code, told) == (0, "")
    assert f"train: {len(TEXTS)} documents read: 2 split, 1 empty;" in out
    open_data(params_of(corpus, "ids"), TOKENIZER)
