"""Every format gives the same documents, by any way to name them; what is corrupt is named."""

import bz2
import csv
import gzip
import json

import fsspec
import pytest
from datasets import Dataset, DatasetDict, load_dataset_builder
from encoder_batches import TOKENIZER, data_params, documents, token_ids
from encoder_data import sentences, write_jsonl, write_parquet

from inft.encoders.data import lines
from inft.encoders.data.batches import PretrainingBatches
from inft.encoders.data.documents import open_data
from inft.encoders.data.lines import find_rows
from inft.encoders.data.splits import builder_splits
from params.errors import UserError

pytestmark = pytest.mark.usefixtures("cache")

TEXTS = sentences(60)


def read(path, **changed):
    """The ids of all documents of the train split, in the order of their keys, and the keys."""
    params = data_params(path, trainer__per_device_train_batch_size=1, dataset__max_seq_length=128, **changed)
    batches = PretrainingBatches(open_data(params, TOKENIZER), TOKENIZER, params)
    found = {}
    while batches.state().cursor.epoch == 0:
        batch = next(batches)
        found.setdefault(batch.keys[0], documents(batch)[0])
    return [found[key] for key in sorted(found)], sorted(found)


def ids(texts):
    return [token_ids(text) for text in texts]


def write(kind: str, directory, texts):
    """Texts as a file of a kind, some in need of quotes."""
    directory.mkdir(exist_ok=True, parents=True)
    path = directory / f"corpus.{kind}"
    if kind == "parquet":
        return write_parquet(path, texts)
    if kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            writer.writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in texts], indent=1, ensure_ascii=False), encoding="utf-8")
    elif kind == "txt":
        path.write_text("\n".join(texts), encoding="utf-8")
    elif kind == "arrow":
        Dataset.from_dict({"text": texts}).save_to_disk(directory / "saved")
        next((directory / "saved").glob("*.arrow")).rename(path)
    else:
        write_jsonl(path, texts)
    return path


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv", "txt", "parquet", "arrow"])
def test_every_format_gives_the_same_documents(tmp_path, kind, streaming):
    texts = [*TEXTS[:20], 'she said "no", twice', *TEXTS[20:]]
    found, keys = read(write(kind, tmp_path, texts), dataset__streaming=streaming)
    assert found == ids(texts)
    assert keys == list(range(len(texts)))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress)])
def test_compressed_files_are_read_as_what_they_hold(tmp_path, suffix, pack, streaming):
    plain = write("jsonl", tmp_path / "plain", TEXTS)
    packed = tmp_path / f"corpus.jsonl.{suffix}"
    packed.write_bytes(pack(plain.read_bytes()))
    assert read(packed, dataset__streaming=streaming)[0] == ids(TEXTS)
    packed.write_bytes(pack(b"".join(plain.read_bytes().splitlines(keepends=True)[:30])))
    assert read(packed, dataset__streaming=streaming)[0] == ids(TEXTS[:30])  # changed: it is unpacked anew


@pytest.mark.parametrize("streaming", [True, False])
def test_a_csv_record_may_hold_line_breaks(tmp_path, streaming):
    texts = ["the red\nboat", "old\r\n\r\nman", 'a "small" key', "plain"]
    assert read(write("csv", tmp_path, texts), dataset__streaming=streaming)[0] == ids(texts)


def test_blank_lines_marks_and_carriage_returns_are_no_documents(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"\xef\xbb\xbfthe red boat\r\n\r\n\nold man\n\r\nriver")
    assert read(path)[0] == ids(["the red boat", "old man", "river"])


