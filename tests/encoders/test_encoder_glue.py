"""Fine-tuning in GLUE's format on generated rows with tiny encoders."""

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from tiny_text_encoders import tiny_stored_encoder
from transformers import BertConfig, BertModel, EvalPrediction, TrainerControl, TrainerState, TrainingArguments

from inft.encoders.evaluation.glue import (
    SCORE,
    BestEpoch,
    GlueParams,
    glue_table,
    run_glue,
    save_results,
    scores,
    summary,
)
from inft.encoders.evaluation.glue_data import TASKS, local_task, named_task, own_task, read_task
from inft.encoders.stored import load_classifier, load_masked_lm, load_tokenizer
from params.errors import UserError

torch.set_num_threads(1)
FAST = GlueParams(seeds=(0, 1), epochs=4, patience=4, lr=3e-3, batch_size=16)
COLOURS = ("red", "green", "blue")
Row = dict[str, Any]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_stored_encoder(tmp_path_factory.mktemp("encoder")))


def rows(count: int, *, seed: int, regression: bool = False) -> list[Row]:
    """The second sentence tells the label; the first one does not."""
    rng, found = Random(seed), []
    for _ in range(count):
        label = rng.randrange(2)
        other = "A small star at the top." if label else "A large fish at the bottom."
        value: float | int = label * 4.0 + rng.random() / 10 if regression else label
        found.append({"sentence1": f"A {rng.choice(COLOURS)} circle.", "sentence2": other, "label": value})
    return found


