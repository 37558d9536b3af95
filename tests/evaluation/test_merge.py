"""merge_adapter: the merged model is what the adapter computes, in every dtype, or it is not there."""

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from small_files import small_files
from stored_adapters import STEP, store_adapter
from tiny_families import tiny_family
from transformers import GPT2Config, GPT2LMHeadModel

from inft.evaluation import merge
from inft.evaluation.generate import generate_captions
from inft.evaluation.merge import LAYER_TOLERANCE, TOLERANCE, merge_adapter
from inft.evaluation.merged import DTYPES, MERGE_FILE, damaged_files, read_merged, refuse_taken
from inft.evaluation.probe import answer_logits, equal_top, logits_distance, mean_kl, probe_batches, probe_samples
from inft.models import MODELS
from inft.models.loading import load_model, load_processor
from inft.training.quantise import after_quantised_load, quantization_config
from inft.training.stored import load_adapter, read_adapter, with_family
from params import BasicParams, QLoRAParams, UserError


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a float32 adapter of each family, named by it."""
    root = tmp_path_factory.mktemp("adapters")
    for name in MODELS:
        store_adapter(root / name, name, std=0.2)
    return root


@pytest.fixture(scope="module")
def merged_dirs(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the merged float32 model of each family, named by it."""
    root = tmp_path_factory.mktemp("merged")
    for name in MODELS:
        merged(adapters / name, root / name)
    return root


def merged(adapter: Path, out: Path, **options: Any) -> Any:
    return merge_adapter(read_adapter(adapter), out, tell=lambda text: None, **options)


def unmerged(adapter: Path, name: str, *, dtype: str = "float32", quantised: bool = False) -> Any:
    """Base and adapter as PEFT computes them."""
    spec = tiny_family(name).spec
    config = quantization_config(QLoRAParams(), spec) if quantised else None
    base = load_model(spec, "", basic=BasicParams(dtype=dtype), quantization_config=config)
    return load_adapter(after_quantised_load(base) if quantised else base, read_adapter(adapter), spec=spec)


def batches_of(name: str) -> list[dict[str, torch.Tensor]]:
    family = tiny_family(name)
    return probe_batches(family.collator(), probe_samples(family.spec))


def plain(name: str, directory: Path) -> Any:
    """A merged model as plain transformers loads it."""
    return getattr(transformers, tiny_family(name).spec.auto_class).from_pretrained(directory, dtype="auto").eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_merged_model_computes_what_the_adapter_does_in_every_dtype(adapters, tmp_path, name, dtype):
    found = merged(adapters / name, tmp_path / "out", dtype=dtype)
    spec = tiny_family(name).spec
    model = load_model(spec, str(tmp_path / "out"), basic=BasicParams(dtype=dtype))
    assert {p.dtype for p in plain(name, tmp_path / "out").parameters()} == {getattr(torch, dtype)}
    expected = answer_logits(unmerged(adapters / name, name), batches_of(name))
    distance = logits_distance(answer_logits(model, batches_of(name)), expected)
    assert distance == pytest.approx(found.difference.logits, rel=1e-3)
    assert distance < TOLERANCE[dtype] / 3  # a tolerance that the embedded models nearly reach would be a gamble
    assert found.difference.layer < 0.7 * LAYER_TOLERANCE[dtype]
    assert found.difference.effect > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_merge_json_says_what_was_merged(adapters, merged_dirs, name):
    found, stored = read_merged(merged_dirs / name), read_adapter(adapters / name)
    assert (found["family"], found["base_model"], found["dtype"], found["step"]) == (name, "", "float32", STEP)
    assert (found["adapter"], found["adapter_sha256"]) == (str(adapters / name), stored.sha256)
    assert found["base_config_sha256"] == stored.record["base_config_sha256"]
    assert sum(found["layers"].values()) == len(stored.tensors) / 2
    assert set(found["files"]) == {path.name for path in (merged_dirs / name).iterdir()} - {MERGE_FILE}
    assert found["quantised"] is None
    assert damaged_files(merged_dirs / name, found) == []


