"""inspect_directory: adapters, runs, checkpoints and merged models, told from their files alone."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from rich.console import Console
from safetensors.torch import load_file, save_file
from stored_adapters import STEP, store_adapter
from tiny_families import tiny_family

from inft.evaluation.inspection import adapter_facts, inspect_directory, layer_scale, layers_of, product_norm
from inft.evaluation.merge import merge_adapter
from inft.models import MODELS
from inft.training.adapters import coverage
from inft.training.run import fit
from inft.training.stored import WEIGHTS_FILE, read_adapter, read_unchecked
from params import UserError
from params.resolve import resolve_train

FEW_STEPS = ["sft.save_steps=2", "sft.eval_steps=2", "sft.per_device_train_batch_size=4", "data.languages=en,ur"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps on the embedded text model, with PiSSA: two checkpoints and a best adapter."""
    root = tmp_path_factory.mktemp("runs")
    params = resolve_train(
        "text",
        demo=True,
        flags={"max_steps": 4, "output_dir": str(root / "run"), "max_rows_per_lang": 12},
        overrides=[*FEW_STEPS, f"basic.logs_dir={root}/logs", "lora.r=4", "lora.init=pissa"],
    )
    return fit(params, console=Console(quiet=True)).output_dir


@pytest.fixture
def run(run_dir: Path, tmp_path: Path) -> Path:
    """The same run, which a test may damage."""
    return Path(shutil.copytree(run_dir, tmp_path / "run"))


def change_weights(directory: Path, ending: str, value: float) -> str:
    """Fill the first tensor whose name ends so; return its name."""
    tensors = load_file(directory / WEIGHTS_FILE)
    name = next(name for name in sorted(tensors) if name.endswith(ending))
    tensors[name].fill_(value)
    save_file(tensors, directory / WEIGHTS_FILE)
    return name


@pytest.mark.parametrize(
    ("name", "change"), [*((name, {}) for name in MODELS), ("aya", {"use_rslora": True}), ("text", {"use_dora": True})]
)
def test_norms_are_those_of_the_weights_that_peft_adds(tmp_path, name, change):
    model = store_adapter(tmp_path, name, **change)
    expected = {
        path.removeprefix("base_model.model."): float(layer.get_delta_weight("default").detach().double().norm())
        for path, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    layers, not_finite = layers_of(read_adapter(tmp_path), tiny_family(name).spec)
    assert {layer.name: layer.norm for layer in layers} == pytest.approx(expected, rel=1e-5)
    assert not_finite == []
    facts = inspect_directory(tmp_path).adapter
    assert [layer.norm for layer in facts.largest] == pytest.approx(sorted(expected.values())[:-6:-1], rel=1e-5)
    for part in facts.parts:
        norms = [expected[layer.name] for layer in layers if layer.part == part.part]
        assert part.mean_norm == pytest.approx(sum(norms) / len(norms), rel=1e-5)
        assert part.largest_norm == pytest.approx(max(norms), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_parts_and_counts_are_those_of_the_adapted_model(tmp_path, name):
    model = store_adapter(tmp_path, name)
    expected = {
        row.part: (row.adapted, row.trainable_parameters)
        for row in coverage(model, tiny_family(name).spec, ())
        if row.adapted
    }
    facts = inspect_directory(tmp_path).adapter
    assert {part.part: (part.layers, part.parameters) for part in facts.parts} == expected
    assert facts.parameters == sum(parameters for _, parameters in expected.values())


@settings(max_examples=30, deadline=None)
@given(
    rank=st.integers(1, 8),
    inputs=st.integers(1, 20),
    outputs=st.integers(1, 20),
    scale=st.floats(0, 8),
    seed=st.integers(),
)
def test_the_norm_of_a_product_needs_no_product(rank, inputs, outputs, scale, seed):
    draw = torch.Generator().manual_seed(seed % 2**32)
    a, b = torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw)
    expected = float((scale * b.double() @ a.double()).norm())
    assert product_norm(a, b, scale=scale) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_small_difference_of_large_products_keeps_its_digits():
    draw = torch.Generator().manual_seed(0)
    a0, b0 = torch.randn(4, 50, generator=draw), torch.randn(60, 4, generator=draw)
    a, b = a0 * (1 + 1e-4), b0
    found = product_norm(torch.cat([a, a0]), torch.cat([b, -b0], dim=1), scale=1.0)
    assert found == pytest.approx(float((b.double() @ (a.double() - a0.double())).norm()), rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 5, "layers.1.*": 7}}])
def test_scales_are_those_of_peft(options):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], **options)
    model = get_peft_model(tiny_family("text").model(), config)
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            name = path.removeprefix("base_model.model.")
            assert layer_scale(config.to_dict(), name, rank=4) == pytest.approx(layer.scaling["default"]), name