@pytest.mark.parametrize("piece", [1, 3, 7, 2**24])
def test_rows_are_found_wherever_the_file_is_cut(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(lines, "PIECE", piece)
    path = tmp_path / "rows.csv"
    path.write_bytes(b'text,n\r\n"a\r\nb ""c"" ",1\r\n\r\nd,2\n"e\n\n",3')
    spans = find_rows(path, table=True)
    content = path.read_bytes()
    assert [content[a:b] for a, b in spans] == [b'"a\r\nb ""c"" ",1', b"d,2", b'"e\n\n",3']


@pytest.mark.parametrize("streaming", [True, False])
def test_directories_globs_and_files_name_the_same_data(tmp_path, streaming):
    for i in range(3):
        write_jsonl(tmp_path / "train" / f"part-{i}.jsonl", TEXTS[i * 20 : i * 20 + 20])
    write_jsonl(tmp_path / "validation" / "part-0.jsonl", ["old man"])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    how = {"dataset__streaming": streaming}
    assert read(tmp_path, **how)[0] == ids(TEXTS)
    assert read(tmp_path / "train", **how)[0] == ids(TEXTS)
    assert read(tmp_path / "train" / "*.jsonl", **how)[0] == ids(TEXTS)
    assert read(tmp_path / "train" / "part-[02].jsonl", **how)[0] == ids([*TEXTS[:20], *TEXTS[40:]])
    assert read(tmp_path / "train" / "part-1.jsonl", **how)[0] == ids(TEXTS[20:40])
    assert read(tmp_path / "validation" / "part-0.jsonl", **how)[0] == ids(["old man"])  # a file that is named is read


def test_a_tokenizer_or_figures_beside_the_data_are_no_documents(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", TEXTS[:10])
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "vocab.txt").write_text("the\nred\n")
    (tmp_path / "figures.json").write_text('{"loss": 1}')
    assert read(tmp_path)[0] == ids(TEXTS[:10])


@pytest.mark.parametrize("streaming", [True, False])
def test_saved_data_sets_are_read(tmp_path, streaming):
    one, more = Dataset.from_dict({"text": TEXTS[:40]}), Dataset.from_dict({"text": TEXTS[40:]})
    one.save_to_disk(tmp_path / "one")
    DatasetDict({"train": one, "test": more}).save_to_disk(tmp_path / "several")
    one.save_to_disk(tmp_path / "apart" / "train")
    more.save_to_disk(tmp_path / "apart" / "validation")
    for place, split in (("one", None), ("several", "test"), ("apart", "validation")):
        assert read(tmp_path / place, dataset__streaming=streaming)[0] == ids(TEXTS[:40])
        heldout = open_data(data_params(tmp_path / place), TOKENIZER).heldout
        assert (heldout and heldout.split) == split


@pytest.mark.parametrize("streaming", [True, False])
def test_token_ids_of_unknown_origin_are_read_and_told(tmp_path, streaming):
    long = token_ids(" ".join(sentences(10)))
    rows = [list(token_ids(text)) for text in TEXTS[:10]]
    Dataset.from_dict({"input_ids": [*rows, list(long), []]}).save_to_disk(tmp_path)
    found, _ = read(tmp_path, dataset__streaming=streaming)
    assert found[:10] == ids(TEXTS[:10])
    params = data_params(tmp_path, dataset__max_seq_length=128)
    assert "make sure that it is this one" in open_data(params, TOKENIZER).describe()
    assert found[10] == (*long[:127], long[-1])  # the first piece


def test_token_ids_beyond_the_tokenizer_are_refused(tmp_path):
    Dataset.from_dict({"input_ids": [[2, 5, 3], [2, len(TOKENIZER), 3]]}).save_to_disk(tmp_path)
    with pytest.raises(UserError, match=rf"row 1: token {len(TOKENIZER)} is none of the tokenizer's"):
        read(tmp_path)


def test_parquet_behind_a_url_is_streamed_like_a_local_file(tmp_path):
    memory = fsspec.filesystem("memory")
    for i in range(2):
        path = write_parquet(tmp_path / f"train-{i}.parquet", TEXTS[i * 30 : i * 30 + 30])
        memory.pipe(f"/corpus/train-{i}.parquet", path.read_bytes())
    memory.pipe("/corpus/README.md", b"no data")
    try:
        for url in ("memory://corpus", "memory://corpus/*.parquet"):
            found, keys = read(url, dataset__streaming=True)
            assert found == ids(TEXTS)
            assert keys == read(tmp_path, dataset__streaming=True)[1]
        memory.pipe("/lines/train.jsonl", b'{"text": "a"}\n')
        with pytest.raises(UserError, match=r"cannot be read from the middle.*dataset\.streaming false"):
            read("memory://lines", dataset__streaming=True)
    finally:
        memory.rm("/corpus", recursive=True)
        memory.rm("/lines", recursive=True)


def test_a_hub_data_set_is_streamed_from_parquet_and_refused_from_anything_else(tmp_path):
    # The library's builder of a hub data set, made of local files.
    write_parquet(tmp_path / "parquet" / "train.parquet", TEXTS)
    write_parquet(tmp_path / "parquet" / "validation.parquet", TEXTS[:3])
    write_jsonl(tmp_path / "lines" / "train.jsonl", TEXTS)
    params = data_params(None, dataset__name="owner/name", dataset__streaming=True).dataset
    splits = builder_splits(load_dataset_builder(str(tmp_path / "parquet")), params)
    assert {split: [shard.open().count for shard in shards] for split, shards in splits.items()} == {
        "train": [60],
        "validation": [3],
    }
    with pytest.raises(UserError, match=r"owner/name is stored as train\.jsonl.*dataset\.streaming false"):
        builder_splits(load_dataset_builder(str(tmp_path / "lines")), params)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not JSONL"),
        (b'{"text": "\xff\xfe"}', "not UTF-8"),
        (b'["a list"]', "a JSON list, not an object"),
        (b'{"words": "x"}', "no column 'text'. Its columns are: words"),
    ],
)
def test_a_corrupt_row_is_named_by_file_and_line(tmp_path, line, reason, streaming, workers):
    good = [json.dumps({"text": text}).encode() for text in TEXTS[:9]]
    (tmp_path / "train.jsonl").write_bytes(b"\n".join([*good[:4], b"", line, *good[4:]]))
    with pytest.raises(UserError) as caught:
        read(tmp_path, dataset__streaming=streaming, dataset__num_workers=workers)
    assert f"train.jsonl line 6: {reason}" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    found, keys = read(
        tmp_path, dataset__streaming=streaming, dataset__num_workers=workers, dataset__max_bad_fraction=0.2
    )
    assert found == ids(TEXTS[:9])
    assert keys == [0, 1, 2, 3, 5, 6, 7, 8, 9]  # the row keeps its number


