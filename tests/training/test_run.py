import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

from inft.sample import Prompt, Sample
from inft.training.plan import count_steps, log_file
from inft.training.prepare import guard_batches
from inft.training.resume import checkpoints
from inft.training.run import fit
from inft.training.runlog import COMMON, EVENTS, read_events
from inft.training.trainer import CaptionTrainer
from params import TrainParams, UserError
from params.resolve import load_params, resolve_train

Make = Callable[..., TrainParams]
QUIET = Console(quiet=True)


def printed() -> Console:
    return Console(file=io.StringIO(), width=200)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_runs_log_has_the_events_and_keys_of_the_schema_in_order(make_params: Make) -> None:
    params = make_params()
    result = fit(params, console=QUIET)
    found = list(read_events(result.log_file))
    for event in found:
        assert event.keys() >= COMMON | EVENTS[event["event"]], event
    kinds = [event["event"] for event in found]
    assert set(kinds) == set(EVENTS) - {"error"}
    assert (kinds[0], kinds[1], kinds[-1]) == ("run_start", "guard", "run_end")
    assert found[0]["params"]["sft"]["lr"] == params.sft.lr
    assert found[0]["versions"].keys() >= {"torch", "transformers", "trl", "peft"}
    assert len(found[0]["data"]["fingerprint"]) == 64
    assert found[-1]["status"] == "finished"
    assert found[-1]["peak_rss_bytes"] > 10**8
    steps = [event["step"] for event in found if event["event"] == "log"]
    assert steps == list(range(1, 9))


def test_no_secret_of_the_environment_reaches_the_log(make_params: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "sesame-4711")
    assert "sesame-4711" not in fit(make_params(sft__max_steps=1), console=QUIET).log_file.read_text()


def test_the_parameters_are_saved_beside_the_run_and_read_back_equal(make_params: Make) -> None:
    params = make_params(sft__max_steps=1)
    fit(params, console=QUIET)
    assert load_params(Path(params.output_dir) / "params.yaml") == params


def test_a_dry_run_shows_the_plan_runs_the_guards_and_writes_nothing(make_params: Make, tmp_path: Path) -> None:
    console = printed()
    result = fit(make_params(), dry_run=True, console=console)
    assert result.status == "dry_run"
    assert list(tmp_path.iterdir()) == []
    text = text_of(console)
    for words in (
        "8 rows a step (4 × 2 accumulated)",
        "8 in all, 5 an epoch, 1 of warm-up",
        "self-attention",
        "supervised",
        "every adapter gets a gradient: 14 of 14",
        "lr: 0.01",
        str(tmp_path / "run"),
        "no CUDA device: training on the CPU, in float32",
    ):
        assert words in text, words


def test_a_dry_run_of_a_finished_run_leaves_it_alone(make_params: Make, tmp_path: Path) -> None:
    params = make_params(sft__max_steps=2)
    fit(params, console=QUIET)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    fit(params, dry_run=True, console=QUIET)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


class SignalAt(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, times: int) -> None:
        self.step, self.times = step, times

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def arrange(step: int, times: int) -> None:
        begin = CaptionTrainer.__init__

        def init(self: Any, **options: Any) -> None:
            begin(self, **{**options, "callbacks": [*options["callbacks"], SignalAt(step, times)]})

        monkeypatch.setattr(CaptionTrainer, "__init__", init)

    return arrange


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(
    make_params: Make, signal_at: Callable[[int, int], None]
) -> None:
    params = make_params()
    signal_at(5, 1)
    handler = signal.getsignal(signal.SIGINT)
    console = printed()
    result = fit(params, console=console)
    assert (result.status, result.global_step) == ("interrupted", 5)
    assert [step for step, _ in checkpoints(Path(params.output_dir))] == [5, 3]
    assert f"inft train text --config {params.output_dir}/params.yaml --resume" in text_of(console)
    assert list(read_events(result.log_file))[-1]["status"] == "interrupted"
    assert signal.getsignal(signal.SIGINT) == handler


