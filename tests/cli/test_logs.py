import os
import threading

import pytest

from inft.cli.logtext import run_row
from inft.training.curves import points
from inft.training.logfiles import all_logs, find_log, followed_events, last_run, run_status, split_runs
from inft.training.runlog import JsonlLogger, read_events


def write_run(path, *, steps=(10, 20, 30), resumed=None, status="finished", loss=2.0, output_dir="out"):
    """A run as fit() logs it; status None leaves it without an end."""
    with JsonlLogger(path) as log:
        params = {"model_name": "", "output_dir": output_dir, "data": {"data": "sample"}}
        common = {"versions": {}, "hardware": {}, "data": {}}
        log.event("run_start", task="aya_basic", params=params, resumed_from_step=resumed, **common)
        for step in steps:
            figures = {"learning_rate": 1e-3 / step, "grad_norm": 1.5, "tokens_per_second": 100.0}
            log.event("log", step=step, epoch=step / 10, loss=loss / step, **figures)
            log.event("eval", step=step, epoch=step / 10, loss=3 / step, tokens=5, languages={"ur": 0.1}, seconds=0.2)
            log.event("best", step=step, metric="eval_loss", value=3 / step, path="out/best")
        if status is not None:
            ends = {"best_step": 30, "best_metric": 0.1, "seconds": 3.0, "peak_rss_bytes": 1, "peak_gpu_bytes": None}
            log.event("run_end", status=status, step=steps[-1], **ends)
    return path


@pytest.fixture
def logs(tmp_path):
    write_run(tmp_path / "trainer_aya_basic.jsonl")
    write_run(tmp_path / "trainer_text_basic_demo.jsonl", status=None)
    os.utime(tmp_path / "trainer_aya_basic.jsonl", (1, 1))
    return tmp_path


def test_the_newest_log_is_meant_when_none_is_named(logs):
    assert find_log(logs, None).name == "trainer_text_basic_demo.jsonl"
    assert find_log(logs, "aya_basic").name == "trainer_aya_basic.jsonl"
    assert len(all_logs(logs)) == 2


def test_tail_prints_the_last_events_a_line_each(inft, logs):
    found = inft("logs", "tail", "aya_basic", "-n", "3", "--logs-dir", str(logs))
    assert found.status == 0
    lines = found.out.splitlines()
    assert len(lines) == 3
    assert "eval" in lines[0]
    assert "loss=0.1 " in lines[0]
    assert "languages={ur: 0.1}" in lines[0]
    assert "status=finished" in lines[2]


def test_show_has_a_row_per_run_with_its_end(inft, logs):
    write_run(logs / "trainer_aya_basic.jsonl", steps=(40,), resumed=30, status="interrupted")
    found = inft("logs", "show", "--logs-dir", str(logs))
    assert found.status == 0
    assert [word in found.out for word in ("finished", "interrupted", "unfinished")] == [True] * 3
    assert "unfinished" not in inft("logs", "show", "aya_basic", "--logs-dir", str(logs)).out


def test_plot_writes_a_png_beside_the_log_or_where_told(inft, logs):
    assert inft("logs", "plot", "--logs-dir", str(logs)).status == 0
    assert (logs / "trainer_text_basic_demo.png").read_bytes().startswith(b"\x89PNG")
    target = logs / "a.png"
    assert inft("logs", "plot", "aya_basic", "-o", str(target), "--logs-dir", str(logs)).status == 0
    assert target.exists()


def panels_drawn(inft, monkeypatch, directory):
    """Title -> labels of the curves of each panel that `inft logs plot` draws."""
    found = {}

    def note(figure, *args, **kwargs):
        found.update((axis.get_title(), [line.get_label() for line in axis.get_lines()]) for axis in figure.axes)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", note)
    assert inft("logs", "plot", "--logs-dir", str(directory)).status == 0
    return found


def test_a_run_with_craft_has_panels_for_it_and_one_without_has_none(inft, monkeypatch, tmp_path):
    path = write_run(tmp_path / "trainer_x.jsonl")
    plain = list(panels_drawn(inft, monkeypatch, tmp_path))
    assert plain == ["training loss", "evaluation loss", "learning rate", "gradient norm"]
    with JsonlLogger(path) as log:
        log.event("run_start", task="x", params={}, resumed_from_step=None, versions={}, hardware={}, data={})
        for step in (1, 2):
            usual = {"learning_rate": 1e-3, "grad_norm": 1.5, "tokens_per_second": 100.0}
            craft = {"loss/craft_sft": 0.7, "loss/craft_contrast": 1 / step, "metrics/craft_contrastive_accuracy": 0.5}
            log.event("log", step=step, epoch=0.1, loss=1.0, **usual, **craft)
    found = panels_drawn(inft, monkeypatch, tmp_path)
    assert list(found)[:4] == plain
    assert found["losses of CRAFT"] == ["loss/craft_contrast", "loss/craft_sft"]
    assert len(found["metrics of CRAFT"]) == 1


