import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file

from inft.data.batches import load_samples
from inft.models import load_spec
from inft.models.loading import load_model, load_processor
from inft.training import runtrainer
from inft.training.best import read_best
from inft.training.resume import checkpoints, damage
from inft.training.rows import RowCollator
from inft.training.run import fit
from inft.training.runlog import read_events
from inft.training.trainer import CaptionTrainer
from params import TrainParams, UserError

Make = Callable[..., TrainParams]
QUIET = Console(quiet=True)


def events(params: TrainParams, kind: str) -> list[dict[str, Any]]:
    return [
        event for event in read_events(f"{params.basic.logs_dir}/trainer_text_basic.jsonl") if event["event"] == kind
    ]


def test_the_evaluation_loss_is_per_token_over_the_whole_held_out_set_whatever_the_batch_size(
    make_params: Make, tmp_path: Path
) -> None:
    found = []
    for size in (1, 5, 13):
        params = make_params(tmp_path / str(size), sft__max_steps=2, sft__per_device_eval_batch_size=size)
        fit(params, console=QUIET)
        found.append(events(params, "eval")[0])
    assert len({event["tokens"] for event in found}) == 1
    assert [event["loss"] for event in found] == pytest.approx([found[0]["loss"]] * 3, rel=1e-6)

    spec = load_spec("text")
    loaded = load_samples(params.data, quarantine_file=None, with_images=False)
    collator = spec.collator(load_processor(spec, params.processor_name))
    base = load_model(spec, params.model_name, basic=params.basic)
    model = PeftModel.from_pretrained(base, params.best_model_dir).eval()
    sums: dict[str, list[float]] = {}
    for sample in loaded.heldout:
        batch = collator([sample])
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
        entry = sums.setdefault(sample.language, [0.0, 0])
        entry[0] += float(loss)
        entry[1] += int((labels[0, 1:] != -100).sum())
    total, tokens = (sum(entry[i] for entry in sums.values()) for i in (0, 1))
    assert found[-1]["loss"] == pytest.approx(total / tokens, rel=1e-6)
    assert found[-1]["tokens"] == tokens
    expected = {language: loss / count for language, (loss, count) in sums.items()}
    assert found[-1]["languages"] == pytest.approx(expected, rel=1e-6)


def test_accumulated_small_batches_train_as_one_large_batch(make_params: Make, tmp_path: Path) -> None:
    losses = []
    for size, accumulated in ((8, 1), (2, 4)):
        params = make_params(
            tmp_path / str(size),
            sft__per_device_train_batch_size=size,
            sft__gradient_accumulation_steps=accumulated,
            lora__dropout=0.0,
        )
        fit(params, console=QUIET)
        losses.append([event["loss"] for event in events(params, "log")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_gradient_checkpointing_changes_no_loss(make_params: Make, tmp_path: Path) -> None:
    losses = []
    for checkpointing in (False, True):
        params = make_params(tmp_path / str(checkpointing), sft__gradient_checkpointing=checkpointing)
        fit(params, console=QUIET)
        losses.append([event["loss"] for event in events(params, "log")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def poison_at(monkeypatch: pytest.MonkeyPatch, step: int, value: float) -> None:
    """Make the loss of one step ``value``."""
    compute = CaptionTrainer.compute_loss

    def compute_loss(self: CaptionTrainer, *args: Any, **options: Any) -> Any:
        loss = compute(self, *args, **options)
        return loss * value if self.model.training and self.state.global_step + 1 == step else loss

    monkeypatch.setattr(CaptionTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    make_params: Make, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    params = make_params()
    poison_at(monkeypatch, 5, value)
    with pytest.raises(UserError, match=r"step 5: the loss is (nan|inf).*last good checkpoint is .*checkpoint-3"):
        fit(params, console=QUIET)
    ((step, path),) = checkpoints(Path(params.output_dir))
    assert step == 3
    assert damage(path) is None
    found = read_best(Path(params.best_model_dir))
    assert found is not None
    assert found["step"] == 4
    (error,) = events(params, "error")
    assert "step 5" in error["message"]
    monkeypatch.undo()
    assert fit(params, resume="latest", console=QUIET).status == "finished"


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(
    make_params: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = CaptionTrainer._clip_grad_norm

    def poisoned(self: CaptionTrainer, model: torch.nn.Module) -> Any:
        if self.state.global_step == 2:
            next(p for p in model.parameters() if p.grad is not None).grad[0] = math.nan
        return clip(self, model)

    monkeypatch.setattr(CaptionTrainer, "_clip_grad_norm", poisoned)
    with pytest.raises(UserError, match="step 3: the gradient norm is nan"):
        fit(make_params(), console=QUIET)


def test_a_full_disk_while_a_checkpoint_is_saved_keeps_the_earlier_ones(
    make_params: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = make_params()
    save = runtrainer.save_adapter

    def fill_up(model: Any, directory: Path) -> None:
        if directory.name == "checkpoint-6":
            raise OSError(28, "No space left on device")
        save(model, directory)

    monkeypatch.setattr(runtrainer, "save_adapter", fill_up)
    with pytest.raises(UserError, match=r"checkpoint-6 could not be saved .*the disk is full"):
        fit(params, console=QUIET)
    ((step, path),) = checkpoints(Path(params.output_dir))
    assert step == 3
    assert damage(path) is None
    assert not list(Path(params.output_dir).glob(".*"))


def test_only_the_newest_checkpoints_are_kept_and_none_holds_a_pickle_of_the_arguments(make_params: Make) -> None:
    params = make_params(sft__save_steps=1, sft__save_total_limit=2)
    fit(params, console=QUIET)
    kept = checkpoints(Path(params.output_dir))
    assert [step for step, _ in kept] == [8, 7]
    assert not any((path / "training_args.bin").exists() for _, path in kept)


def test_nothing_is_reported_to_the_hub(make_params: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **options: pytest.fail("telemetry"))
    fit(make_params(sft__max_steps=1), console=QUIET)


def test_adapters_of_a_4_bit_model_stay_in_float32_and_its_loss_falls(make_params: Make) -> None:
    params = make_params(qlora__load_in_4bit=True, sft__max_steps=30, sft__save_steps=30, sft__eval_steps=10)
    result = fit(params, console=QUIET)
    assert events(params, "eval")[-1]["loss"] < events(params, "log")[0]["loss"] - 0.2
    weights = load_file(result.best_dir / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_rows_are_looked_up_by_number_and_held_out_batches_say_which_they_are() -> None:
    rows = RowCollator(["a", "b"], ["c"], lambda samples: {"seen": torch.tensor([ord(s) for s in samples])})  # type: ignore[list-item]
    assert rows.train_dataset()["row"][:] == [0, 1]
    assert rows([{"row": 1}, {"row": 0}]).keys() == {"seen"}
    heldout = rows.heldout_dataset()
    assert heldout is not None
    batch = rows([heldout[0]])
    assert (batch["seen"].item(), batch["rows"].item()) == (ord("c"), 2)