@pytest.mark.parametrize("streaming", [True, False])
def test_a_first_row_that_is_corrupt_hides_no_columns(tmp_path, streaming):
    good = [json.dumps({"text": text, "lang": "en"}) for text in TEXTS[:9]]
    (tmp_path / "train.jsonl").write_text("\n".join(["{", *good]))
    how = {"dataset__streaming": streaming, "dataset__max_bad_fraction": 0.2, "dataset__language_column": "lang"}
    assert read(tmp_path, **how)[0] == ids(TEXTS[:9])
    (tmp_path / "train.jsonl").write_text("{\n{\n{")
    with pytest.raises(UserError, match=r"train\.jsonl line 1: not JSONL"):
        open_data(data_params(tmp_path, **how), TOKENIZER)


def test_half_a_surrogate_pair_is_an_unreadable_text(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [*TEXTS[:4]])
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": "old \\ud83d man"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl line 5: .*no Unicode"):
        read(tmp_path)
    assert read(tmp_path, dataset__max_bad_fraction=0.3)[0] == ids(TEXTS[:4])


def test_a_long_field_of_a_csv_file_is_read(tmp_path):
    text = "the red boat " * 12_000
    found, _ = read(write("csv", tmp_path, [text]))
    assert len(found) == 1  # the first of its pieces
    assert found[0][:3] == token_ids(text)[:3]


def test_a_quote_that_is_not_closed_ends_the_run_since_it_may_hide_rows(tmp_path):
    (tmp_path / "train.csv").write_text("id,text\n" + "".join(f"{i},old man\n" for i in range(200)) + '200,a "b\n3,c\n')
    with pytest.raises(UserError, match=r"train\.csv line 202: .*quote") as caught:
        read(tmp_path, dataset__max_bad_fraction=0.5)
    assert "max_bad_fraction" not in str(caught.value)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_csv_record_with_other_fields_than_the_header_is_named(tmp_path, streaming):
    (tmp_path / "train.csv").write_text("id,text\n1,a\n2,b,c\n")
    with pytest.raises(UserError, match=r"train\.csv line 3: not CSV \(3 fields, the header has 2\)"):
        read(tmp_path, dataset__streaming=streaming)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_corrupt_table_is_named_before_training(tmp_path, streaming):
    how = {"dataset__streaming": streaming}
    path = write_parquet(tmp_path / "corpus.parquet", TEXTS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"corpus\.parquet: cannot be read as parquet"):
        open_data(data_params(tmp_path, **how), TOKENIZER)
    path.unlink()
    write("arrow", tmp_path, TEXTS).write_bytes(b"no table")
    with pytest.raises(UserError, match=r"corpus\.arrow: cannot be read as an arrow file"):
        open_data(data_params(tmp_path / "corpus.arrow", **how), TOKENIZER)
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "whole")
    (tmp_path / "whole" / "state.json").write_text("{")
    with pytest.raises(UserError, match="whole: cannot be read as a saved data set"):
        open_data(data_params(tmp_path / "whole", **how), TOKENIZER)


def test_a_damaged_row_group_is_named_when_it_is_reached(tmp_path):
    path = write_parquet(tmp_path / "train.parquet", TEXTS)
    content = bytearray(path.read_bytes())
    content[8:200] = bytes(192)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train\.parquet: row group 0 cannot be read"):
        read(tmp_path, dataset__streaming=True)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_damaged_archive_is_named(tmp_path, streaming):
    whole = gzip.compress(write("jsonl", tmp_path / "plain", TEXTS).read_bytes())
    for content in (whole[: len(whole) // 2], b"no archive"):
        (tmp_path / "train.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match=r"train\.jsonl\.gz: cannot be unpacked"):
            open_data(data_params(tmp_path / "train.jsonl.gz", dataset__streaming=streaming), TOKENIZER)


def test_an_unknown_format_is_refused_with_those_that_are_known(tmp_path):
    (tmp_path / "corpus.pdf").write_bytes(b"x")
    with pytest.raises(UserError, match=r"corpus\.pdf: no format that can be read \(.*\.jsonl"):
        read(tmp_path / "corpus.pdf")
    with pytest.raises(UserError, match="holds no file that can be read"):
        read(tmp_path)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_that_cannot_be_reached_is_told_with_a_remedy(monkeypatch, streaming):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    params = data_params(None, dataset__name="owner/name", dataset__streaming=streaming)
    with pytest.raises(UserError, match=r"hub data set owner/name cannot be opened.*dataset\.path takes local files"):
        open_data(params, TOKENIZER)
    for name in ("text", "/owner/name"):
        with pytest.raises(UserError, match=r"is no hub id such as OWNER/NAME"):
            open_data(data_params(None, dataset__name=name, dataset__streaming=streaming), TOKENIZER)
