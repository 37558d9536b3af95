"""Retrieval and similarity figures against plain definitions, hand-computed examples and files with mistakes."""

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inft.encoders.evaluation import ranking
from inft.encoders.evaluation.ranking import ranking_figures, top_documents
from inft.encoders.evaluation.retrieval import evaluate_retrieval
from inft.encoders.evaluation.sts import evaluate_sts
from params.errors import UserError

VOCABULARY = ("cat", "dog", "car", "tree", "house", "boat", "bird", "horse")


class BagOfWords:
    """An embedder whose vectors count words: what is similar can be seen by hand."""

    def embed(self, texts, *, prompt="document"):
        return np.array([[text.split().count(word) for word in VOCABULARY] for text in texts], dtype=np.float32)


def plain_figures(ranked, grades, k):
    """recall@k, nDCG@k and MRR as their definitions read."""
    recalls, ndcgs, ranks = [], [], []
    for places, judged in zip(ranked, grades, strict=True):
        relevant = {place for place, grade in judged.items() if grade > 0}
        if not relevant:
            continue
        recalls.append(len(relevant & set(places[:k])) / len(relevant))
        gain = sum(judged.get(place, 0) / math.log2(i + 2) for i, place in enumerate(places[:k]) if place in relevant)
        best = sorted((judged[place] for place in relevant), reverse=True)[:k]
        ndcgs.append(gain / sum(grade / math.log2(i + 2) for i, grade in enumerate(best)))
        ranks.append(next((1 / (i + 1) for i, place in enumerate(places[:100]) if place in relevant), 0))
    return [sum(values) / len(values) for values in (recalls, ndcgs, ranks)]


def test_golden_figures():
    ranked = [[3, 1, 0, 2], [2, 0, 1, 3], [0, 1, 2, 3]]
    grades = [{1: 2.0, 2: 1.0}, {2: 1.0}, {}]  # the third query is judged nowhere
    found = ranking_figures(ranked, grades, (1, 3))
    assert found["recall_at_1"] == 0.5
    assert found["recall_at_3"] == 0.75
    first = (2 / math.log2(3)) / (2 + 1 / math.log2(3))  # 0.4796
    assert found["ndcg_at_3"] == pytest.approx((first + 1) / 2, abs=1e-12)
    assert found["ndcg_at_3"] == pytest.approx(0.739812, abs=1e-6)
    assert found["mrr"] == 0.75


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    queries=st.integers(1, 6), documents=st.integers(1, 130), k=st.sampled_from([1, 5, 10]), seed=st.integers(0, 999)
)
def test_figures_equal_their_definitions(queries, documents, k, seed):
    draw = random.Random(seed)
    ranked = [draw.sample(range(documents), documents) for _ in range(queries)]
    grades = [
        {place: draw.choice([-1, 0, 1, 2, 3]) for place in draw.sample(range(documents), min(documents, 5))}
        for _ in range(queries)
    ]
    grades[0][0] = 1
    found = ranking_figures(ranked, grades, (k,))
    expected = plain_figures(ranked, grades, k)
    assert [found[f"recall_at_{k}"], found[f"ndcg_at_{k}"], found["mrr"]] == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    queries=st.integers(1, 5),
    documents=st.integers(1, 60),
    depth=st.integers(1, 70),
    block=st.integers(1, 60),
    similarities=st.sampled_from([1, 7, 2**24]),
    seed=st.integers(0, 999),
)
def test_blocks_find_what_a_full_sort_finds_and_ties_go_to_the_first(
    queries, documents, depth, block, similarities, seed
):
    generator = torch.Generator().manual_seed(seed)
    queries_QD, documents_ND = (
        torch.randint(-1, 2, (rows, 3), generator=generator).float() for rows in (queries, documents)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "SIMILARITIES", similarities)
        scores_QK, places_QK = top_documents(queries_QD, documents_ND.split(block), depth)
    every_QN = queries_QD @ documents_ND.T
    for scores, places, row in zip(scores_QK, places_QK, every_QN.tolist(), strict=True):
        order = sorted(range(documents), key=lambda place: (-row[place], place))[:depth]
        assert places.tolist() == order
        assert scores.tolist() == [row[place] for place in order]


