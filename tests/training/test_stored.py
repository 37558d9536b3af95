"""read_adapter and load_adapter: whole files of the right adapter on the right base, or an error that names them."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from rich.console import Console
from safetensors.torch import load_file, save_file
from stored_adapters import STEP, store_adapter
from tiny_families import tiny_family

from inft.models import MODELS
from inft.models.loading import load_model
from inft.training.quantise import after_quantised_load, quantization_config
from inft.training.run import fit
from inft.training.stored import WEIGHTS_FILE, StoredAdapter, load_adapter, read_adapter, with_family
from params import BasicParams, QLoRAParams, UserError


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the stored adapter of each family, named by it."""
    root = tmp_path_factory.mktemp("adapters")
    for name in MODELS:
        store_adapter(root / name, name)
    return root


@pytest.fixture
def adapter(originals: Path, tmp_path: Path) -> Path:
    """A stored adapter of the embedded text model that a test may damage."""
    return Path(shutil.copytree(originals / "text", tmp_path / "adapter"))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a stored adapter and take away best.json, which would tell of it."""
    tensors = load_file(directory / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, directory / WEIGHTS_FILE)
    (directory / "best.json").unlink()


def put_on_base(stored: StoredAdapter, name: str = "text", base: Any = None) -> Any:
    return load_adapter(base or tiny_family(name).model(), stored, spec=tiny_family(name).spec)


def logits(model: torch.nn.Module, name: str, make_sample: Callable[..., Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**tiny_family(name).collator()([make_sample()])).logits
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_adapter_says_what_it_is_and_gives_the_logits_that_were_stored(originals, make_sample, tmp_path, name):
    stored = read_adapter(originals / name)
    assert (stored.family, stored.base_model, stored.record["step"]) == (name, "", STEP)
    assert stored.parameters == sum(t.numel() for t in load_file(originals / name / WEIGHTS_FILE).values())
    loaded = put_on_base(stored, name)
    assert not any(module.training for module in loaded.modules())
    expected = store_adapter(tmp_path / "again", name)
    assert torch.equal(logits(loaded, name, make_sample), logits(expected, name, make_sample))
    assert not torch.allclose(logits(loaded, name, make_sample), logits(tiny_family(name).model(), name, make_sample))


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_on_a_quantised_base_is_the_files(originals, name):
    family, basic = tiny_family(name), BasicParams(dtype="bfloat16")
    config = quantization_config(QLoRAParams(), family.spec)
    base = after_quantised_load(load_model(family.spec, "", basic=basic, quantization_config=config))
    state = get_peft_model_state_dict(put_on_base(read_adapter(originals / name), name, base))
    saved = load_file(originals / name / WEIGHTS_FILE)
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[key], saved[key]) for key in saved)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"use_rslora": True}, {"bias": "all"}, {"bias": "lora_only"}])
def test_other_kinds_of_lora_load_too(tmp_path, make_sample, change):
    expected = store_adapter(tmp_path / "adapter", "text", **change)
    loaded = put_on_base(read_adapter(tmp_path / "adapter"))
    assert torch.equal(logits(loaded, "text", make_sample), logits(expected, "text", make_sample))


def test_a_runs_directory_stands_for_its_best_adapter(adapter):
    adapter.rename(adapter.parent / "best")
    assert read_adapter(adapter.parent).directory == adapter.parent / "best"


def test_the_parameters_of_its_run_are_read_by_section(tmp_path):
    store_adapter(tmp_path, "text", dtype="bfloat16", quantised=True)
    stored = read_adapter(tmp_path)
    assert stored.section("basic").dtype == "bfloat16"
    assert stored.section("lora").r == 4
    assert stored.quantised


def test_a_parameter_of_another_version_is_told(adapter):
    record = json.loads((adapter / "best.json").read_text())
    record["params"]["basic"]["novelty"] = 3
    (adapter / "best.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"best\.json: basic\.novelty is not a parameter"):
        read_adapter(adapter).section("basic")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: shutil.rmtree(d), "there is no directory"),
        (lambda d: [p.unlink() for p in d.iterdir()], "holds no adapter"),
        (lambda d: (d / WEIGHTS_FILE).unlink(), f"half copied: {WEIGHTS_FILE} is missing"),
        (lambda d: (d / WEIGHTS_FILE).rename(d / "adapter_model.bin"), "is a pickle"),
        (lambda d: (d / "adapter_config.json").unlink(), r"adapter_config\.json is missing"),
        (lambda d: (d / "adapter_config.json").write_text('{"peft'), r"adapter_config\.json is half copied"),
        (lambda d: (d / "adapter_config.json").write_text("[1]"), "no JSON object"),
        (lambda d: (d / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "kind IA3"),
        (lambda d: (d / "best.json").write_text("{"), r"best\.json is half copied"),
        (lambda d: save_file({}, d / WEIGHTS_FILE), "holds no tensor"),
    ],
)
def test_a_directory_without_a_whole_adapter_is_refused(adapter, spoil, message):
    spoil(adapter)
    with pytest.raises(UserError, match=message):
        read_adapter(adapter)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), with_record=st.booleans())
def test_weights_that_are_cut_anywhere_are_half_copied(originals, tmp_path, share, with_record):
    directory = tmp_path / "cut"
    shutil.copytree(originals / "text", directory, dirs_exist_ok=True)
    whole = (directory / WEIGHTS_FILE).read_bytes()
    (directory / WEIGHTS_FILE).write_bytes(whole[: int(share * len(whole))])
    if not with_record:
        (directory / "best.json").unlink()
    with pytest.raises(UserError, match="half copied"):
        read_adapter(directory)


@pytest.mark.parametrize("spoil", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1] + b" ")])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", WEIGHTS_FILE])
def test_every_file_that_best_json_lists_is_checked_by_name(adapter, file, spoil):
    spoil(adapter / file)
    with pytest.raises(UserError, match=rf"half copied.*{file}|{file}.*half copied|{file} is missing"):
        read_adapter(adapter)


def test_an_adapter_of_another_family_is_refused(originals):
    with pytest.raises(UserError, match="of the family aya, not text"):
        put_on_base(read_adapter(originals / "aya"))


def test_an_adapter_for_another_architecture_is_refused_with_both_names(adapter, tiny_text_dir):
    base = load_model(tiny_family("text").spec, str(tiny_text_dir), basic=BasicParams(dtype="float32"))
    with pytest.raises(UserError, match=rf"trained on the embedded text, and {tiny_text_dir} has.*--model"):
        put_on_base(read_adapter(adapter), base=base)


def drop_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[3]]


def add_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 128)


def reshape_one(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = tensors[name][:-1].contiguous()


def raise_rank(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = torch.cat([tensor, tensor], dim=0 if "lora_A" in name else 1)


def rename_all(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("model.layers", "model.blocks")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_one, "1 tensors are missing in its file: base_model"),
        (add_one, "1 of its tensors belong to layers that the model lacks.*layers.99"),
        (reshape_one, r"1 of its tensors have another shape: .*lora_B.weight \(\d+×4, not \d+×4\)"),
        (raise_rank, "56 of its tensors have another shape.* and 53 more"),
        (rename_all, "56 of its tensors belong to layers.*56 tensors are missing"),
        (lambda tensors: tensors[sorted(tensors)[5]].fill_(float("nan")), "not finite"),
    ],
)
def test_tensors_that_do_not_all_fit_are_refused_and_the_base_stays_as_it_was(adapter, make_sample, change, message):
    rewrite(adapter, change)
    base = tiny_family("text").model()
    before, names = logits(base, "text", make_sample), [name for name, _ in base.named_modules()]
    with pytest.raises(UserError, match=message):
        put_on_base(read_adapter(adapter), base=base)
    assert [name for name, _ in base.named_modules()] == names
    assert torch.equal(logits(base, "text", make_sample), before)


@pytest.mark.parametrize("targets", [["query"], "no_such.*"])
def test_targets_that_the_base_does_not_have_are_refused(adapter, targets):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
    (adapter / "best.json").unlink()
    with pytest.raises(UserError, match="does not fit"):
        put_on_base(read_adapter(adapter))


def test_a_plain_peft_adapter_loads_when_its_family_is_said(tmp_path, make_sample):
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    expected = get_peft_model(tiny_family("text").model(), config).eval()
    expected.save_pretrained(tmp_path, save_embedding_layers=False)
    stored = read_adapter(tmp_path)
    assert (stored.record, stored.family) == (None, None)
    with pytest.raises(UserError, match=r"--family llama32\|aya\|text"):
        with_family(stored, None)
    assert with_family(stored, "text").family == "text"
    assert torch.equal(logits(put_on_base(stored), "text", make_sample), logits(expected, "text", make_sample))


def test_a_family_that_best_json_contradicts_is_refused(adapter):
    with pytest.raises(UserError, match="of the family text, not aya"):
        with_family(read_adapter(adapter), "aya")


def test_loading_asks_no_network(adapter, monkeypatch):
    asked: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        asked.append(args)
        raise OSError("no network")

    config = json.loads((adapter / "adapter_config.json").read_text())
    named = {**config, "base_model_name_or_path": "CohereLabs/aya-vision-8b"}  # which PEFT may want to look up
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    (adapter / "best.json").unlink()
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    put_on_base(read_adapter(adapter))
    assert asked == []


def test_reading_imports_no_torch(adapter):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from inft.training.stored import read_adapter\n"
        f"read_adapter(Path({str(adapter)!r})).section('basic')\n"
        "assert 'torch' not in sys.modules and 'peft' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_weight_that_peft_takes_over_wrongly_is_told(adapter, monkeypatch):
    load = PeftModel.from_pretrained

    def load_carelessly(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        next(weight for name, weight in model.named_parameters() if "lora_A" in name).data[0, 0] += 1e-6
        return model

    monkeypatch.setattr(PeftModel, "from_pretrained", load_carelessly)
    with pytest.raises(UserError, match=r"PEFT did not take over base_model\.model\.model\.layers\.0.*lora_A"):
        put_on_base(read_adapter(adapter))


def test_a_checkpoint_of_a_pissa_run_is_the_same_as_what_was_stored_of_its_step(make_params):
    params = make_params(lora__init="pissa", sft__max_steps=4, sft__save_steps=4, sft__load_best_model_at_end=False)
    result = fit(params, console=Console(quiet=True))

    def found(directory: Path) -> torch.Tensor:
        base = load_model(tiny_family("text").spec, params.model_name, basic=params.basic)
        with torch.no_grad():
            logits: torch.Tensor = put_on_base(read_adapter(directory), base=base)(torch.arange(4, 20)[None]).logits
        return logits

    torch.testing.assert_close(found(result.output_dir / "checkpoint-4"), found(result.best_dir), atol=2e-5, rtol=1e-4)


def test_a_base_of_the_same_architecture_with_other_weights_is_refused(adapter, tmp_path):
    other = tmp_path / "other"
    model = tiny_family("text").model()
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "down_proj" in name).mul_(1.5)
    model.save_pretrained(other)
    tiny_family("text").processor.save_pretrained(other)
    base = load_model(tiny_family("text").spec, str(other), basic=BasicParams(dtype="float32"))
    with pytest.raises(UserError, match=r"was trained on the embedded text, and .*other has other weights"):
        put_on_base(read_adapter(adapter), base=base)
    model = tiny_family("text").model()
    model.save_pretrained(other)
    base = load_model(tiny_family("text").spec, str(other), basic=BasicParams(dtype="bfloat16"))
    assert put_on_base(read_adapter(adapter), base=base) is not None  # a copy of its own base


def test_a_record_whose_files_are_no_object_is_damaged(adapter):
    record = json.loads((adapter / "best.json").read_text())
    (adapter / "best.json").write_text(json.dumps({**record, "files": ["adapter_model.safetensors"]}))
    with pytest.raises(UserError, match=r"best\.json is damaged: its files are no object"):
        read_adapter(adapter)