def test_an_adapter_tells_its_origin(tmp_path):
    store_adapter(tmp_path, "llama32", dtype="bfloat16", quantised=True, dropout=0.2, use_rslora=True)
    found = inspect_directory(tmp_path)
    facts, stored = found.adapter, read_adapter(tmp_path)
    assert found.kind == "adapter"
    assert (facts.family, facts.base_model, facts.mode, facts.task) == (
        "llama32",
        "",
        "advanced",
        "llama32_advanced_demo",
    )
    assert (facts.step, facts.metric, facts.value, facts.why) == (STEP, "eval_loss", 0.5, "lowest loss of a test")
    assert (facts.r, facts.alpha, facts.dropout, facts.rslora, facts.dora) == (4, 8, 0.2, True, False)
    assert (facts.quantised, facts.dtypes, facts.sha256) == (True, ("F32",), stored.sha256)
    assert facts.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert (facts.listed_files, facts.changed_files) == (len(stored.record["files"]), ())
    assert facts.untrained == facts.not_finite == ()


def test_changed_files_broken_values_and_untrained_layers_are_named(tmp_path):
    store_adapter(tmp_path, "text")
    zero = change_weights(tmp_path, "lora_B.weight", 0.0)
    broken = change_weights(tmp_path, "lora_A.weight", math.inf)
    (tmp_path / "tokenizer.json").unlink()
    facts = inspect_directory(tmp_path).adapter
    assert set(facts.changed_files) == {WEIGHTS_FILE, "tokenizer.json"}
    assert facts.not_finite == (broken,)
    assert facts.untrained == (zero.removeprefix("base_model.model.").removesuffix(".lora_B.weight"),)
    json.dumps(asdict(facts), allow_nan=False)


def test_an_adapter_that_was_never_trained_is_told(tmp_path):
    store_adapter(tmp_path, "text", std=0.0)
    facts = inspect_directory(tmp_path).adapter
    assert len(facts.untrained) == sum(part.layers for part in facts.parts)


@pytest.mark.parametrize("name", ["llama32", "text"])
def test_a_plain_peft_adapter_is_told_by_part_without_best_json(tmp_path, name):
    store_adapter(tmp_path, name)
    expected = inspect_directory(tmp_path).adapter
    (tmp_path / "best.json").unlink()
    found = inspect_directory(tmp_path).adapter
    assert found.family is None
    assert found.parts == expected.parts


def test_a_run_tells_its_checkpoints_and_its_best_adapter(run):
    found = inspect_directory(run)
    assert found.kind == "run"
    assert [(entry.step, entry.damage) for entry in found.checkpoints] == [(4, None), (2, None)]
    assert (found.run["family"], found.run["mode"], found.run["task"]) == ("text", "basic", "text_basic_demo")
    assert found.run["method"] == found.adapter.method == "sft"
    facts = found.adapter
    assert facts.directory == str(run / "best")
    assert (facts.init, facts.r) == ("pissa", 8)  # stored as a plain LoRA of twice the rank
    assert facts.step in (2, 4)
    assert facts.listed_files > 0


def test_a_run_with_a_damaged_checkpoint_and_no_adapter_is_still_told(run):
    shutil.rmtree(run / "best")
    (run / "params.yaml").write_text((run / "params.yaml").read_text().replace("run/best", "nowhere"))
    (run / "checkpoint-2" / WEIGHTS_FILE).write_bytes(b"cut")
    found = inspect_directory(run)
    assert found.adapter is None
    assert [entry.damage is None for entry in found.checkpoints] == [True, False]
    assert WEIGHTS_FILE in found.checkpoints[1].damage


def test_a_checkpoint_is_described_by_its_run(run):
    (run / "params.yaml").write_text((run / "params.yaml").read_text().replace("method: sft", "method: dpo"))
    found = inspect_directory(run / "checkpoint-4")
    assert found.adapter.method == "dpo"
    assert (found.kind, found.checkpoints[0].step, found.checkpoints[0].damage) == ("checkpoint", 4, None)
    assert (found.adapter.family, found.adapter.base_model, found.adapter.mode) == ("text", "", "basic")
    assert (found.adapter.init, found.adapter.r) == ("pissa", 4)
    (run / "checkpoint-4" / WEIGHTS_FILE).unlink()
    damaged = inspect_directory(run / "checkpoint-4")
    assert damaged.adapter is None
    assert damaged.checkpoints[0].damage


def test_a_merged_model_tells_its_origin_and_lost_files(tmp_path):
    store_adapter(tmp_path / "adapter", "text")
    merge_adapter(read_adapter(tmp_path / "adapter"), tmp_path / "out")
    found = inspect_directory(tmp_path / "out")
    assert (found.kind, found.merged["family"], found.damaged_files) == ("merged model", "text", ())
    (tmp_path / "out" / "model.safetensors").write_bytes(b"cut")
    assert inspect_directory(tmp_path / "out").damaged_files == ("model.safetensors",)


def test_a_directory_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing that inft wrote"):
        inspect_directory(tmp_path)
    with pytest.raises(UserError, match="there is no directory"):
        inspect_directory(tmp_path / "absent")


def test_no_base_model_is_loaded(tmp_path, monkeypatch):
    store_adapter(tmp_path, "aya")

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)
    assert adapter_facts(read_unchecked(tmp_path)).parts
