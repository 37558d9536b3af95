"""Rows of pairs: read, checked, tokenised, mixed, and drawn the same whenever a batch is asked for."""

import gzip
import io
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_pairs import LONGEST, colour_rows, pair_params, tokenizer, write_rows

from inft.encoders.contrastive.batches import ContrastiveBatches, evaluation_batches
from inft.encoders.contrastive.mixing import BLOCK, Mixture
from inft.encoders.contrastive.preprocess import preprocess_contrastive
from inft.encoders.contrastive.rows import BadPairs, Pairs, check_pairs, read_pairs, row_files
from inft.encoders.contrastive.sources import locate_sources, open_sources
from inft.encoders.contrastive.tokenized import NOTE, TokenizedPairs
from params.errors import UserError

QUIET = Console(file=io.StringIO())


def sources_of(params):
    return open_sources(params, tokenizer(), locate_sources(params, tokenizer(), QUIET))


def test_rows_of_text_and_of_lists_are_read_alike_from_jsonl_and_parquet(tmp_path):
    rows = [
        {"query": "a", "pos": "b", "neg": ["c", "d"], "score": 1},
        {"query": "e", "pos": ["f", "g"], "neg": None},
        {"query": "h", "pos": ["i"]},
    ]
    expected = [Pairs("a", ("b",), ("c", "d")), Pairs("e", ("f", "g"), ()), Pairs("h", ("i",), ())]
    write_rows(tmp_path / "a.jsonl", rows)
    lists = [{"query": r.query, "pos": list(r.positives), "neg": list(r.negatives)} for r in expected]
    pq.write_table(pa.Table.from_pylist(lists), tmp_path / "b.parquet")
    assert list(read_pairs(row_files(tmp_path))) == expected * 2
    assert check_pairs(row_files(tmp_path)) == 6


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"pos": "b"}', "query is missing (the row has: pos)"),
        ('{"query": "a", "positive": "b"}', "pos is missing (the row has: query, positive). Rename positive to pos"),
        ('{"Query": "a", "pos": "b"}', "Rename Query to query"),
        ('{"query": "a", "pos": "b", "negatives": ["c"]}', "negatives is not read. Rename negatives to neg"),
        ('{"query": "a", "pos": "b", "hard_negative": "c"}', "Rename hard_negative to neg"),
        ('{"query": "a", "pos": "b", "neg": [null]}', "neg holds null"),
        ('{"query": true, "pos": "b"}', "query holds true or false"),
        ('"a"', "the line is a string"),
        ('{"query": "a", "pos": []}', "pos is an empty list"),
        ('{"query": 3, "pos": "b"}', "query holds a number"),
        ('{"query": " ", "pos": "b"}', "query holds an empty text"),
        ('{"query": "a", "pos": ["b", ""]}', "pos holds an empty text"),
        ('{"query": "a", "pos": "b", "neg": [1]}', "neg holds a number"),
        ('{"query": ["a", "b"], "pos": "b"}', "query is a list of 2 texts"),
        ('{"query": "a\\ud800", "pos": "b"}', "half a surrogate pair"),
        ('{"query": "a"', "not JSON"),
        ('["a", "b"]', "the line is an array"),
        (b'{"query": "\xff", "pos": "b"}', "not UTF-8"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_field(tmp_path, line, words):
    good = b'{"query": "a", "pos": "b"}\n\n'
    file = tmp_path / "rows.jsonl"
    file.write_bytes(good + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    (bad,) = [row for row in read_pairs([file]) if isinstance(row, BadPairs)]
    assert bad.where == f"{file} line 3"
    assert words in bad.reason
    with pytest.raises(UserError, match="1 of 3 rows cannot be used") as error:
        preprocess_contrastive(pair_params(tmp_path, file), tmp_path / "out", QUIET, tokenizer())
    assert bad.where in str(error.value)
    assert not (tmp_path / "out" / "rows").exists()


def test_many_bad_rows_are_counted_and_the_first_ones_named(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"query": "a"}] * 20)
    with pytest.raises(UserError) as error:
        check_pairs([file])
    assert "20 of 20 rows" in str(error.value)
    assert "line 5:" in str(error.value)
    assert "line 6:" not in str(error.value)
    assert "15 more" in str(error.value)


