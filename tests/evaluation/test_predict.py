"""predict: a line for each row, none lost, none twice, whatever stops it; rows that fail stop no other."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from inft.data.images import BadImage
from inft.evaluation import predict as module
from inft.evaluation.generate import Search, generate_captions
from inft.evaluation.predict import Captioning, predict, predict_rows
from inft.evaluation.records import PREDICTIONS_FILE
from inft.evaluation.rows import load_rows
from params import MUNIChusLoadConfig, UserError


@pytest.fixture(scope="module")
def rows():
    config = MUNIChusLoadConfig(data="sample", split="test", context="none", languages=("en", "ja", "ur"))
    return load_rows(config, limit=12, with_images=True).rows


@pytest.fixture
def captioning(captioner):
    return Captioning(model=captioner.model, collator=captioner.collator, max_new_tokens=16, batch_size=5)


def lines_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_each_row_has_a_line_with_the_fields_that_users_read(captioning, rows, tmp_path):
    file = tmp_path / PREDICTIONS_FILE
    predictions = predict(captioning, rows, file)
    lines = {line["row"]: line for line in lines_of(file)}
    assert list(lines) != [row.key for row in rows]  # long ones first
    assert [p.row for p in predictions] == [row.key for row in rows]
    for row, prediction in zip(rows, predictions, strict=True):
        line = lines[row.key]
        assert line["lang"] == row.sample.language
        assert line["reference_caption"] == row.references[0]
        assert line["generated_caption"] == prediction.generated_caption
        assert line["title"] == row.sample.meta["title"]


def test_captions_are_those_of_one_row_at_a_time(captioning, rows, tmp_path):
    alone = generate_captions(
        captioning.model, captioning.collator, [row.sample for row in rows], max_new_tokens=16, batch_size=1
    )
    together = predict(captioning, rows, tmp_path / "p.jsonl")
    assert [prediction.generated_caption for prediction in together] == alone
    assert len(set(alone)) > 3


def test_what_is_there_is_not_generated_again(captioning, rows, tmp_path):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    expected = predict(captioning, rows, whole)
    kept = whole.read_text(encoding="utf-8").splitlines()[:7]
    part.write_text("\n".join(kept) + "\n" + '{"row": "half a li', encoding="utf-8")
    generated = []
    found = predict(
        replace(captioning, shots=None), rows, part, on_image=lambda row, image: generated.append(row.key) or None
    )
    assert [p.generated_caption for p in found] == [p.generated_caption for p in expected]
    assert len(generated) == len(rows) - 7
    assert len(lines_of(part)) == len(rows)


def test_a_row_whose_image_cannot_be_read_has_an_empty_caption_and_the_reason(captioning, rows, tmp_path):
    broken = replace(rows[3], sample=replace(rows[3].sample, image=BadImage("image x.png is empty (0 bytes)")))
    asked = [*rows[:3], broken, *rows[4:]]
    found = predict(captioning, asked, tmp_path / "p.jsonl")
    assert found[3].generated_caption == ""
    assert found[3].error == "image x.png is empty (0 bytes)"
    assert all(prediction.error is None for prediction in [*found[:3], *found[4:]])
    assert all(prediction.generated_caption for prediction in [*found[:3], *found[4:]])


def test_a_prompt_that_does_not_fit_fails_alone(captioner, rows, tmp_path):
    instruction = "word " * 400
    long = replace(rows[1].sample, prompt=replace(rows[1].sample.prompt, instruction=instruction))
    captioner.collator.max_length = 200
    captioning = Captioning(model=captioner.model, collator=captioner.collator, max_new_tokens=6, batch_size=4)
    found = predict(captioning, [rows[0], replace(rows[1], sample=long), *rows[2:6]], tmp_path / "p.jsonl")
    assert "does not fit even without its news text" in found[1].error
    assert [p.error is None for p in found] == [True, False, True, True, True, True]


def test_a_full_gpu_halves_the_batch(captioning, rows, tmp_path, monkeypatch):
    sizes = []

    def crowded(model, collator, samples, **options):
        sizes.append(len(samples))
        if len(samples) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate_captions(model, collator, samples, **options)

    expected = predict(captioning, rows, tmp_path / "a.jsonl")
    monkeypatch.setattr(module, "generate_captions", crowded)
    found = predict(captioning, rows, tmp_path / "b.jsonl")
    assert [p.generated_caption for p in found] == [p.generated_caption for p in expected]
    assert max(sizes) == 5
    assert sizes.count(5) == 2


def test_a_gpu_that_is_full_with_one_row_is_an_error_with_its_remedy(captioning, rows, tmp_path, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "generate_captions", full)
    with pytest.raises(UserError, match=r"does not suffice for one row.*load_in_4bit"):
        predict(captioning, rows, tmp_path / "p.jsonl")


def test_a_full_disk_is_an_error_that_keeps_what_was_written(tmp_path):
    script = """