def test_the_resume_command_stands_for_the_same_parameters(tmp_path: Path) -> None:
    params = resolve_train(
        "text",
        training_mode="advanced",
        demo=True,
        flags={"max_steps": 1, "output_dir": str(tmp_path / "run"), "max_rows_per_lang": 8},
        overrides=[f"basic.logs_dir={tmp_path}/logs"],
    )
    fit(params, console=QUIET)
    again = resolve_train("text", config_file=tmp_path / "run" / "params.yaml")
    assert again == params
    assert fit(again, resume="latest", console=QUIET).status == "finished"


def test_a_second_ctrl_c_aborts_at_once(make_params: Make, signal_at: Callable[[int, int], None]) -> None:
    params = make_params()
    signal_at(5, 2)
    with pytest.raises(KeyboardInterrupt):
        fit(params, console=QUIET)
    assert [step for step, _ in checkpoints(Path(params.output_dir))] == [3]
    events = list(read_events(f"{params.basic.logs_dir}/trainer_text_basic.jsonl"))
    assert (events[-1]["event"], events[-1]["kind"]) == ("error", "KeyboardInterrupt")


@pytest.mark.parametrize(
    ("rows", "batch", "accumulated", "epochs", "steps", "expected"),
    [
        (40, 4, 2, 1.0, None, (5, 5)),
        (41, 4, 2, 2.0, None, (6, 12)),
        (3, 4, 16, 1.5, None, (1, 2)),
        (40, 4, 2, 1, 7, (5, 7)),
    ],
)
def test_steps_are_counted_as_the_training_loop_makes_them(
    make_params: Make,
    rows: int,
    batch: int,
    accumulated: int,
    epochs: float,
    steps: int | None,
    expected: tuple[int, int],
) -> None:
    params = make_params(
        sft__per_device_train_batch_size=batch,
        sft__gradient_accumulation_steps=accumulated,
        sft__num_epochs=epochs,
        sft__max_steps=steps,
    )
    counted = count_steps(params, rows)
    assert (counted.per_epoch, counted.total) == expected


def test_epochs_run_as_many_steps_as_the_plan_says(make_params: Make) -> None:
    params = make_params(sft__max_steps=None, sft__num_epochs=1.5)
    assert fit(params, console=QUIET).global_step == count_steps(params, 40).total == 8