@pytest.mark.parametrize("run", ["bfloat16", "float16"])
def test_each_weight_is_rounded_once(tmp_path, run):
    store_adapter(tmp_path / "adapter", "text", dtype=run, std=0.2)
    tuned = unmerged(tmp_path / "adapter", "text", dtype=run)
    exact = {
        name.removeprefix("base_model.model."): layer.get_base_layer().weight.data.double()
        + layer.scaling["default"]
        * layer.lora_B["default"].weight.data.double()
        @ layer.lora_A["default"].weight.double()
        for name, layer in tuned.named_modules()
        if hasattr(layer, "lora_A")
    }
    merged(tmp_path / "adapter", tmp_path / "out")
    weights = dict(plain("text", tmp_path / "out").named_parameters())
    naive = dict(tuned.merge_and_unload(safe_merge=True).named_parameters())
    errors, naive_errors = (
        sum(float((found[f"{name}.weight"].data.double() - weight).square().sum()) for name, weight in exact.items())
        for found in (weights, naive)
    )
    best = sum(float((weight.to(getattr(torch, run)).double() - weight).square().sum()) for weight in exact.values())
    assert errors == pytest.approx(best, rel=1e-3)
    assert naive_errors > 1.01 * best  # PEFT rounds the product, too


@pytest.mark.parametrize(
    "change", [{"use_dora": True}, {"use_rslora": True, "alpha": 3}, {"bias": "all"}, {"bias": "lora_only"}]
)
def test_other_kinds_of_lora_are_merged(tmp_path, change):
    store_adapter(tmp_path / "adapter", "aya", **change)
    found = merged(tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    assert found.difference.logits < TOLERANCE["bfloat16"] / 3


def test_the_run_s_dtype_is_the_default(tmp_path):
    store_adapter(tmp_path / "adapter", "text", dtype="bfloat16")
    assert merged(tmp_path / "adapter", tmp_path / "out").dtype == "bfloat16"
    exact = merged(tmp_path / "adapter", tmp_path / "exact", dtype="float32")
    assert exact.difference.logits < 1e-5  # bfloat16 weights and the adapter are both exact in float32


def test_layers_whose_weights_lie_transposed_are_merged(tmp_path, tiny_gpt2):
    found = merge_adapter(with_family(read_adapter(tiny_gpt2 / "adapter"), "text"), tmp_path / "out")
    assert found.difference.effect > 0.1
    assert sum(found.layers.values()) == 4


@pytest.fixture
def tiny_gpt2(tmp_path: Path, make_byte_tokenizer: Callable[[str], Any]) -> Path:
    """A saved GPT-2, whose linear layers are Conv1D, with a plain PEFT adapter of it in `adapter`."""
    torch.manual_seed(0)
    template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    make_byte_tokenizer(template).save_pretrained(tmp_path / "gpt2")
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=2, n_positions=1024, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False
    )
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path


def forget_layer(model: Any, layer: str, base: Any) -> None:
    model.get_submodule(layer).weight.data.copy_(base.get_submodule(layer).weight)


def wrong_scale(model: Any, layer: str, base: Any) -> None:
    before, weight = base.get_submodule(layer).weight, model.get_submodule(layer).weight
    weight.data.copy_(before + 1.2 * (weight - before))


def spoil_head(model: Any, layer: str, base: Any) -> None:
    model.get_output_embeddings().weight.data[::2] *= 1.5


