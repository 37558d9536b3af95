"""What each source gives for the columns of its releases, and what it leaves out."""

import http.server
import threading
from collections import Counter
from functools import partial

import parallel_text
import pytest
from datasets import Dataset
from pair_sources import PairOptions, parse_sources, read_source
from run_data import DataPlan, read_data, sft_rows
from stratified import LeftOut, TextPair

from params.errors import UserError

TURNS = [{"role": "user", "content": "a"}]
SINHALA = PairOptions(language_pairs=(("eng_Latn", "sin_Sinh"),))


def read(name, path, options=None):
    """The pairs of a source, and why rows were left out."""
    rows = list(read_source(name, str(path), options or PairOptions()))
    left_out = Counter(row.reason for row in rows if isinstance(row, LeftOut))
    return [row for row in rows if isinstance(row, TextPair)], left_out


def texts(pairs):
    return [(pair.text, pair.text_tgt) for pair in pairs]


# Labelled pairs


@pytest.mark.parametrize(
    ("name", "row", "kept"),
    [
        ("all-nli", {"anchor": "a", "positive": "b"}, True),
        ("all-nli", {"anchor": "a", "positive": "b", "negative": "c"}, True),
        ("all-nli", {"premise": "a", "hypothesis": "b", "label": 0}, True),
        ("all-nli", {"premise": "a", "hypothesis": "b", "label": "entailment"}, True),
        ("all-nli", {"premise": "a", "hypothesis": "b", "label": 1}, False),
        ("all-nli", {"premise": "a", "hypothesis": "b", "label": 2}, False),
        ("all-nli", {"premise": "a", "hypothesis": "b", "label": -1}, False),
        ("all-nli", {"sentence1": "a", "sentence2": "b", "score": 1.0}, True),
        ("all-nli", {"sentence1": "a", "sentence2": "b", "score": 0.5}, False),
        ("all-nli", {"sentence1": "a", "sentence2": "b", "score": 0.0}, False),
        ("quora-duplicates", {"anchor": "a", "positive": "b"}, True),
        ("quora-duplicates", {"anchor": "a", "positive": "b", "negative": "c"}, True),
        ("quora-duplicates", {"sentence1": "a", "sentence2": "b", "label": 1}, True),
        ("quora-duplicates", {"sentence1": "a", "sentence2": "b", "label": 0}, False),
        ("quora-duplicates", {"id": 1, "question1": "a", "question2": "b", "is_duplicate": 1}, True),
        ("quora-duplicates", {"id": 1, "question1": "a", "question2": "b", "is_duplicate": 0}, False),
        ("natural-questions", {"query": "a", "answer": "b"}, True),
        ("mine", {"text": "a", "text_tgt": "b"}, True),
        ("mine", {"anchor": "a", "positive": "b"}, True),
    ],
)
def test_only_texts_of_one_meaning_are_pairs(tmp_path, jsonl, name, row, kept):
    pairs, left_out = read(name, jsonl(tmp_path / "rows.jsonl", [row]))
    assert texts(pairs) == ([("a", "b")] if kept else [])
    assert left_out.total() == (not kept)
    assert all(pair.text_neg is None for pair in pairs)


def test_contradictions_and_neutrals_are_filtered_from_a_csv_file(sources):
    pairs, left_out = read("all-nli", sources["all-nli"])
    assert len(pairs) == 20
    assert left_out == {"neutral": 20, "contradiction": 20}


def test_a_contradiction_of_the_same_premise_is_its_hard_negative(sources):
    pairs, left_out = read("all-nli", sources["all-nli"], PairOptions(hard_negatives=True))
    assert len(pairs) == 20
    assert all(pair.text_neg and pair.text_neg not in (pair.text, pair.text_tgt) for pair in pairs)
    assert left_out == {"neutral": 20, "contradiction": 20}


def test_rows_without_a_hard_negative_are_left_out(tmp_path, jsonl):
    rows = [
        {"anchor": "a", "positive": "b", "negative": "c"},
        {"anchor": "d", "positive": "e", "negative": ""},
        {"anchor": "f", "positive": "g"},
    ]
    pairs, left_out = read("mine", jsonl(tmp_path / "rows.jsonl", rows), PairOptions(hard_negatives=True))
    assert [(pair.text, pair.text_neg) for pair in pairs] == [("a", "c")]
    assert left_out == {"no hard negative": 2}


