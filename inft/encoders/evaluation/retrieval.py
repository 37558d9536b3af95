"""Retrieval on local files in the layout of BEIR: corpus.jsonl, queries.jsonl and qrels, graded.

The corpus is read, embedded and compared block by block, so that its texts and vectors are never held as a whole.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inft.encoders.evaluation.ranking import DEPTH, ranking_figures, top_documents
from inft.encoders.evaluation.sts import Embeds
from inft.encoders.evaluation.tables import json_rows, utf8
from params.errors import UserError

BLOCK = 16_384  # documents
KS = (1, 5, 10, 100)


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """A task: queries that are judged, and which documents answer them."""

    directory: Path
    document_ids: dict[str, int]  # id -> place in the corpus
    queries: dict[str, str]  # id -> text, judged ones alone
    grades: dict[str, dict[str, float]]  # query id -> document id -> grade


def evaluate_retrieval(
    embedder: Embeds, directory: Path, *, split: str = "test", ks: Sequence[int] = KS
) -> dict[str, float]:
    """Return recall_at_k, ndcg_at_k, mrr, queries (those that are scored) and documents of a directory with a task.

    Errors: UserError naming the file and line of what is wrong.
    """
    return score_retrieval(embedder, open_retrieval(directory, split), ks=ks)


def score_retrieval(embedder: Embeds, task: Retrieval, *, ks: Sequence[int] = KS) -> dict[str, float]:
    """Return the figures of an open task.

    A document that has the query's own id is taken out of its ranking and stays among its judgements, as in BEIR.
    """
    vectors_QD = torch.from_numpy(embedder.embed(list(task.queries.values()), prompt="query"))
    depth = max(DEPTH, *ks) + 1  # one may be the query itself
    _, places_QK = top_documents(vectors_QD, _blocks(embedder, task.directory / "corpus.jsonl"), depth)
    ranked, grades = [], []
    for name, places in zip(task.queries, places_QK.tolist(), strict=True):
        itself = task.document_ids.get(name, -1)
        ranked.append([place for place in places if place != itself])
        grades.append({task.document_ids[document]: grade for document, grade in task.grades[name].items()})
    figures = ranking_figures(ranked, grades, ks)
    return {**figures, "queries": len(task.queries), "documents": len(task.document_ids)}


def open_retrieval(directory: Path, split: str = "test") -> Retrieval:
    """Read ids, queries and judgements of qrels.tsv, or qrels/<split>.tsv; the corpus' texts stay on the disk."""
    file = directory / "qrels.tsv"
    if not file.is_file():
        file = directory / "qrels" / f"{split}.tsv"
    grades = _grades(file)
    documents: dict[str, int] = {}
    for where, values in _rows(directory / "corpus.jsonl"):
        if values["_id"] in documents:
            raise UserError(f"{where}: _id {values['_id']} is there twice: give every document its own.")
        documents[values["_id"]] = len(documents)
    texts = {values["_id"]: values["text"] for _, values in _rows(directory / "queries.jsonl")}
    judged = {query: found for query, found in grades.items() if any(grade > 0 for grade in found.values())}
    if missing := [query for query in judged if query not in texts]:
        raise UserError(f"{file}: query {missing[0]} (and {len(missing) - 1} more) is not in queries.jsonl: add it.")
    unknown = [document for found in judged.values() for document in found if document not in documents]
    if unknown:
        raise UserError(f"{file}: document {unknown[0]} (and {len(unknown) - 1} more) is not in corpus.jsonl: add it.")
    if not judged:
        raise UserError(f"{file} judges no document above 0: there is nothing to find.")
    if all(relevant == {query} for query, relevant in _relevant(judged)):
        raise UserError(
            f"{file}: every relevant document has its query's own id, and such a document is left out of the ranking, "
            "as in BEIR: give queries and documents ids of their own."
        )
    queries = {query: texts[query] for query in judged}
    return Retrieval(directory=directory, document_ids=documents, queries=queries, grades=judged)


def _relevant(grades: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, set[str]]]:
    for query, judged in grades.items():
        yield query, {document for document, grade in judged.items() if grade > 0}


def _blocks(embedder: Embeds, corpus: Path) -> Iterator[Tensor]:
    texts = (_text(values) for _, values in _rows(corpus))
    while block := list(islice(texts, BLOCK)):
        yield torch.from_numpy(np.ascontiguousarray(embedder.embed(block, prompt="document")))


def _text(values: dict[str, Any]) -> str:
    """Title and text with a blank between, as BEIR joins them."""
    return f"{values.get('title') or ''} {values['text']}".strip() or " "


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each line, which has _id and text."""
    if not file.is_file():
        raise UserError(f"{file} is missing: a retrieval task has corpus.jsonl, queries.jsonl and qrels.tsv.")
    with utf8(file):
        for row in json_rows(file):
            if not isinstance(row.values.get("text"), str):
                raise UserError(f"{row.where} has no text: write an object with _id and text.")
            if not isinstance(row.values.get("_id"), str | int):
                raise UserError(f"{row.where} has no _id: write an object with _id and text.")
            yield row.where, {**row.values, "_id": str(row.values["_id"])}


def _grades(file: Path) -> dict[str, dict[str, float]]:
    """Grades by query and document; columns query-id, corpus-id, score, with a header line or without."""
    if not file.is_file():
        raise UserError(f"{file} is missing: write query-id, corpus-id and score by tabs, a judgement a line.")
    found: dict[str, dict[str, float]] = {}
    with utf8(file):
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.split("\t")[0] == "query-id"):
            continue
        try:
            query, document, text = line.split("\t")
            grade = float(text)
        except ValueError as error:
            raise UserError(f"{file} line {number}: write query-id, corpus-id and a number, by tabs.") from error
        if not math.isfinite(grade):
            raise UserError(f"{file} line {number}: the grade is {text!r}: give a finite number.")
        found.setdefault(query, {})[document] = grade
    return found