def write(path: Path, table: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        lines = [json.dumps(row) for row in table]
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [mark.join(map(str, values)) for values in ([*table[0]], *(row.values() for row in table))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def task_directory(path: Path, *, suffix: str = ".jsonl", train: int = 64, **how: Any) -> Path:
    write(path / f"train{suffix}", rows(train, seed=1, **how))
    write(path / f"validation{suffix}", rows(24, seed=2, **how))
    return path


def test_a_learnable_task_is_learned_by_every_seed(encoder: str, tmp_path: Path):
    told: list[str] = []
    data = read_task(named_task("mrpc"), task_directory(tmp_path / "mrpc"))
    result = run_glue(encoder, data, FAST, say=told.append)
    assert result.mean["validation"]["accuracy"] == 1
    assert set(result.mean["validation"]) == {"accuracy", "f1", SCORE}
    assert result.sd["validation"][SCORE] == 0
    assert [one.seed for one in result.seeds] == [0, 1]
    assert result.rows == {"train": 64, "validation": 24}
    assert len(told) == 2
    save_results(tmp_path / "out" / "glue.json", [result])
    stored = json.loads((tmp_path / "out" / "glue.json").read_text())
    assert stored[0]["mean"] == result.mean
    assert glue_table([result]).row_count == 1


def test_regression_is_scored_by_correlations(encoder: str, tmp_path: Path):
    data = read_task(named_task("stsb"), task_directory(tmp_path, regression=True))
    figures = run_glue(encoder, data, GlueParams(seeds=(0,), epochs=6, patience=6, lr=3e-3, batch_size=16))
    assert figures.mean["validation"]["pearson"] > 0.9
    assert figures.sd["validation"][SCORE] is None


def test_equal_seeds_give_equal_figures_and_leave_the_stored_encoder_alone(encoder: str, tmp_path: Path):
    before = (Path(encoder) / "model.safetensors").read_bytes()
    data = read_task(named_task("rte"), task_directory(tmp_path, train=16))
    params = GlueParams(seeds=(3,), epochs=2, lr=1e-3, batch_size=8)
    assert run_glue(encoder, data, params) == run_glue(encoder, data, params)
    assert (Path(encoder) / "model.safetensors").read_bytes() == before


def test_encoders_without_a_head_and_of_other_architectures_are_fine_tuned_too(encoder: str, tmp_path: Path):
    tokenizer = load_tokenizer(encoder)
    headless, bert = tmp_path / "headless", tmp_path / "bert"
    load_masked_lm(encoder).model.save_pretrained(headless)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(bert)
    data = read_task(named_task("rte"), task_directory(tmp_path / "rte", train=16))
    for place in (headless, bert):
        tokenizer.save_pretrained(place)
        assert run_glue(str(place), data, GlueParams(seeds=(0,), epochs=1)).rows["train"] == 16


def test_the_classifier_begins_with_the_stored_weights_under_a_head_of_the_seed(encoder: str):
    stored = load_masked_lm(encoder).model.state_dict()
    torch.manual_seed(0)
    one = load_classifier(encoder, num_labels=3, regression=False)
    torch.manual_seed(1)
    other = load_classifier(encoder, num_labels=3, regression=False)
    assert all(torch.equal(weight, one.model.state_dict()[name]) for name, weight in stored.items())
    assert one.classifier.weight.shape == (3, 32)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


def test_mnli_is_scored_on_both_of_its_validation_splits(encoder: str, tmp_path: Path):
    names = ("entailment", "neutral", "contradiction")
    table = [{"premise": f"A {names[i % 3]}.", "hypothesis": "A star.", "label": names[i % 3]} for i in range(24)]
    for name in ("train", "dev_matched", "dev_mismatched"):  # as GLUE's own files are called
        write(tmp_path / f"{name}.tsv", table)
    data = read_task(named_task("mnli"), tmp_path)
    assert data.classes == names
    result = run_glue(encoder, data, GlueParams(seeds=(0,), epochs=1, batch_size=8))
    assert list(result.mean) == ["validation_matched", "validation_mismatched"]
    assert glue_table([result]).row_count == 2


def test_rows_that_are_cut_are_counted(encoder: str, tmp_path: Path):
    table = rows(8, seed=0)
    table[0]["sentence1"] = "A red circle. " * 30
    write(tmp_path / "train.jsonl", table)
    write(tmp_path / "validation.jsonl", rows(8, seed=2))
    data = read_task(named_task("wnli"), tmp_path)
    assert run_glue(encoder, data, GlueParams(seeds=(0,), epochs=1)).cut == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str):
    found = read_task(named_task("mrpc"), task_directory(tmp_path, suffix=suffix))
    assert [example.label for example in found.train] == [row["label"] for row in rows(64, seed=1)]
    assert found.train[0].texts == tuple(rows(1, seed=1)[0][name] for name in ("sentence1", "sentence2"))


def test_columns_of_ones_own_make_a_task(encoder: str, tmp_path: Path):
    table = [{"text": f"A {COLOURS[i % 3]} circle.", "colour": COLOURS[i % 3]} for i in range(30)]
    for name in ("train", "validation"):
        write(tmp_path / f"{name}.csv", table)
    data = read_task(own_task("colours", ("text",), "colour", regression=False), tmp_path)
    assert data.classes == ("blue", "green", "red")
    result = run_glue(encoder, data, GlueParams(seeds=(0,), epochs=6, lr=3e-3, batch_size=8))
    assert result.mean["validation"]["macro_f1"] == 1


def test_whole_numbers_are_ordered_by_size(tmp_path: Path):
    table = [{"text": "A.", "label": label} for label in (10, 9, 2, 10)]
    for name in ("train", "validation"):
        write(tmp_path / f"{name}.jsonl", table)
    assert read_task(own_task("t", ("text",), "label", regression=False), tmp_path).classes == ("2", "9", "10")


def test_of_mnlis_validation_splits_the_one_that_is_there_will_do(tmp_path: Path):
    write(tmp_path / "validation_matched.jsonl", rows(4, seed=0))
    assert local_task(TASKS["mnli"], tmp_path).validation == ("validation_matched",)
    assert local_task(TASKS["mnli"], tmp_path / "empty").validation == TASKS["mnli"].validation


BAD = [
    ({"sentence1": "A.", "sentence2": "B."}, r"validation\.jsonl line 25: has no column 'label'"),
    ({"sentence1": "A.", "sentence2": "B.", "label": None}, "line 25: has no label"),
    ({"sentence1": "A.", "sentence2": "B.", "label": -1}, "line 25: has no label"),
    (
        {"sentence1": "A.", "sentence2": "B.", "label": 7},
        "line 25: label is '7'. The classes of mrpc are not_equivalent, equ",
    ),
    ({"sentence1": "A.", "sentence2": " ", "label": 1}, "line 25: the column 'sentence2' has no text"),
    ({"sentence1": "A.", "sentence2": 3, "label": 1}, "line 25: the column 'sentence2' has no text"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_named(tmp_path: Path, row: Row, message: str):
    task_directory(tmp_path)
    write(tmp_path / "validation.jsonl", [*rows(24, seed=2), row])
    with pytest.raises(UserError, match=message):
        read_task(named_task("mrpc"), tmp_path)


def test_one_class_is_refused(tmp_path: Path):
    for name in ("train", "validation"):
        write(tmp_path / f"{name}.jsonl", [row | {"label": 1} for row in rows(4, seed=0)])
    with pytest.raises(UserError, match="all 4 rows that are trained on have the label '1'"):
        read_task(named_task("mrpc"), tmp_path)
    with pytest.raises(UserError, match=r"all 4 rows that are trained on have the value 1\.0"):
        read_task(named_task("stsb"), tmp_path)


@pytest.mark.parametrize("form", ["names", "numbers"])
def test_a_task_of_glue_numbers_its_classes_as_glue_does(tmp_path: Path, form: str):
    for task in TASKS.values():
        if task.regression:
            continue
        labels = task.classes if form == "names" else range(len(task.classes))
        texts = dict.fromkeys(task.columns, "A.")
        for name in ("train", *task.validation):
            write(tmp_path / task.name / f"{name}.jsonl", [{**texts, "label": label} for label in labels])
        found = read_task(task, tmp_path / task.name)
        assert [example.label for example in found.train] == list(range(len(task.classes))), task.name
        assert found.classes == task.classes


def test_f1_is_of_the_equivalent_pairs_whatever_their_labels_are_called(tmp_path: Path):
    for name in ("train", "validation"):
        words = ["equivalent", "equivalent", "equivalent", "not_equivalent"]
        write(tmp_path / f"{name}.jsonl", [{"sentence1": "A.", "sentence2": "B.", "label": word} for word in words])
    data = read_task(named_task("mrpc"), tmp_path)
    labels = [example.label for example in data.train]
    all_equivalent = EvalPrediction(predictions=np.tile([0.0, 1.0], (4, 1)), label_ids=np.array(labels))
    assert scores(data, all_equivalent)["f1"] == pytest.approx(6 / 7)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("same", "other"), "label is 'same'. The classes of mrpc are not_equivalent, equivalent, or 0, 1"),
        ((1, 2), "label is '2'. The classes of mrpc"),
        (("0", "1", "2"), "label is '2'. The classes of mrpc"),
    ],
)
def test_other_labels_of_a_task_of_glue_are_refused_with_its_classes(tmp_path: Path, labels, message: str):
    for name in ("train", "validation"):
        table = [{"sentence1": "A.", "sentence2": "B.", "label": label} for label in labels]
        write(tmp_path / f"{name}.jsonl", table)
    with pytest.raises(UserError, match=message):
        read_task(named_task("mrpc"), tmp_path)


