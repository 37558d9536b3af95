"""Tables of any kind give the same rows; what cannot be read is named by file and line."""

import gzip
import json

import pytest
from datasets import Dataset
from pair_files import find_files, read_records

from params.errors import UserError

ROWS = [{"text": "සිංහල \u2028 one", "text_tgt": 'a "quoted", comma'}, {"text": "اردو", "text_tgt": "line\nbreak"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.tsv", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, jsonl, table):
    path = tmp_path / name.removesuffix(".gz")
    if ".jsonl" in name:
        jsonl(path, ROWS)
    elif name.endswith(".parquet"):
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        table(path, ROWS[0], [row.values() for row in ROWS])
    if name.endswith(".gz"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
    assert [dict(record.values) for record in read_records(str(path))] == ROWS


def test_a_directory_is_read_in_the_order_of_its_names(tmp_path, jsonl):
    (tmp_path / "deep").mkdir()
    jsonl(tmp_path / "deep" / "z.jsonl", [{"n": 3}])
    jsonl(tmp_path / "b.jsonl", [{"n": 2}])
    jsonl(tmp_path / "a.jsonl", [{"n": 1}])
    (tmp_path / "README.md").write_text("no table")
    assert [record.values["n"] for record in read_records(str(tmp_path))] == [1, 2, 3]


def test_an_unreadable_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{broken\n")
    with pytest.raises(UserError, match=r"a\.jsonl line 2 is not JSON .*Mend the line"):
        list(read_records(str(path)))
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="line 1 is a JSON list"):
        list(read_records(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,text_tgt\na,b\nc\n", r"line 3 has 1 fields and the header 2"),
        ("a.csv", b"text,text_tgt\na,b,c\n", r"line 2 has 3 fields"),
        ("a.csv", b'text,text_tgt\n"a,b\n', "Mend its quotes"),
        ("a.jsonl", b'{"text": "\xff"}\n', "UTF-8"),
        ("a.jsonl.gz", b"no gzip", "Is it whole"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20], "Is it whole"),
        ("a.parquet", b"PAR1 cut off", "cannot be read as parquet"),
        ("a.docx", b"", "no table that can be read here"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_records(str(tmp_path / name)))
    assert name in str(caught.value)


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="there is no file or directory"):
        find_files(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="holds no table"):
        find_files(str(tmp_path))