def test_rows_above_max_length_are_dropped_and_counted_when_asked(make_params: Make) -> None:
    console = printed()
    fit(make_params(sft__over_length="drop", basic__max_length=70), dry_run=True, console=console)
    whole = printed()
    fit(make_params(), dry_run=True, console=whole)
    assert "longer than 70 tokens" in text_of(console)
    assert "longer than" not in text_of(whole)
    with pytest.raises(UserError, match="no row is left"):
        fit(make_params(sft__over_length="drop", basic__max_length=32), dry_run=True, console=QUIET)


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_loaded(
    make_params: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        fit(make_params(sft__report_to=("wandb",)), console=QUIET)


def test_an_output_directory_that_cannot_be_made_is_an_error_before_anything_is_loaded(
    make_params: Make, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to: Not a directory.*--output-dir"):
        fit(make_params(tmp_path / "file"), console=QUIET)


def test_a_full_gpu_is_an_error_that_says_what_takes_less(make_params: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("inft.training.run.run_guards", full)
    params = make_params()
    with pytest.raises(UserError, match=r"memory is full\. Lower sft\.per_device_train_batch_size .*2\.00 GiB"):
        fit(params, console=Console(quiet=True))
    last = list(read_events(log_file(params)))[-1]
    assert (last["event"], last["kind"]) == ("error", "UserError")


def test_the_guards_look_at_the_longest_rows_and_at_rows_with_and_without_an_image() -> None:
    def row(text: str, image: object) -> Sample:
        return Sample(image=image, prompt=Prompt(instruction="x", news=text), answer="y", language="en")  # type: ignore[arg-type]

    rows = [row("a", None), row("b", None), row("c" * 99, None), row("d", "picture"), row("e", "picture")]
    looked = [[rows.index(sample) for sample in batch] for batch, _ in guard_batches(rows, 1, lambda batch: None)]
    assert looked == [[2], [0], [3]]


@pytest.mark.parametrize("over_length", ["shorten", "error"])
def test_a_row_that_can_never_fit_is_an_error_before_the_first_step(
    make_params: Make, tmp_path: Path, over_length: str
) -> None:
    rows = [{"title": f"t{i}", "content": "abc", "caption": "x" * (400 if i == 7 else 5)} for i in range(20)]
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = make_params(data__data=str(data), data__languages=("en",), sft__over_length=over_length)
    with pytest.raises(UserError, match=r"1 row \(.*long\.jsonl line 8\) would have more than basic\.max_length=256"):
        fit(params, console=QUIET)
    assert not checkpoints(Path(params.output_dir))


def test_sigterm_before_training_ends_like_ctrl_c_and_is_logged(
    make_params: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inft.training.run.read_inputs", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
    params = make_params()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        fit(params, console=QUIET)
    assert signal.getsignal(signal.SIGTERM) is before
    assert [event["kind"] for event in read_events(log_file(params))] == ["KeyboardInterrupt"]


def test_a_finished_run_whose_best_adapter_is_gone_does_not_claim_one(make_params: Make) -> None:
    params = make_params()
    best = fit(params, console=QUIET).best_dir
    shutil.rmtree(best)
    with pytest.raises(UserError, match=r"of step \d+, is no longer in .*best"):
        fit(params, resume="latest", console=QUIET)


def test_a_damaged_best_json_is_an_error_that_names_it(make_params: Make) -> None:
    params = make_params()
    best = fit(params, console=QUIET).best_dir
    (best / "best.json").write_text("{")
    with pytest.raises(UserError, match=r"best\.json is damaged"):
        fit(params, resume="latest", console=QUIET)


def test_a_best_directory_that_is_a_link_is_filled_where_it_points(make_params: Make, tmp_path: Path) -> None:
    params = make_params()
    (tmp_path / "large disk").mkdir()
    Path(params.output_dir).mkdir()
    Path(params.best_model_dir).symlink_to(tmp_path / "large disk")
    fit(params, overwrite=True, console=QUIET)
    fit(params, overwrite=True, console=QUIET)
    assert Path(params.best_model_dir).is_symlink()
    assert (tmp_path / "large disk" / "best.json").is_file()
    assert not list(tmp_path.glob(".inft*"))


@pytest.mark.parametrize("over_length", ["shorten", "drop"])
def test_rows_that_are_too_long_under_a_long_template_are_found_before_the_first_step(
    make_params: Make, tmp_path: Path, tiny_text_dir: Path, over_length: str
) -> None:
    model = tmp_path / "wordy"
    shutil.copytree(tiny_text_dir, model)
    wordy = "You are careful. " * 12  # 204 tokens of a byte tokenizer
    file = next(file for file in (model / "chat_template.jinja",) if file.is_file())
    file.write_text(wordy + file.read_text())
    rows = [{"title": f"t{i}", "content": "abc", "caption": "x" * (180 if i == 7 else 5)} for i in range(20)]
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = make_params(
        model_name=str(model),
        processor_name=str(model),
        data__data=str(data),
        data__languages=("en",),
        basic__max_length=400,
        sft__over_length=over_length,
    )
    if over_length == "shorten":
        with pytest.raises(UserError, match=r"1 row \(.*line 8\) would have more than basic\.max_length=400"):
            fit(params, console=QUIET)
    else:
        assert fit(params, console=QUIET).status == "finished"