def test_a_parquet_file_that_is_none_and_a_path_that_is_missing_are_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"bad\.parquet cannot be read as parquet"):
        check_pairs([tmp_path / "bad.parquet"])
    with pytest.raises(UserError, match="no such file"):
        row_files(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the directory has no file that ends in \.jsonl"):
        row_files(tmp_path / "empty")


def test_tokens_have_prefixes_and_limits_and_come_back_from_disk(tmp_path):
    rows = [{"query": "the red cat " * 30, "pos": ["a dog", "a cat"], "neg": ["the dog"]}, {"query": "a", "pos": "b"}]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    told = {"query_prefix": "query: ", "document_prefix": "passage: ", "query_max_length": 32}
    params = pair_params(tmp_path, file, contrastive=told)
    out = preprocess_contrastive(params, tmp_path / "out", QUIET, tokenizer())
    pairs = TokenizedPairs(out / "pairs")
    first, second = pairs.row(0), pairs.row(1)
    words = tokenizer()
    assert len(first.query) == 32
    assert words.decode(first.query).startswith("[CLS] query : the red cat the")
    assert [words.decode(text) for text in first.positives] == [
        "[CLS] passage : a dog [SEP]",
        "[CLS] passage : a cat [SEP]",
    ]
    assert [words.decode(text) for text in first.negatives] == ["[CLS] passage : the dog [SEP]"]
    assert len(set(first.positive_keys) | set(first.negative_keys) | {first.query_key}) == 4
    assert second.negatives == []
    assert json.loads((out / "pairs" / NOTE).read_text())["at_limit"] == 1


def test_what_was_preprocessed_otherwise_is_refused_and_the_difference_shown(tmp_path):
    file = write_rows(tmp_path / "pairs.jsonl", colour_rows(20))
    out = preprocess_contrastive(pair_params(tmp_path, file), tmp_path / "out", QUIET, tokenizer())
    other = pair_params(tmp_path, out, contrastive={"query_prefix": "q: "})
    with pytest.raises(UserError, match="query_prefix '' instead of 'q: '"):
        sources_of(other)
    grown = tokenizer()
    grown.add_tokens(["new"])
    with pytest.raises(UserError, match="tokenizer '"):
        open_sources(pair_params(tmp_path, out), grown, locate_sources(pair_params(tmp_path, out), grown, QUIET))
    assert len(sources_of(pair_params(tmp_path, out)).train[0].pairs) == 20


def test_a_source_is_tokenised_again_only_when_its_rows_change(tmp_path):
    file = write_rows(tmp_path / "pairs.jsonl", colour_rows(20))
    params = pair_params(tmp_path, file)
    written = (preprocess_contrastive(params, tmp_path / "out", QUIET, tokenizer()) / "pairs" / NOTE).stat().st_mtime_ns
    preprocess_contrastive(params, tmp_path / "out", QUIET, tokenizer())
    assert (tmp_path / "out" / "pairs" / NOTE).stat().st_mtime_ns == written
    write_rows(file, colour_rows(21))
    preprocess_contrastive(params, tmp_path / "out", QUIET, tokenizer())
    assert len(TokenizedPairs(tmp_path / "out" / "pairs")) == 21
    (tmp_path / "mine" / "pairs").mkdir(parents=True)
    with pytest.raises(UserError, match="holds something else"):
        preprocess_contrastive(params, tmp_path / "mine", QUIET, tokenizer())


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=4),
    batch_size=st.integers(1, 7),
    world_size=st.integers(1, 2),
    start=st.integers(0, 2 * BLOCK),
    seed=st.integers(0, 2**32),
)
def test_a_batch_is_a_pure_function_of_its_number_and_an_epoch_has_every_row_once(
    sizes, batch_size, world_size, start, seed
):
    def mixture(rank):
        return Mixture(
            sizes, alpha=0.5, seed=seed, batch_size=batch_size, rank=rank, world_size=world_size, simcse_share=0.3
        )

    ranks = [mixture(rank) for rank in range(world_size)]
    for rank in ranks:
        rank.place(start + 3)  # what was asked for before makes no difference
    places = [rank.place(start) for rank in ranks]
    again = [mixture(rank).place(start) for rank in range(world_size)]
    for one, other in zip(places, again, strict=True):
        assert (one.source, one.epoch, one.simcse) == (other.source, other.epoch, other.simcse)
        assert one.rows.tolist() == other.rows.tolist()
    assert len({place.source for place in places}) == 1
    seen = Counter(row for place in places for row in place.rows.tolist())
    assert max(seen.values()) == 1
    assert sum(seen.values()) == min(batch_size * world_size, sizes[places[0].source])