def test_a_local_source_tells_its_languages(tmp_path, jsonl):
    rows = [
        {"text": "a", "text_tgt": "b", "language": "si", "language_tgt": "ur"},
        {"text": "c", "text_tgt": "d", "language": "si"},
        {"text": "e", "text_tgt": "f"},
    ]
    pairs, _ = read("mine", jsonl(tmp_path / "rows.jsonl", rows))
    assert [pair.language for pair in pairs] == ["si-ur", "si", ""]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("all-nli", {"premise": "a", "label": 0}, "rows.jsonl line 1: all-nli has the columns premise, label"),
        ("all-nli", {"premise": "a", "hypothesis": "b", "label": 7}, "label is 7; all-nli knows 0"),
        ("all-nli", {"premise": "a", "hypothesis": "b", "label": None}, "label is None"),
        ("quora-duplicates", {"sentence1": "a", "sentence2": "b", "label": "x"}, "label is 'x'"),
        ("natural-questions", {"query": "a", "answer": 3}, "line 1: answer is int '3', not text"),
        ("mine", {"text": "a"}, "text, text_tgt"),
        ("nllb", {"translation": {"eng_Latn": "a"}, "laser_score": 1.3}, "texts of two languages"),
        ("nllb", {"translation": {"eng_Latn": "a", "sin_Sinh": "b"}}, "laser_score is None, not a number"),
        ("flores", {"id": 1, "text": "a"}, "iso_639_3"),
        ("flores", {"iso_639_3": "eng", "iso_15924": "Latn", "text": "a"}, "A row needs id"),
    ],
)
def test_a_bad_row_is_named_with_what_it_needs(tmp_path, jsonl, name, row, message):
    path = jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError, match=message):
        read(name, path, SINHALA)


# Parallel text


def test_flores_pairs_the_sentences_of_an_id_in_the_split_alone(sources):
    options = PairOptions(language_pairs=(("eng_Latn", "sin_Sinh"), ("urd_Arab", "sin_Sinh")))
    pairs, _ = read("flores", sources["flores"], options)
    assert Counter(pair.language for pair in pairs) == {"eng_Latn-sin_Sinh": 25, "urd_Arab-sin_Sinh": 25}
    assert all(pair.text.split()[1:] == pair.text_tgt.split()[1:] for pair in pairs)
    assert {pair.text.split()[0] for pair in pairs} == {"eng", "urd"}
    devtest, _ = read(
        "flores", sources["flores"], PairOptions(language_pairs=SINHALA.language_pairs, flores_split="devtest")
    )
    assert len(devtest) == 5
    assert not set(texts(devtest)) & set(texts(pairs))


def test_flores_of_the_first_release_has_its_languages_in_columns(tmp_path, jsonl):
    rows = [{"id": n, "sentence_eng_Latn": f"e{n}", "sentence_sin_Sinh": f"s{n}", "URL": "x"} for n in range(3)]
    pairs, _ = read("flores", jsonl(tmp_path / "rows.jsonl", rows), SINHALA)
    assert texts(pairs) == [("e0", "s0"), ("e1", "s1"), ("e2", "s2")]


def test_a_sentence_without_a_translation_is_left_out(tmp_path, jsonl):
    rows = [{"id": n, "iso_639_3": "eng", "iso_15924": "Latn", "text": f"e{n}"} for n in range(3)]
    rows += [{"id": 1, "iso_639_3": "sin", "iso_15924": "Sinh", "text": "s1"}]
    pairs, left_out = read("flores", jsonl(tmp_path / "rows.jsonl", rows), SINHALA)
    assert texts(pairs) == [("e1", "s1")]
    assert left_out == {"no translation": 2}


def test_two_varieties_under_one_code_are_refused(tmp_path, jsonl):
    rows = [{"id": 1, "iso_639_3": "eng", "iso_15924": "Latn", "text": text} for text in ("one", "two")]
    with pytest.raises(UserError, match="line 2: eng_Latn has two different sentences"):
        read("flores", jsonl(tmp_path / "rows.jsonl", rows), SINHALA)


def test_an_unknown_language_is_told_with_the_one_that_was_meant(sources):
    with pytest.raises(UserError, match=r"flores has no text in sin_Sihn, did you mean 'sin_Sinh'\?"):
        read("flores", sources["flores"], PairOptions(language_pairs=(("eng_Latn", "sin_Sihn"),)))
    with pytest.raises(UserError, match=r"nllb has no text in sin_Sihn, did you mean 'sin_Sinh'\?"):
        read("nllb", sources["nllb"], PairOptions(language_pairs=(("eng_Latn", "sin_Sihn"),)))
    with pytest.raises(UserError, match="no row of the split tests; it has dev, devtest"):
        read("flores", sources["flores"], PairOptions(language_pairs=SINHALA.language_pairs, flores_split="tests"))


@pytest.mark.parametrize(("least", "kept"), [(1.25, 20), (1.4, 5), (1.0, 40), (9.0, 0)])
def test_nllb_keeps_pairs_of_the_least_score_and_above(sources, least, kept):
    options = PairOptions(language_pairs=SINHALA.language_pairs, nllb_min_laser_score=least)
    pairs, left_out = read("nllb", sources["nllb"], options)
    assert len(pairs) == kept
    assert left_out.total() == 40 - kept