def spoil_norm(model: Any, layer: str, base: Any) -> None:
    next(p for name, p in model.named_parameters() if "norm" in name).data.fill_(float("inf"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("defect", "complaint"),
    [(forget_layer, "merged layer"), (wrong_scale, "merged layer"), (spoil_head, "logits"), (spoil_norm, "logits")],
)
def test_a_defect_is_caught_and_nothing_is_kept(adapters, tmp_path, monkeypatch, defect, complaint, dtype):
    layer = "model.layers.1.self_attn.v_proj"
    base, merge_rightly = tiny_family("text").model(), merge.merge_layers

    def merge_wrongly(model: Any, target: torch.dtype) -> Any:
        found, before = merge_rightly(model, target)
        defect(found, layer, base)
        return found, before

    monkeypatch.setattr(merge, "merge_layers", merge_wrongly)
    with pytest.raises(UserError, match=f"{complaint}.*nothing was kept"):
        merged(adapters / "text", tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_processor_that_is_not_itself_when_read_back_is_refused(adapters, tmp_path, monkeypatch):
    save = transformers.PreTrainedTokenizerFast.save_pretrained

    def save_another(self: Any, directory: str, **options: Any) -> Any:
        self.chat_template = f"Caption: {self.chat_template}"
        return save(self, directory, **options)

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", save_another)
    with pytest.raises(UserError, match="does not survive being saved"):
        merged(adapters / "text", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_a_dtype_cannot_hold_are_refused(tmp_path):
    store_adapter(tmp_path / "adapter", "text", std=1e5)
    with pytest.raises(UserError, match=r"differs.*another --dtype"):
        merged(tmp_path / "adapter", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", MODELS)
def test_a_qlora_adapter_is_merged_into_unquantised_weights_and_the_gap_is_measured(tmp_path, name):
    store_adapter(tmp_path / "adapter", name, dtype="bfloat16", quantised=True)
    found = merged(tmp_path / "adapter", tmp_path / "out", dtype="float32")
    assert found.difference.logits < 1e-5  # of base and adapter without quantisation
    trained = answer_logits(
        unmerged(tmp_path / "adapter", name, dtype="bfloat16", quantised=True), batches_of(name)
    ).double()
    model = load_model(tiny_family(name).spec, str(tmp_path / "out"), basic=BasicParams(dtype="float32"))
    logits = answer_logits(model, batches_of(name)).double()
    kl = torch.nn.functional.kl_div(
        logits.log_softmax(-1), trained.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert found.quantised.kl == pytest.approx(float(kl), rel=1e-6)
    assert found.quantised.kl > 1e-3
    assert found.quantised.equal_top == pytest.approx(
        float((logits.argmax(-1) == trained.argmax(-1)).double().mean()), rel=1e-6
    )


@pytest.mark.parametrize("name", MODELS)
def test_plain_transformers_loads_what_was_written(adapters, merged_dirs, name):
    directory, expected = merged_dirs / name, unmerged(adapters / name, name)
    auto = transformers.AutoProcessor if tiny_family(name).spec.takes_images else transformers.AutoTokenizer
    collator = tiny_family(name).spec.collator(auto.from_pretrained(directory))
    batches = probe_batches(collator, probe_samples(tiny_family(name).spec))
    model = plain(name, directory)
    found, scale = answer_logits(model, batches), getattr(model.config.get_text_config(), "logit_scale", 1.0)
    assert read_merged(directory)["mended"] == (name != "text")
    assert (scale != 1.0) == (name == "aya")
    torch.testing.assert_close(found * scale, answer_logits(expected, batches), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_captions_are_the_adapters(tmp_path, name):
    store_adapter(tmp_path / "adapter", name, std=0.5)
    merged(tmp_path / "adapter", tmp_path / "out")
    family = tiny_family(name)
    samples = probe_samples(family.spec)

    def captions(model: Any, collator: Any) -> list[str]:
        return generate_captions(model, collator, samples, max_new_tokens=20, batch_size=3)

    collator = family.spec.collator(load_processor(family.spec, str(tmp_path / "out")))
    model = load_model(family.spec, str(tmp_path / "out"), basic=BasicParams(dtype="float32"))
    found = captions(model, collator)
    assert found == captions(unmerged(tmp_path / "adapter", name), family.collator())
    assert captions(plain(name, tmp_path / "out"), collator) == found
    assert found != captions(family.model(), family.collator())


@pytest.mark.parametrize("name", MODELS)
def test_the_config_is_the_bases(merged_dirs, name):
    embedded = Path(merge.__file__).parents[1] / "embedded" / name
    found, expected = (
        transformers.AutoConfig.from_pretrained(place).to_dict() for place in (merged_dirs / name, embedded)
    )

    def lasting(config: Any) -> Any:
        if not isinstance(config, dict):
            return config
        volatile = ("dtype", "transformers_version", "_name_or_path")
        return {key: lasting(value) for key, value in config.items() if key not in volatile}

    assert lasting(found) == lasting(expected)  # with decoding's cache on
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (merged_dirs / name).iterdir()}
    assert len(modes) == 1  # weights as readable as the rest


def test_a_plain_peft_adapter_is_merged_into_the_base_that_is_named(tmp_path):
    family = tiny_family("text")
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(family.model(), lora)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    stored = with_family(read_adapter(tmp_path / "adapter"), "text")
    with pytest.raises(UserError, match="--model"):
        merge_adapter(stored, tmp_path / "out")
    place = shutil.copytree(Path(merge.__file__).parents[1] / "embedded" / "text", tmp_path / "elsewhere")
    found = merge_adapter(stored, tmp_path / "out", model_name=str(place))
    assert (found.dtype, found.step) == ("float32", None)
    torch.testing.assert_close(
        answer_logits(plain("text", tmp_path / "out"), batches_of("text")),
        answer_logits(tuned.eval(), batches_of("text")),
        atol=2e-4,
        rtol=1e-4,
    )


def test_an_adapter_on_something_else_than_linear_layers_is_refused(tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    tuned = get_peft_model(tiny_family("text").model(), lora)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(UserError, match=r"model\.embed_tokens, a Embedding"):
        merge_adapter(with_family(read_adapter(tmp_path / "adapter"), "text"), tmp_path / "out")


def test_modules_that_peft_trains_as_a_whole_are_taken_over(tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    tuned = get_peft_model(tiny_family("text").model(), lora)
    for name, parameter in tuned.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(1.5)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    found = merge_adapter(with_family(read_adapter(tmp_path / "adapter"), "text"), tmp_path / "out")
    assert found.difference.effect > 0.1
    torch.testing.assert_close(
        answer_logits(plain("text", tmp_path / "out"), batches_of("text")),
        answer_logits(tuned.eval(), batches_of("text")),
        atol=2e-4,
        rtol=1e-4,
    )


def test_a_full_disk_leaves_nothing_and_says_what_to_do(adapters, tmp_path):
    refused = pytest.raises(UserError, match=r"merged model could not be saved to .*Free space there, then merge again")
    with refused, small_files(100_000):
        merged(adapters / "text", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_only_what_a_merge_wrote_is_replaced_and_only_when_asked(merged_dirs, tmp_path):
    out = tmp_path / "out"
    refuse_taken(out, overwrite=False)
    out.mkdir()
    refuse_taken(out, overwrite=False)
    (out / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="files that no merge wrote"):
            refuse_taken(out, overwrite=overwrite)
    with pytest.raises(UserError, match="is a file"):
        refuse_taken(out / "thesis.txt", overwrite=True)
    (out / "thesis.txt").unlink()
    shutil.copytree(merged_dirs / "text", out, dirs_exist_ok=True)
    with pytest.raises(UserError, match="--overwrite"):
        refuse_taken(out, overwrite=False)
    refuse_taken(out, overwrite=True)
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        refuse_taken(out, overwrite=True)
    (out / MERGE_FILE).write_text("{}")
    with pytest.raises(UserError, match=r"merge\.json is missing or damaged"):
        refuse_taken(out, overwrite=True)


def test_the_distance_of_logits_ignores_what_changes_no_probability():
    reference = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    shifted = reference + torch.linspace(-3, 3, 5)[:, None]
    assert logits_distance(shifted, reference) == pytest.approx(0, abs=1e-6)
    assert logits_distance(1.1 * reference, reference) == pytest.approx(0.1, rel=1e-5)
    assert logits_distance(torch.zeros_like(reference), reference) == pytest.approx(1)
    assert mean_kl(reference, shifted) == pytest.approx(0, abs=1e-6)
    assert equal_top(reference, -reference) == 0


def test_probe_rows_show_scenes_in_several_scripts(vlm):
    samples = probe_samples(vlm.spec)
    assert len({sample.language for sample in samples}) == len(samples) == 6
    assert all(sample.image is not None for sample in samples)