def test_an_epoch_goes_through_whole_batches_of_a_new_order_without_repeats():
    mixture = Mixture([10], alpha=1.0, seed=1, batch_size=3)
    epochs = [np.concatenate([mixture.place(3 * e + i).rows for i in range(3)]).tolist() for e in range(4)]
    assert all(len(set(rows)) == 9 for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 4
    assert set().union(*epochs) == set(range(10))


def test_an_epoch_counts_the_rows_that_batches_have():
    small = Mixture([80], alpha=1.0, seed=0, batch_size=256)
    assert [small.epochs(number) for number in range(3)] == [0.0, 1.0, 2.0]
    mixed = Mixture([1000, 10], alpha=0.5, seed=0, batch_size=50, world_size=2)
    after = BLOCK + 7
    seen = sum((100, 10)[mixed.place(number).source] for number in range(after))
    assert mixed.epochs(after) == pytest.approx(seen / 1010)


def test_a_source_smaller_than_a_batch_is_named(tmp_path):
    params = pair_params(tmp_path, write_rows(tmp_path / "few.jsonl", colour_rows(7)))
    assert ContrastiveBatches(sources_of(params).train, params).notices == [
        "source few has 7 rows: its batches have 7 rows, not 8."
    ]
    many = pair_params(tmp_path, write_rows(tmp_path / "many.jsonl", colour_rows(8)))
    assert ContrastiveBatches(sources_of(many).train, many).notices == []


def test_sources_are_drawn_by_size_to_the_alpha():
    for alpha, share in ((1.0, 0.9), (0.5, 0.75), (0.0, 0.5)):
        mixture = Mixture([900, 100], alpha=alpha, seed=3, batch_size=4)
        drawn = [mixture.place(number).source for number in range(4000)]
        assert drawn.count(0) / 4000 == pytest.approx(share, abs=0.03)


def test_batches_go_on_exactly_where_they_stood(tmp_path):
    for name, rows in (("one", colour_rows(30)), ("two", colour_rows(17, first=40))):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    told = {"path": None, "sources": {name: str(tmp_path / f"{name}.jsonl") for name in ("one", "two")}}
    params = pair_params(tmp_path, dataset=told, contrastive={"max_hard_negatives": 1, "simcse_share": 0.2})
    sources = sources_of(params).train
    whole = ContrastiveBatches(sources, params)
    straight = [next(iter(whole)) for _ in range(12)]
    resumed = ContrastiveBatches(sources, params, start=7)
    for batch, expected in zip([next(iter(resumed)) for _ in range(5)], straight[7:], strict=True):
        assert (batch.source, batch.simcse) == (expected.source, expected.simcse)
        for mine, theirs in ((batch.queries, expected.queries), (batch.positives, expected.positives)):
            assert [text.tolist() for text in mine] == [text.tolist() for text in theirs]
        assert batch.negative_keys_N2.tolist() == expected.negative_keys_N2.tolist()
    assert {batch.source for batch in straight} == {"one", "two"}
    assert {batch.simcse for batch in straight} == {False, True}


def test_positives_and_hard_negatives_are_drawn_anew_in_each_epoch(tmp_path):
    rows = [{"query": "a", "pos": ["red", "green", "blue"], "neg": ["cat", "dog", "car", "tree"]}]
    params = pair_params(tmp_path, write_rows(tmp_path / "pairs.jsonl", rows), contrastive={"max_hard_negatives": 2})
    batches = iter(ContrastiveBatches(sources_of(params).train, params))
    drawn = [next(batches) for _ in range(60)]
    assert len({batch.positives[0].tobytes() for batch in drawn}) == 3
    assert len({tuple(text.tobytes() for text in batch.negatives) for batch in drawn}) == 6  # 2 of 4
    assert {len(batch.negatives) for batch in drawn} == {2}


def test_a_weight_of_0_encodes_no_hard_negatives(tmp_path):
    file = write_rows(tmp_path / "pairs.jsonl", colour_rows(20))
    params = pair_params(tmp_path, file, contrastive={"hard_negative_weight": 0.0})
    assert next(iter(ContrastiveBatches(sources_of(params).train, params))).negatives == []


def names(rows) -> list[tuple[str, int, int]]:
    return [(source.name, source.first, source.rows) for source in rows]


def test_rows_are_held_out_by_number_by_source_and_by_file(tmp_path):
    raw = tmp_path / "raw"
    for name, rows in (("one", colour_rows(60)), ("two", colour_rows(10, first=60))):
        write_rows(raw / f"{name}.jsonl", rows)
    both = {name: str(raw / f"{name}.jsonl") for name in ("one", "two")}
    named = sources_of(pair_params(tmp_path, dataset={"path": None, "sources": both, "eval_split": "two"}))
    assert (names(named.train), names(named.heldout)) == ([("one", 0, 60)], [("two", 0, 10)])
    file = pair_params(tmp_path, raw / "one.jsonl", dataset={"eval_split": str(raw / "two.jsonl")})
    assert [source.rows for source in sources_of(file).heldout] == [10]
    counted = sources_of(pair_params(tmp_path, dataset={"path": None, "sources": both, "eval_samples": 14}))
    assert names(counted.heldout) == [("one", 0, 12), ("two", 0, 2)]
    assert names(counted.train) == [("one", 12, 48), ("two", 2, 8)]
    none = sources_of(pair_params(tmp_path, dataset={"path": None, "sources": both}))
    assert not none.heldout
    assert "there is no evaluation" in none.describe()
    with pytest.raises(UserError, match="neither a source"):
        sources_of(pair_params(tmp_path, raw / "one.jsonl", dataset={"eval_split": "tset"}))
    with pytest.raises(UserError, match="leaves none"):
        sources_of(pair_params(tmp_path, raw / "one.jsonl", dataset={"eval_samples": 60}))


def test_evaluation_splits_beside_the_rows_are_found_and_never_trained_on(tmp_path):
    raw = tmp_path / "nli"
    for name, first in (("train-0", 0), ("train-1", 20), ("validation", 40), ("test", 60)):
        write_rows(raw / f"{name}.jsonl", colour_rows(20, first=first))
    found = sources_of(pair_params(tmp_path, raw))
    assert names(found.train) == [("nli", 0, 40)]
    assert names(found.heldout) == [("nli.validation", 0, 20)]
    assert "neither trained on nor evaluated: nli.test" in found.describe()
    told = sources_of(pair_params(tmp_path, raw, dataset={"eval_split": "test"}))
    assert (names(told.train), names(told.heldout)) == ([("nli", 0, 40)], [("nli.test", 0, 20)])
    out = preprocess_contrastive(pair_params(tmp_path, raw), tmp_path / "out", QUIET, tokenizer())
    again = sources_of(pair_params(tmp_path, out))
    assert (names(again.train), names(again.heldout)) == (names(found.train), names(found.heldout))
    both = {"path": None, "sources": {"nli": str(raw), "other": str(raw / "train-0.jsonl")}}
    mixed = sources_of(pair_params(tmp_path, dataset=both))
    assert names(mixed.train) == [("nli", 0, 40), ("other", 0, 20)]
    alone = sources_of(pair_params(tmp_path, raw / "test.jsonl"))
    assert names(alone.train) == [("test", 0, 20)]  # there is nothing else


def test_what_an_earlier_preprocessing_left_is_not_trained_on_by_accident(tmp_path):
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", colour_rows(20))
    preprocess_contrastive(pair_params(tmp_path, tmp_path / "a.jsonl"), tmp_path / "out", QUIET, tokenizer())
    with pytest.raises(UserError, match="also holds a, which would be trained on"):
        preprocess_contrastive(pair_params(tmp_path, tmp_path / "b.jsonl"), tmp_path / "out", QUIET, tokenizer())


def test_evaluation_has_each_held_out_row_once_and_the_same_every_time(tmp_path):
    file = write_rows(tmp_path / "pairs.jsonl", colour_rows(50))
    params = pair_params(tmp_path, file, dataset={"eval_samples": 21}, trainer={"per_device_eval_batch_size": 8})
    heldout = sources_of(params).heldout
    one, other = ([b.positive_keys_B2.tolist() for b in evaluation_batches(heldout, params)] for _ in range(2))
    assert one == other
    assert [len(batch) for batch in one] == [7, 7, 7]


def test_texts_are_cut_at_the_longest_allowed(tmp_path):
    rows = [{"query": "cat " * 200, "pos": "dog " * 200}]
    params = pair_params(tmp_path, write_rows(tmp_path / "pairs.jsonl", rows))
    row = sources_of(params).train[0].pairs.row(0)
    assert (len(row.query), len(row.positives[0])) == (LONGEST, LONGEST)


def test_rows_beside_scores_and_near_misses_of_fields_that_are_there_are_read(tmp_path):
    rows = [{"query": "a", "pos": ["b"], "neg": ["c"], "neg_scores": [1], "negatives": 3, "post": "d", "title": "e"}]
    console = Console(file=io.StringIO(), width=400)
    params = pair_params(tmp_path, write_rows(tmp_path / "pairs.jsonl", rows))
    preprocess_contrastive(params, tmp_path / "out", console, tokenizer())
    assert "fields that are not read: neg_scores, negatives, post, title" in console.file.getvalue()
    console = Console(file=io.StringIO(), width=400)
    locate_sources(params, tokenizer(), console)
    assert "fields that are not read: neg_scores, negatives, post, title" in console.file.getvalue()


def test_a_misspelt_column_of_a_parquet_file_is_refused(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"query": "a", "pos": ["b"], "negs": ["c"]}]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="Rename negs to neg"):
        check_pairs([tmp_path / "a.parquet"])