def test_a_task_of_glue_that_lacks_a_class_is_refused(tmp_path: Path):
    table = [{"premise": "A.", "hypothesis": "B.", "label": label} for label in ("entailment", "contradiction")]
    for name in ("train", "validation_matched", "validation_mismatched"):
        write(tmp_path / f"{name}.jsonl", table)
    with pytest.raises(UserError, match="have 2 of its 3 classes"):
        read_task(named_task("mnli"), tmp_path)


def test_values_in_a_classification_are_told(tmp_path: Path):
    with pytest.raises(UserError, match="add --regression"):
        read_task(named_task("mrpc"), task_directory(tmp_path, regression=True))


@pytest.mark.parametrize("value", ["high", "nan", "inf"])
def test_what_is_no_number_is_refused_in_a_regression(tmp_path: Path, value: str):
    task_directory(tmp_path, regression=True)
    write(tmp_path / "train.jsonl", [*rows(8, seed=1, regression=True), rows(1, seed=1)[0] | {"label": value}])
    with pytest.raises(UserError, match=f"line 9: label is '{value}', not a number"):
        read_task(named_task("stsb"), tmp_path)


def test_a_missing_file_is_told_with_what_is_there(tmp_path: Path):
    write(tmp_path / "train.jsonl", rows(4, seed=0))
    with pytest.raises(UserError, match=r"validation\.jsonl or .*found: train\.jsonl"):
        read_task(named_task("mrpc"), tmp_path)


def test_an_unknown_task_is_told_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean mrpc"):
        named_task("mrcp")


def test_a_directory_without_a_model_is_refused(tmp_path: Path):
    data = read_task(named_task("mrpc"), task_directory(tmp_path / "task"))
    with pytest.raises(UserError, match=r"nothing.*tokenizer cannot be loaded"):
        run_glue(str(tmp_path / "nothing"), data, FAST)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "neobert"}')
    with pytest.raises(UserError, match=r"neither it nor .*bare/tokenizer holds tokenizer\.json or"):
        load_tokenizer(str(tmp_path / "bare"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{broken\n', "line 2: is not JSON"),
        ("[1, 2]\n", "line 1: is a JSON list"),
        ("", "has no rows"),
    ],
)
def test_a_broken_file_is_told(tmp_path: Path, content: str, message: str):
    task_directory(tmp_path)
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_task(own_task("t", ("a",), "a", regression=False), tmp_path)


def test_a_row_with_too_many_cells_is_told(tmp_path: Path):
    (tmp_path / "train.tsv").write_text("a\tb\n1\t2\n1\t2\t3\n")
    with pytest.raises(UserError, match="line 3: has more than the 2 columns"):
        read_task(own_task("t", ("a",), "b", regression=False), tmp_path)


def test_a_quotation_mark_is_a_letter_in_a_tsv_file(tmp_path: Path):
    for name in ("train", "validation"):
        (tmp_path / f"{name}.tsv").write_text('a\tb\n"Oh\t1\nNo"\t2\n')
    found = read_task(own_task("t", ("a",), "b", regression=False), tmp_path)
    assert [example.texts[0] for example in found.train] == ['"Oh', 'No"']


def test_the_best_epoch_is_the_first_of_the_highest_score_and_patience_counts_from_it():
    best = BestEpoch(("validation",), patience=2)
    control = TrainerControl()
    for epoch, score in enumerate((0.5, 0.8, 0.8, 0.7), start=1):
        assert not control.should_training_stop
        metrics = {"eval_validation_loss": 1.0, "eval_validation_accuracy": score, f"eval_validation_{SCORE}": score}
        best.on_evaluate(TrainingArguments(), TrainerState(epoch=float(epoch)), control, metrics=metrics)
    assert best.epoch == 2
    assert control.should_training_stop


def test_the_deviation_is_that_of_a_sample():
    mean, sd = summary([{"validation": {SCORE: 0.5}}, {"validation": {SCORE: 0.7}}])
    assert mean["validation"][SCORE] == pytest.approx(0.6)
    assert sd["validation"][SCORE] == pytest.approx(0.02**0.5)