def write_task(directory, qrels="query-id\tcorpus-id\tscore\nq1\td2\t2\nq1\td3\t1\nq2\td4\t1\n"):
    directory.mkdir(exist_ok=True)
    corpus = [
        ("d1", "car", "car"),
        ("d2", "", "cat dog"),
        ("d3", "cat", "tree tree"),
        ("d4", "", "boat boat"),
        ("q2", "", "boat boat boat"),
    ]
    rows = [{"_id": name, "title": title, "text": text} for name, title, text in corpus]
    queries = [{"_id": "q1", "text": "cat"}, {"_id": "q2", "text": "boat"}, {"_id": "q3", "text": "bird"}]
    for name, values in (("corpus", rows), ("queries", queries)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    (directory / "qrels.tsv").write_text(qrels)
    return directory


def test_retrieval_on_files_gives_the_figures_of_a_hand_computed_task(tmp_path):
    found = evaluate_retrieval(BagOfWords(), write_task(tmp_path / "task"), ks=(1, 2))
    # q1: d2 and d3 tie at 1 and the first comes first; q2: the document q2 is left out, so d4 comes first.
    assert found == {
        "recall_at_1": 0.75, "ndcg_at_1": 1.0, "recall_at_2": 1.0, "ndcg_at_2": 1.0, "mrr": 1.0, "queries": 2,
        "documents": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("qrels", "words"),
    [
        ("q1\td9\t1\n", "document d9 (and 0 more) is not in corpus.jsonl"),
        ("q9\td1\t1\n", "query q9 (and 0 more) is not in queries.jsonl"),
        ("q1\td1\tgood\n", "line 1: write query-id"),
        ("q1\td1\n", "line 1: write query-id"),
        ("q1\td1\tnan\n", "line 1: the grade is 'nan': give a finite number"),
        ("q1\td1\t1\nq1\td2\tinf\n", "line 2: the grade is 'inf'"),
        ("q2\tq2\t1\n", "every relevant document has its query's own id"),
        ("q1\td1\t0\n", "judges no document above 0"),
    ],
)
def test_judgements_that_fit_nothing_are_named(tmp_path, qrels, words):
    with pytest.raises(UserError) as error:
        evaluate_retrieval(BagOfWords(), write_task(tmp_path / "task", qrels))
    assert words in str(error.value)


def test_a_query_that_is_its_own_document_counts_with_what_is_left_of_its_ranking(tmp_path):
    found = evaluate_retrieval(BagOfWords(), write_task(tmp_path / "task", "q2\tq2\t1\nq2\td4\t1\n"), ks=(1, 2))
    # As in BEIR: q2 is out of the ranking and stays among the two judgements.
    assert (found["recall_at_1"], found["recall_at_2"], found["ndcg_at_1"], found["queries"]) == (0.5, 0.5, 1.0, 1)


@pytest.mark.parametrize("name", ["qrels.tsv", "corpus.jsonl", "queries.jsonl"])
def test_files_that_are_not_utf_8_are_named(tmp_path, name):
    directory = write_task(tmp_path / "task")
    (directory / name).write_bytes("{é\t1\t1\n".encode("latin1"))
    with pytest.raises(UserError, match=rf"{name}: is not UTF-8"):
        evaluate_retrieval(BagOfWords(), directory)


def test_documents_without_id_or_text_or_with_one_twice_are_named(tmp_path):
    for line, words in (
        ('{"_id": "x"}', "has no text"),
        ('{"text": "x"}', "has no _id"),
        ('{"_id": "d1", "text": "a"}', "twice"),
    ):
        directory = write_task(tmp_path / "task")
        with (directory / "corpus.jsonl").open("a") as file:
            file.write(line + "\n")
        with pytest.raises(UserError, match=words) as error:
            evaluate_retrieval(BagOfWords(), directory)
        assert "corpus.jsonl line 6" in str(error.value)
    (directory / "queries.jsonl").unlink()
    with pytest.raises(UserError, match=r"corpus|queries"):
        evaluate_retrieval(BagOfWords(), directory)


def test_sts_files_of_both_kinds_give_the_same_figure(tmp_path):
    rows = [("cat dog", "cat dog", 5), ("cat dog", "cat car", 3), ("cat", "tree", 0), ("bird", 'bird " dog', 4)]
    (tmp_path / "sts.tsv").write_text("sentence1\tsentence2\tscore\n" + "".join(f"{a}\t{b}\t{c}\n" for a, b, c in rows))
    lines = [json.dumps({"sentence1": a, "sentence2": b, "score": c}) for a, b, c in rows]
    (tmp_path / "sts.jsonl").write_text("\n".join(lines))
    found = [evaluate_sts(BagOfWords(), tmp_path / name) for name in ("sts.tsv", "sts.jsonl")]
    assert found[0] == found[1] == {"spearman": pytest.approx(1.0), "pairs": 4}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"sentence1": "a", "score": 1}, "line 1: has no column 'sentence2'"),
        ({"sentence1": "a", "sentence2": "b", "score": "high"}, "line 1: score is 'high'"),
        ({"sentence1": "a", "sentence2": "b", "score": math.nan}, "finite"),
        ({"sentence1": "a", "sentence2": "b", "score": True}, "line 1: score is True"),
        ({"sentence1": "a", "sentence2": "b", "score": 1}, "no two different scores"),
    ],
)
def test_sts_rows_that_cannot_be_used_are_named(tmp_path, row, words):
    (tmp_path / "sts.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError) as error:
        evaluate_sts(BagOfWords(), tmp_path / "sts.jsonl")
    assert words in str(error.value)