def test_the_line_about_rows_counts_those_with_negatives(tmp_path):
    rows = [*colour_rows(6), *colour_rows(4, negatives=0)]
    params = pair_params(tmp_path, write_rows(tmp_path / "pairs.jsonl", rows), dataset={"eval_samples": 3})
    assert "rows: pairs 7 (3 with negatives); held out: pairs 3 (3 with negatives)" in sources_of(params).describe()


@pytest.mark.parametrize("pattern", ["*.jsonl", "**/*.jsonl", "nli-?.jsonl*"])
def test_a_path_may_be_a_glob_and_files_compressed(tmp_path, pattern):
    raw = tmp_path / "raw"
    write_rows(raw / "nli-0.jsonl", colour_rows(10))
    write_rows(raw / "nli-1.jsonl", colour_rows(10, first=10))
    packed = gzip.compress((raw / "nli-1.jsonl").read_bytes())
    (raw / "nli-2.jsonl.gz").write_bytes(packed)
    found = sources_of(pair_params(tmp_path, raw / pattern))
    assert names(found.train) == [("raw", 0, 30 if pattern.endswith("l*") else 20)]
    alone = sources_of(pair_params(tmp_path, raw / "nli-2.jsonl.gz"))
    assert names(alone.train) == [("nli-2", 0, 10)]
    given = {"path": None, "sources": {"mine": str(raw / pattern)}}
    assert sources_of(pair_params(tmp_path, dataset=given)).train[0].name == "mine"
    with pytest.raises(UserError, match=r"no file fits"):
        row_files(raw / "*.parquet")