import resource, sys
from pathlib import Path
sys.path.insert(0, "tests")
import torch; torch.set_num_threads(1)
from tiny_families import tiny_family
from inft.evaluation.predict import Captioning, predict
from inft.evaluation.rows import load_rows
from params import MUNIChusLoadConfig, UserError
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
family = tiny_family("llama32")
rows = load_rows(MUNIChusLoadConfig(data="sample", split="test", context="none"), limit=12, with_images=True).rows
captioning = Captioning(model=family.model(), collator=family.collator(), max_new_tokens=8, batch_size=2)
resource.setrlimit(resource.RLIMIT_FSIZE, (1200, 1200))
try:
    predict(captioning, rows, Path(sys.argv[1]))
except UserError as error:
    print(error)
"""
    file = tmp_path / "p.jsonl"
    ended = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=True)
    assert "cannot be written: a file may not grow that large" in ended.stdout, ended.stderr
    from inft.evaluation.records import read_predictions

    whole = read_predictions(tmp_path, name="p.jsonl")
    assert 0 < len(whole) < 12


def test_no_rows_are_no_predictions(captioning, tmp_path):
    assert predict(captioning, [], tmp_path / "p.jsonl") == []
    assert list(predict_rows(captioning, [])) == []


def test_progress_is_told_from_what_is_done_to_all(captioning, rows, tmp_path):
    told = []
    predict(captioning, rows, tmp_path / "p.jsonl", on_progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 12), (5, 12), (10, 12), (12, 12)]


def test_sampling_follows_its_seed(captioning, rows):
    def captions(seed):
        search = Search(do_sample=True, temperature=3.0, top_p=1.0, seed=seed)
        sampled = replace(captioning, search=search, batch_size=12)
        return [p.generated_caption for batch in predict_rows(sampled, rows) for p in batch]

    assert captions(1) == captions(1)
    assert captions(1) != captions(2)


@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGINT]])
def test_a_killed_evaluation_goes_on_where_it_stopped(adapter_dir, tmp_path, signals):
    where = tmp_path / "metrics"
    command = [sys.executable, "-m", "inft", "evaluate", "llama32", "--adapter", str(adapter_dir), "--data", "sample"]
    command += ["--limit", "60", "--batch-size", "1", "--max-new-tokens", "24", "--output-dir", str(where)]
    file = where / PREDICTIONS_FILE
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (file.exists() and file.stat().st_size > 400) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signals[0])
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    if signals[0] == signal.SIGINT:
        assert process.returncode == 130, err
        assert "of 60 rows are done; the same command goes on" in out
    before = [line for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    assert 0 < len(before) < 60
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"captions: {len(before)} of 60 rows" in again.stdout
    assert file.read_text(encoding="utf-8").splitlines()[: len(before)] == before
    assert len({line["row"] for line in lines_of(file)}) == len(lines_of(file)) == 60
    assert (where / "scores.json").exists()
