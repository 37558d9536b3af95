"""inft evaluate-encoder: each sub-command on tiny stored encoders and generated files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny_text_encoders import captions, tiny_stored_encoder

from inft.__main__ import main

torch.set_num_threads(1)


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """run("glue", …) -> status, stdout, stderr of inft evaluate-encoder."""

    def command(*args: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["evaluate-encoder", *map(str, args)])
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return command


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stored_encoder(tmp_path_factory.mktemp("encoder"))


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def task_files(directory: Path, columns: tuple[str, ...] = ("sentence1", "sentence2")) -> Path:
    for name in ("train", "dev"):
        rows = [{**dict.fromkeys(columns, "A red circle."), "label": number % 2} for number in range(8)]
        write_rows(directory / f"{name}.jsonl", rows)
    return directory


def test_glue_prints_a_table_and_stores_the_figures(run, encoder, tmp_path):
    task_files(tmp_path / "rte")
    output = tmp_path / "out" / "glue.json"
    found = run(
        "glue", encoder, "--task", "rte", "--data", tmp_path / "rte", "--epochs", 1, "--seeds", "0,1", "-o", output
    )
    assert found.status == 0, found.err
    assert "rte seed 1:" in found.err
    assert "accuracy 50.0 ± 0.0" in found.out
    stored = json.loads(output.read_text())
    assert stored[0]["params"]["seeds"] == [0, 1]
    assert stored[0]["model"] == str(encoder)


def test_several_tasks_lie_in_directories_of_their_names(run, encoder, tmp_path):
    task_files(tmp_path / "rte")
    task_files(tmp_path / "cola", ("sentence",))
    tasks = ("--task", "rte", "--task", "cola")
    found = run("glue", encoder, *tasks, "--data", tmp_path, "--epochs", 1, "--seeds", 0)
    assert found.status == 0, found.err
    assert "mean of the tasks" in found.out


def test_a_task_of_ones_own_is_described_by_its_columns(run, encoder, tmp_path):
    rows = [{"a": "A red circle.", "b": "A fish.", "v": number / 3} for number in range(6)]
    for name in ("train", "validation"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    how = ("--columns", "a,b", "--label", "v", "--regression", "--epochs", 1, "--seeds", 0)
    found = run("glue", encoder, "--task", "mine", "--data", tmp_path, *how)
    assert found.status == 0, found.err
    assert "mine" in found.out
    assert "spearman" in found.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "mrcp"), "Did you mean mrpc"),
        (("--task", "rte", "--label", "y"), "give --columns, too"),
        (("--regression",), "give --columns, too"),
        (("--columns", "a,b,c", "--data", "."), "one or two columns"),
        (("--columns", "a", "--task", "one", "--task", "two"), "--columns describes one task"),
        (("--columns", "a"), "--columns needs --data"),
        (("--task", "rte", "--seeds", "0,x"), "--seeds 0,x: give whole numbers"),
        (("--task", "rte", "--seeds", "1,1"), "twice"),
        (("--task", "rte", "--seeds=-1"), "--seeds -1: give numbers from 0 to 4294967295"),
        (("--task", "rte", "--seeds", "4294967296"), "give numbers from 0 to 4294967295"),
        (("--task", "rte", "--overwrite"), "name it by -o"),
    ],
)
def test_options_of_glue_that_cannot_work_are_refused_before_anything_is_loaded(run, arguments, message):
    found = run("glue", "no-such-model", *arguments)
    assert found.status == 2
    assert message in found.err


def test_pseudo_perplexity_shows_each_language(run, encoder, tmp_path):
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": text, "language": "xx"} for text in captions("test")[:4]])
    output = tmp_path / "scores.json"
    found = run("pseudo-perplexity", encoder, texts, "--language-column", "language", "--word-l2r", "-o", output)
    assert found.status == 0, found.err
    assert "xx" in found.out
    stored = json.loads(output.read_text())
    assert stored["word_l2r"] is True
    assert len(stored["documents"]) == 4


def test_pseudo_perplexity_reads_lines_of_a_text_file(run, encoder, tmp_path):
    (tmp_path / "texts.txt").write_text("A red circle.\n\nA fish.\n", encoding="utf-8")
    found = run("pseudo-perplexity", encoder, tmp_path / "texts.txt", "--limit", 1)
    assert found.status == 0, found.err
    last = next(line for line in found.out.splitlines() if "all" in line)
    assert last.split("│")[2].strip() == "1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.jsonl",), "cannot be read"),
        (("texts.doc",), "what kind of file is it?"),
        (("texts.jsonl", "--text-column", "body"), "has no column 'body'"),
        (("texts.jsonl", "--max-length", 4096), "beyond what"),
    ],
)
def test_texts_that_cannot_be_scored_are_told(run, encoder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "texts.jsonl", [{"text": "A red circle."}])
    found = run("pseudo-perplexity", encoder, *arguments)
    assert found.status == 2
    assert message in found.err


def test_retrieval_and_sts_show_their_figures(run, encoder, tmp_path):
    write_rows(tmp_path / "task" / "corpus.jsonl", [{"_id": str(i), "text": t} for i, t in enumerate(captions()[:20])])
    write_rows(tmp_path / "task" / "queries.jsonl", [{"_id": "q", "text": captions()[3]}])
    (tmp_path / "task" / "qrels.tsv").write_text("q\t3\t1\n")
    found = run("retrieval", encoder, "--data", tmp_path / "task", "--pooling", "mean", "-o", tmp_path / "r.json")
    assert found.status == 0, found.err
    stored = json.loads((tmp_path / "r.json").read_text())
    settings = {"pooling": "mean", "query_prefix": "", "document_prefix": "", "max_length": 48, "split": "test"}
    assert stored["settings"] == {**settings, "query_max_length": None, "normalize": True}
    figures = stored["figures"][str(tmp_path / "task")]
    assert figures["recall_at_1"] == 1  # the query is the document

    rows = [{"sentence1": captions()[i], "sentence2": captions()[j], "score": int(i == j)} for i, j in ((1, 1), (1, 9))]
    pairs = write_rows(tmp_path / "sts.jsonl", rows)
    found = run("sts", encoder, "--data", pairs, "--pooling", "mean", "-o", tmp_path / "s.json")
    assert found.status == 0, found.err
    assert json.loads((tmp_path / "s.json").read_text())["figures"][str(pairs)]["spearman"] == pytest.approx(1)


def test_an_unknown_pooling_is_refused(run):
    found = run("sts", "no-such-model", "--data", "x.tsv", "--pooling", "max")
    assert found.status == 2
    assert "choose one of mean" in found.err


def test_help_names_every_measure(run):
    found = run("--help")
    for name in ("glue", "pseudo-perplexity", "retrieval", "sts", "mteb"):
        assert name in found.out
    summaries = found.out.partition("Commands:\n")[2].splitlines()
    assert summaries
    assert not [line for line in summaries if line.endswith("...")]


@pytest.mark.parametrize("command", ["glue", "pseudo-perplexity", "retrieval", "sts", "mteb"])
def test_help_shows_an_example(run, command):
    assert f"Example:\n    inft evaluate-encoder {command} " in run(command, "--help").out


COMMANDS = {
    "glue": ("no-such-model", "--task", "rte"),
    "pseudo-perplexity": ("no-such-model", "texts.txt"),
    "retrieval": ("no-such-model", "--data", "task"),
    "sts": ("no-such-model", "--data", "pairs.tsv"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(run, tmp_path, command):
    (tmp_path / "there.json").write_text("{}")
    for output, words in ((tmp_path, "is a directory"), (tmp_path / "there.json", "--overwrite"),
                          (tmp_path / "there.json" / "x.json", "is a file, not a directory")):  # fmt: skip
        found = run(command, *COMMANDS[command], "-o", output)
        assert found.status == 2
        assert words in found.err
    assert "--overwrite" not in run(command, *COMMANDS[command], "-o", tmp_path / "there.json", "--overwrite").err


@pytest.mark.parametrize("command", ["retrieval", "sts"])
def test_all_data_are_read_before_the_first_are_embedded(run, tmp_path, command):
    first = write_rows(tmp_path / "a.jsonl", [{"sentence1": "a", "sentence2": "b", "score": n} for n in (1, 2)])
    if command == "retrieval":
        first = tmp_path
        write_rows(tmp_path / "corpus.jsonl", [{"_id": "d", "text": "a"}])
        write_rows(tmp_path / "queries.jsonl", [{"_id": "q", "text": "a"}])
        (tmp_path / "qrels.tsv").write_text("q\td\t1\n")
    found = run(command, "no-such-model", "--data", first, "--data", tmp_path / "missing.jsonl")
    assert found.status == 2
    assert "missing.jsonl" in found.err


def test_all_tasks_are_read_before_the_first_is_learned(run, encoder, tmp_path):
    task_files(tmp_path / "rte")
    found = run("glue", encoder, "--task", "rte", "--task", "cola", "--data", tmp_path, "--epochs", 1, "--seeds", 0)
    assert found.status == 2
    assert "seed 0" not in found.err


def test_a_runs_directory_means_its_newest_model(run, tmp_path):
    for step in (90, 100):
        tiny_stored_encoder(tmp_path / "run" / "model_checkpoints" / str(step), seed=step)
    (tmp_path / "texts.txt").write_text("A red circle.\n")
    found = run("pseudo-perplexity", tmp_path / "run", tmp_path / "texts.txt", "-o", tmp_path / "s.json")
    assert found.status == 0, found.err
    newest = str(tmp_path / "run" / "model_checkpoints" / "100")
    assert json.loads((tmp_path / "s.json").read_text())["model"] == newest
    assert "the newest of" in found.err
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert "stored no model yet" in run("pseudo-perplexity", tmp_path / "empty", tmp_path / "texts.txt").err