def test_a_compressed_file_that_is_cut_off_is_named(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"query": "a", "pos": "b"}\n' * 1000)[:-20])
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz cannot be unpacked"):
        check_pairs([file])
    file.write_bytes(b"plain")
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz cannot be unpacked"):
        check_pairs([file])


def test_a_source_that_is_preprocess_output_is_pointed_into(tmp_path):
    out = preprocess_contrastive(
        pair_params(tmp_path, write_rows(tmp_path / "pairs.jsonl", colour_rows(20))),
        tmp_path / "out",
        QUIET,
        tokenizer(),
    )
    with pytest.raises(UserError, match=rf"dataset\.sources\.a: .* set it to {out / 'pairs'}"):
        sources_of(pair_params(tmp_path, dataset={"path": None, "sources": {"a": str(out)}}))
    inside = pair_params(tmp_path, dataset={"path": None, "sources": {"a": str(out / "pairs")}})
    assert names(sources_of(inside).train) == [("a", 0, 20)]


@pytest.mark.parametrize("place", [0.3, 0.6])
def test_tokens_that_rotted_on_the_disk_are_refused_by_name(tmp_path, place):
    file = write_rows(tmp_path / "pairs.jsonl", colour_rows(40))
    params = pair_params(tmp_path, file)
    out = preprocess_contrastive(params, tmp_path / "out", QUIET, tokenizer())
    rows = out / "pairs" / "rows.arrow"
    content = bytearray(rows.read_bytes())
    middle = int(len(content) * place)
    content[middle : middle + 16] = b"\xff" * 16
    rows.write_bytes(content)
    with pytest.raises(UserError, match=r"rows\.arrow is not as it was written"):
        sources_of(pair_params(tmp_path, out))
    with pytest.raises(UserError, match=r"rows\.arrow is not as it was written"):
        preprocess_contrastive(params, tmp_path / "out", QUIET, tokenizer())


def test_tokens_of_an_earlier_format_are_made_again(tmp_path):
    file = write_rows(tmp_path / "pairs.jsonl", colour_rows(20))
    out = preprocess_contrastive(pair_params(tmp_path, file), tmp_path / "out", QUIET, tokenizer())
    note = json.loads((out / "pairs" / NOTE).read_text())
    (out / "pairs" / NOTE).write_text(json.dumps(note | {"format": 1}))
    with pytest.raises(UserError, match="is of format 1"):
        sources_of(pair_params(tmp_path, out))
    preprocess_contrastive(pair_params(tmp_path, file), tmp_path / "out", QUIET, tokenizer())
    assert len(sources_of(pair_params(tmp_path, out)).train[0].pairs) == 20