def test_a_text_encoder_has_panels_of_what_it_predicts_and_finds(inft, monkeypatch, tmp_path):
    with JsonlLogger(tmp_path / "trainer_neobert.jsonl") as log:
        log.event("run_start", task="pretraining", params={}, resumed_from_step=None, versions={}, hardware={}, data={})
        usual = {"learning_rate": 1e-3, "grad_norm": 1.5, "tokens_per_second": 100.0}
        log.event("log", step=1, epoch=0.1, loss=1.0, accuracy=0.3, **usual)
        figures = {"accuracy": 0.4, "recall_at_1": 0.5, "mrr": 0.6}
        log.event("eval", step=1, epoch=0.1, loss=1.0, tokens=9, languages={}, seconds=0.1, **figures)
    found = panels_drawn(inft, monkeypatch, tmp_path)
    assert len(found["masked tokens predicted in training"]) == 1
    assert len(found["masked tokens predicted in held-out documents"]) == 1
    assert found["held-out retrieval"] == ["recall_at_1", "mrr"]


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["tail", "aya_basik"], "did you mean aya_basic?"),
        (["show", "x"], "known: aya_basic, text_basic_demo"),
        (["plot", "aya_basic", "-o", "/absent/dir/a.png"], "/absent/dir/a.png: cannot be written"),
    ],
)
def test_a_mistake_is_told_with_its_remedy(inft, logs, args, complaint):
    found = inft("logs", *args, "--logs-dir", str(logs))
    assert found.status == 2
    assert complaint in found.err


def test_a_directory_without_logs_and_a_log_without_figures_are_clear_errors(inft, tmp_path):
    assert "start a run" in inft("logs", "tail", "--logs-dir", str(tmp_path)).err
    (tmp_path / "trainer_new.jsonl").write_text("", encoding="utf-8")
    assert "no figures are logged yet" in inft("logs", "plot", "--logs-dir", str(tmp_path)).err
    assert inft("logs", "tail", "--logs-dir", str(tmp_path)).status == 0


def test_a_half_written_last_line_is_passed_over(inft, logs):
    path = logs / "trainer_text_basic_demo.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write('{"event": "log", "step": 9')
    found = inft("logs", "tail", "-n", "1", "--logs-dir", str(logs))
    assert found.status == 0
    assert "best" in found.out
    assert inft("logs", "show", "--logs-dir", str(logs)).status == 0
    assert inft("logs", "plot", "--logs-dir", str(logs)).status == 0


def test_following_yields_events_as_they_are_written_and_joins_half_lines(tmp_path):
    path = tmp_path / "trainer_x.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    stream = followed_events(path, last=1, poll_seconds=0.01)
    assert next(stream) == {"step": 2}

    def write():
        with path.open("ab") as file:
            file.write(b'ep": 3}\nbroken\n{"step": 4}\n')

    threading.Timer(0.05, write).start()
    assert [next(stream), next(stream)] == [{"step": 3}, {"step": 4}]
    path.write_bytes(b'{"step": 5}\n')  # replaced by a new run
    assert next(stream) == {"step": 5}


def test_runs_are_told_apart_and_a_resumed_run_is_joined_to_its_beginning(tmp_path):
    path = write_run(tmp_path / "trainer_x.jsonl")
    write_run(path, steps=(10, 20), status=None)
    write_run(path, steps=(5,), output_dir="elsewhere")  # in between
    write_run(path, steps=(20, 30), resumed=10, loss=4.0)
    runs = split_runs(read_events(path))
    assert [run_status(run) for run in runs] == ["finished", "unfinished", "finished", "finished"]
    steps, losses = points(last_run(read_events(path)), event="log", key="loss")
    assert steps == [10, 20, 30]
    assert losses == [0.2, 0.2, pytest.approx(4 / 30)]  # step 20 as it was run again


def test_a_loss_that_is_not_a_number_leaves_a_gap_in_the_plot(inft, tmp_path):
    write_run(tmp_path / "trainer_x.jsonl", loss=float("nan"))
    assert inft("logs", "plot", "--logs-dir", str(tmp_path)).status == 0


def test_an_error_is_the_status_of_its_run_and_ends_it():
    events = [
        {"event": "run_start", "params": {}},
        {"event": "error", "kind": "UserError", "message": "the loss is nan"},
        {"event": "error", "kind": "UserError", "message": "no rows are left"},  # of the next attempt
        {"event": "run_start", "params": {}},
    ]
    ends = ["error: UserError the loss is nan", "error: UserError no rows are left", "unfinished"]
    assert [run_status(run) for run in split_runs(events)] == ends


def test_a_failed_attempt_is_a_run_of_its_own(inft, tmp_path):
    path = write_run(tmp_path / "trainer_x.jsonl")
    with JsonlLogger(path) as log:
        log.event("error", kind="UserError", message="no rows are left")
    runs = split_runs(read_events(path))
    assert [run_status(run) for run in runs] == ["finished", "error: UserError no rows are left"]
    assert points(last_run(read_events(path)), event="log", key="loss")[0] == [10, 20, 30]
    cells = run_row("x", runs[1])
    assert cells[1:4] == ("x", "?", "?")
    assert "no rows are left" in inft("logs", "show", "--logs-dir", str(tmp_path)).out


def test_runs_that_write_one_log_at_the_same_time_are_told_apart():
    def event(run, name, **fields):
        return {"event": name, "run": run, **fields}

    events = [
        event("a", "run_start", params={"output_dir": "a"}),
        event("b", "run_start", params={"output_dir": "b"}),
        event("a", "log", step=1, loss=1.0),
        event("b", "log", step=1, loss=2.0),
        event("b", "run_end", status="finished"),
        event("a", "log", step=2, loss=0.5),
        event("a", "error", kind="UserError", message="x"),
    ]
    assert [[item["run"] for item in run] for run in split_runs(events)] == [["a"] * 4, ["b"] * 3]
    assert last_run(events) == [item for item in events if item["run"] == "b"]


def test_a_run_that_started_over_is_not_joined_to_an_earlier_one(tmp_path):
    path = write_run(tmp_path / "trainer_x.jsonl", steps=(40,))
    write_run(path, steps=(10,))
    assert points(last_run(read_events(path)), event="log", key="loss")[0] == [10]
