import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console

from inft.models import load_spec
from inft.models.loading import load_model, load_processor
from inft.sample import Sample
from inft.training import best
from inft.training.best import BEST_FILE, BestKeeper, config_sha256, read_best
from inft.training.run import fit
from inft.training.storage import file_sha256
from params import BasicParams, TrainParams, UserError
from params.resolve import resolve_train

Make = Callable[..., TrainParams]
Probe = Callable[[torch.nn.Module], torch.Tensor]
QUIET = Console(quiet=True)


@pytest.fixture
def probe(make_sample: Callable[..., Sample]) -> Callable[[torch.nn.Module], torch.Tensor]:
    """Logits of a model on a fixed text; on a fixed image too when it takes images."""

    def logits(model: torch.nn.Module) -> torch.Tensor:
        model.eval()
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        spec = load_spec({"mllama": "llama32", "aya_vision": "aya"}.get(base.config.model_type, "text"))
        batch: dict[str, Any] = {"input_ids": torch.arange(4, 20)[None], "attention_mask": torch.ones(1, 16)}
        if spec.takes_images:
            batch = spec.collator(load_processor(spec, ""))([make_sample()])
            del batch["labels"]
        with torch.no_grad():
            found: torch.Tensor = model(**batch, use_cache=False).logits
        return found

    return logits


@pytest.fixture
def remembered(
    monkeypatch: pytest.MonkeyPatch, probe: Callable[[torch.nn.Module], torch.Tensor]
) -> dict[int | None, torch.Tensor]:
    """step -> logits of the model in training at the moment when that step's adapter was stored."""
    found: dict[int | None, torch.Tensor] = {}
    store = BestKeeper._store

    def remember(self: BestKeeper, step: int, *rest: Any) -> None:
        found[step] = probe(self.model)
        store(self, step, *rest)

    monkeypatch.setattr(BestKeeper, "_store", remember)
    return found


@pytest.mark.parametrize("name", ["llama32", "aya", "text"])
def test_the_stored_adapter_on_the_base_model_gives_the_logits_of_its_step_to_the_bit(
    name: str, tmp_path: Path, probe: Probe, remembered: dict[int | None, torch.Tensor]
) -> None:
    params = resolve_train(
        name,
        training_mode="advanced",
        demo=True,
        flags={"max_steps": 4, "output_dir": str(tmp_path / "run"), "max_rows_per_lang": 12},
        overrides=[
            f"basic.logs_dir={tmp_path}/logs",
            "sft.eval_steps=2",
            "sft.per_device_train_batch_size=4",
            "data.languages=en,ur",
        ],
    )
    result = fit(params, console=QUIET)
    base = load_model(load_spec(name), "", basic=params.basic)
    untuned = probe(base)
    loaded = probe(PeftModel.from_pretrained(base, str(result.best_dir)))
    torch.testing.assert_close(loaded, remembered[result.best_step], atol=0, rtol=0)
    assert not torch.allclose(loaded, untuned, atol=1e-3)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"use_rslora": True, "init": "pissa"}, {"init": "pissa"}])
def test_dora_and_pissa_adapters_load_on_the_untouched_base(
    make_params: Make, probe: Probe, remembered: dict[int | None, torch.Tensor], change: dict[str, Any]
) -> None:
    params = make_params(sft__max_steps=4, **{f"lora__{key}": value for key, value in change.items()})
    result = fit(params, console=QUIET)
    base = load_model(load_spec("text"), params.model_name, basic=params.basic)
    loaded = PeftModel.from_pretrained(base, str(result.best_dir))
    torch.testing.assert_close(probe(loaded), remembered[result.best_step], atol=2e-5, rtol=1e-4)


def test_best_json_names_base_parameters_step_and_the_checksum_of_every_file(make_params: Make) -> None:
    params = make_params()
    result = fit(params, console=QUIET)
    found = read_best(result.best_dir)
    assert found is not None
    assert (found["step"], found["value"], found["metric"]) == (result.best_step, result.best_metric, "eval_loss")
    assert found["base_model"] == params.model_name
    assert found["params"]["sft"]["lr"] == params.sft.lr
    files = {path.name for path in result.best_dir.iterdir()} - {BEST_FILE}
    assert files == set(found["files"])
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files
    assert all(file_sha256(result.best_dir / name) == digest for name, digest in found["files"].items())


@pytest.mark.parametrize("name", ["llama32", "aya", "text"])
def test_the_fingerprint_of_a_base_model_is_that_of_its_architecture(name: str) -> None:
    def loaded(dtype: str) -> Any:
        return load_model(load_spec(name), "", basic=BasicParams(dtype=dtype)).config

    fingerprint = config_sha256(loaded("float32"))
    assert config_sha256(loaded("bfloat16")) == fingerprint
    other = loaded("float32")
    other.get_text_config().num_attention_heads *= 2
    assert config_sha256(other) != fingerprint


def test_the_lowest_evaluation_loss_is_stored_not_the_last(make_params: Make) -> None:
    result = fit(make_params(sft__lr=0.3, sft__lr_scheduler_type="constant", sft__max_steps=12), console=QUIET)
    events = [json.loads(line) for line in result.log_file.read_text().splitlines()]
    losses = {event["step"]: event["loss"] for event in events if event["event"] == "eval"}
    assert result.best_step == min(losses, key=lambda step: losses[step])
    assert result.best_step < 12
    assert result.best_metric == losses[result.best_step]


def test_without_held_out_rows_the_last_step_is_stored_and_says_so(make_params: Make, captions_dir: Path) -> None:
    params = make_params(data__data=str(captions_dir / "train.jsonl"), data__eval_fraction=0.0)
    found = read_best(fit(params, console=QUIET).best_dir)
    assert found is not None
    assert (found["step"], found["metric"], found["value"]) == (8, None, None)
    assert "no held-out rows" in found["why"]


def test_with_load_best_model_at_end_off_the_last_step_is_stored(make_params: Make) -> None:
    found = read_best(fit(make_params(sft__load_best_model_at_end=False), console=QUIET).best_dir)
    assert found is not None
    assert (found["step"], found["metric"]) == (8, None)


def test_a_disk_that_fills_up_leaves_the_earlier_best_and_checkpoints(
    make_params: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = make_params()
    save = best.save_adapter

    def fill_up_at_the_second_best(model: Any, directory: Path) -> None:
        if "best" in directory.name and Path(params.best_model_dir).exists():
            raise OSError(28, "No space left on device")
        save(model, directory)

    monkeypatch.setattr(best, "save_adapter", fill_up_at_the_second_best)
    with pytest.raises(UserError, match=r"best adapter could not be saved.*the disk is full"):
        fit(params, console=QUIET)
    found = read_best(Path(params.best_model_dir))
    assert found is not None
    assert found["step"] == 2
    assert sorted(path.name for path in Path(params.output_dir).iterdir()) == ["best", "checkpoint-3", "params.yaml"]
    monkeypatch.undo()
    assert fit(params, resume="latest", console=QUIET).status == "finished"