def test_nllb_reads_every_layout_of_its_rows_alike(tmp_path, jsonl, table, sources):
    expected, _ = read("nllb", sources["nllb"], SINHALA)
    rows = [
        {"translation": {"eng_Latn": pair.text, "sin_Sinh": pair.text_tgt}, "laser_score": 1.3} for pair in expected
    ]
    jsonl(tmp_path / "rows.jsonl", rows)
    # A table of several pairs of languages has a field for each, empty but for two.
    others = [{"translation": {"ace_Latn": "x", "ban_Latn": "y"}, "laser_score": 2.0}]
    Dataset.from_list([*rows, *others]).to_parquet(tmp_path / "rows.parquet")
    wide = [(pair.text, pair.text_tgt, 1.3) for pair in expected]
    table(tmp_path / "rows.tsv", ("eng_Latn", "sin_Sinh", "laser_score"), wide)
    for name in ("rows.jsonl", "rows.parquet", "rows.tsv"):
        assert read("nllb", tmp_path / name, SINHALA)[0] == expected
    assert read("nllb", tmp_path / "rows.parquet", SINHALA)[1] == {"other languages": 1}


def test_the_order_of_a_pair_is_that_of_the_command(sources):
    turned = PairOptions(language_pairs=(("sin_Sinh", "eng_Latn"),))
    assert texts(read("nllb", sources["nllb"], turned)[0]) == [
        (target, text) for text, target in texts(read("nllb", sources["nllb"], SINHALA)[0])
    ]


def test_at_most_so_many_lines_are_read_of_a_file(sources):
    pairs, left_out = read("nllb", sources["nllb"], PairOptions(nllb_min_laser_score=1.0, nllb_max_rows=7))
    assert (len(pairs), left_out.total()) == (7, 0)


def test_a_released_file_must_tell_its_languages(tmp_path, sources):
    path = tmp_path / "bitext.tsv"
    path.write_text("a\tb\t1.3\n")
    with pytest.raises(UserError, match="its name does not tell its languages"):
        read("nllb", path)
    path = tmp_path / "eng_Latn-sin_Sinh.tsv"
    path.write_text("a\tb\t1.3\nonly one field\n")
    with pytest.raises(UserError, match="line 2 has 1 tab-separated fields"):
        read("nllb", path)


def test_nllb_is_downloaded_by_the_names_of_its_release(sources, monkeypatch):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = partial(Quiet, directory=str(sources["nllb"].parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(parallel_text, "NLLB_FILES", f"http://127.0.0.1:{server.server_port}")
        options = PairOptions(language_pairs=(("sin_Sinh", "eng_Latn"), ("eng_Latn", "urd_Arab")))
        rows = list(read_source("nllb", None, options))
        server.shutdown()
    assert sum(isinstance(row, TextPair) for row in rows) == 20
    assert rows[-1] == LeftOut(source="nllb", language="eng_Latn-urd_Arab", reason="not mined")
    monkeypatch.setattr(parallel_text, "NLLB_FILES", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot be read: .*Download it where there is a network"):
        list(read_source("nllb", None, SINHALA))


def test_a_hub_that_cannot_be_reached_is_told_with_the_flags_of_this_script(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match=r"sentence-transformers/quora-duplicates.*--sources NAME=PATH") as caught:
        list(read_source("quora-duplicates", None, PairOptions()))
    assert not any(flag in str(caught.value) for flag in ("--data ", "--model ", "--demo", "--set "))


# All of a run


def test_sources_are_known_by_name_or_have_a_path():
    assert parse_sources(["flores", "mine=a.jsonl"]) == {"flores": None, "mine": "a.jsonl"}
    with pytest.raises(UserError, match=r"no source 'flore', did you mean 'flores'\? .* flore=PATH"):
        parse_sources(["flore"])
    with pytest.raises(UserError, match="give each source once"):
        parse_sources(["mine=a", "mine=b"])


def test_a_source_of_which_nothing_is_left_is_an_error(sources):
    options = PairOptions(nllb_min_laser_score=9.0)
    plan = DataPlan(
        sft=str(sources["sft"]),
        eval=None,
        sources={"nllb": str(sources["nllb"])},
        options=options,
        max_pairs=None,
        seed=0,
    )
    with pytest.raises(UserError, match="no pair is left of nllb: score below 9 40"):
        read_data(plan)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a"}], "line 1: an SFT row needs messages, or prompt and completion, or text"),
        ([{"text": "a"}, {"prompt": "a", "completion": "b"}], "line 2: an SFT row needs text, and this one has prompt"),
        ([{"prompt": "a", "completion": " "}], "completion is empty"),
        ([{"messages": []}], "messages must be a list of messages"),
        ([{"messages": [{"role": "user"}]}], "each with role and content"),
        ([{"messages": [{"role": "user", "content": 3}]}], "each with role and content as text"),
        ([{"text": TURNS}], "line 1: text must be text"),
        ([{"prompt": TURNS, "completion": "b"}], "line 1: prompt is messages and completion is text. Write both"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": TURNS, "completion": TURNS}],
            "line 2: prompt and completion are messages, and in the rows before text",
        ),
        ([], "holds no row"),
    ],
)
def test_bad_sft_rows_are_named(tmp_path, jsonl, rows, message):
    with pytest.raises(UserError, match=message):
        list(sft_rows(str(jsonl(tmp_path / "sft.jsonl", rows))))
