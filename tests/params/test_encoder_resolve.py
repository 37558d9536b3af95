"""An encoder's parameters: layers, messages, files that read back equal."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from params.bounds import Bounds
from params.describe import describe
from params.encoder import EncoderParams
from params.encoder_resolve import (
    ENCODER,
    FOLDERS,
    SHIPPED,
    dump_encoder_yaml,
    find_config,
    load_encoder_params,
    resolve_encoder,
    task_of,
)
from params.errors import UserError

DATA = ["--dataset.path", "texts.jsonl"]


def resolved(*arguments: str, task: str = "pretraining", **given) -> EncoderParams:
    return resolve_encoder(task, arguments=[*DATA, *arguments], **given)


def refusal(*arguments: str, task: str = "pretraining", **given) -> str:
    with pytest.raises(UserError) as caught:
        resolved(*arguments, task=task, **given)
    return str(caught.value)


def yaml_file(directory: Path, text: str) -> Path:
    path = directory / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_arguments_win_over_the_file_and_the_file_over_the_base(tmp_path):
    file = yaml_file(tmp_path, "trainer: {max_steps: 7, save_steps: 3}\n")
    base = {"trainer.max_steps": 1, "trainer.save_steps": 1, "trainer.eval_steps": 1, "scheduler.warmup_steps": 0}
    params = resolved("--trainer.max_steps=9", config_file=file, base=base)
    assert (params.trainer.max_steps, params.trainer.save_steps, params.trainer.eval_steps) == (9, 3, 1)


def test_data_named_by_arguments_takes_the_place_of_the_files(tmp_path):
    file = yaml_file(tmp_path, "dataset: {name: a/b, config: en}\n")
    params = resolved(config_file=file, base={"dataset.path": "demo"})
    assert (params.dataset.name, params.dataset.config, params.dataset.path) == (None, None, "texts.jsonl")
    told = resolve_encoder("pretraining", config_file=file, base={"dataset.path": "demo"})
    assert (told.dataset.name, told.dataset.path) == ("a/b", None)


def test_a_flag_that_is_not_given_changes_nothing():
    assert resolved(flags={"seed": None}).seed == 42
    assert resolved(flags={"seed": 7}).seed == 7


def test_an_unknown_key_is_an_error_with_a_suggestion(tmp_path):
    assert "did you mean trainer.max_steps" in refusal("--trainer.max_step", "3")
    assert "did you mean dataset.path" in refusal("--datset.path", "x")
    file = yaml_file(tmp_path, "trainer:\n  max_stepz: 3\n")
    assert f"{file} line 2" in refusal(config_file=file)


def test_a_key_without_value_and_a_word_without_key_are_errors():
    assert "--trainer.max_steps needs a value" in refusal("--trainer.max_steps")
    assert "--trainer.max_steps needs a value" in refusal("--trainer.max_steps", "--seed", "3")
    assert "x: expected --section.key value" in refusal("x")
    assert "given twice" in refusal("--seed", "1", "--seed", "2")


def test_everything_wrong_is_told_at_once():
    text = refusal("--trainer.max_steps", "0", "--optimizer.lr", "-1", "--scheduler.name", "constant")
    assert text.startswith("3 errors")


def test_fp16_is_refused_and_an_unquoted_no_is_the_word_no(tmp_path):
    assert "'no', 'fp32' or 'bf16'" in refusal("--trainer.mixed_precision", "fp16")
    file = yaml_file(tmp_path, "trainer:\n  mixed_precision: no\n")
    assert resolved(config_file=file).trainer.mixed_precision == "no"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.hidden_size", "100"], "no multiple of model.num_attention_heads"),
        (["--model.hidden_size", "36", "--model.num_attention_heads", "12"], "model.rope: false"),
        (["--dataset.max_seq_length", "1024"], "do not fit model.max_position_embeddings 512"),
        (["--dataset.name", "a/b"], "dataset.name and dataset.path"),
        (["--dataset.eval_split", "dev", "--dataset.eval_samples", "3"], "keep one of them"),
        (["--dataset.prefetch_factor", "3"], "dataset.num_workers of at least 1"),
        (["--dataset.pre_tokenize", "true", "--dataset.streaming", "true"], "drop one of them"),
        (["--optimizer.betas", "0.9"], "two numbers"),
        (
            ["--trainer.masked_logits_only_loss", "false", "--trainer.fused_linear_cross_entropy", "torch"],
            "masked_logits_only_loss: true",
        ),
        (["--torchao.enable", "true", "--quartet2.enable", "true"], "torchao.enable and quartet2.enable exclude"),
        (["--optimizer.momentum", "0.5"], "no effect unless optimizer.name is muon"),
        (["--trainer.torch_compile_backend", "eager"], "no effect unless trainer.torch_compile is true"),
        (["--contrastive.temperature", "0.1"], "no effect in pretraining"),
    ],
)
def test_what_cannot_hold_together_is_refused_with_the_remedy(arguments, words):
    assert words in refusal(*arguments)


def test_without_data_there_is_nothing_to_train_on():
    with pytest.raises(UserError, match=r"give dataset\.path"):
        resolve_encoder("pretraining")


def test_a_setting_of_the_other_task_is_refused_but_its_default_value_is_not():
    assert "no effect in contrastive" in refusal("--datacollator.mask_all", "true", task="contrastive")
    assert resolved("--datacollator.mask_all", "false", task="contrastive").task == "contrastive"


def test_a_file_of_the_other_task_names_its_command(tmp_path):
    file = yaml_file(tmp_path, "task: contrastive\n")
    assert "inft finetune-encoder" in refusal(config_file=file)
    assert task_of(file) == "contrastive"
    assert task_of(None) == "pretraining"


def test_sources_add_up():
    params = resolve_encoder("contrastive", arguments=["--dataset.sources.nli", "a", "--dataset.sources.qa", "b"])
    assert params.dataset.sources == {"nli": "a", "qa": "b"}


SHIPPED_FILES = [path for folder in FOLDERS for path in sorted((SHIPPED / folder).glob("*.yaml"))]


@pytest.mark.parametrize("path", SHIPPED_FILES, ids=lambda path: path.stem)
def test_each_file_that_ships_resolves_and_opens_with_its_command(path):
    params = resolve_encoder(task_of(path), config_file=path, arguments=DATA)
    assert params.task == task_of(path)
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert f"configs/{path.relative_to(SHIPPED)}" in first
    assert first.startswith("# inft ")


def test_a_shipped_file_is_found_by_the_name_the_guide_uses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = Path("configs/pretraining/pretrain_neobert.yaml")
    assert find_config(name) == SHIPPED / "pretraining" / "pretrain_neobert.yaml"
    (tmp_path / "configs/pretraining").mkdir(parents=True)
    (tmp_path / name).write_text("seed: 3\n")
    assert find_config(name) == name, "a file of one's own comes first"
    with pytest.raises(UserError, match="These ship: configs/"):
        find_config(Path("configs/../../secret.yaml"))


def test_every_field_has_a_meaning():
    for section in ENCODER.sections:
        texts = describe(section, ENCODER)
        assert [text.name for text in texts] == [
            f"{section}.{field.name}" for field in dataclasses.fields(ENCODER.sections[section])
        ]
        assert all(text.help for text in texts), section


def numbers(hint):
    """Values of a numeric field within its bounds."""
    bounds = next((item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Bounds)), None)
    kind = getattr(hint, "__origin__", hint)
    low = (bounds.low if bounds else 0) + (0 if bounds and bounds.low_included else 0.001)
    high = min(bounds.high if bounds else 1e9, 1e9) - (0 if bounds and bounds.high_included else 0.001)
    if kind is int:
        return st.integers(int(low), int(high))
    return st.floats(low, high, allow_nan=False)


@given(
    steps=numbers(ENCODER.field_types["trainer.max_steps"]),
    lr=numbers(ENCODER.field_types["optimizer.lr"]),
    name=st.text(min_size=1, max_size=8),
    sources=st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=5), max_size=3),
)
def test_a_stored_configuration_reads_back_equal(tmp_path_factory, steps, lr, name, sources):
    default = EncoderParams()
    params = dataclasses.replace(
        default,
        dataset=dataclasses.replace(default.dataset, path=name, sources=sources),
        trainer=dataclasses.replace(default.trainer, max_steps=steps),
        optimizer=dataclasses.replace(default.optimizer, lr=lr),
    )
    file = tmp_path_factory.mktemp("stored") / "config.yaml"
    file.write_text(dump_encoder_yaml(params), encoding="utf-8")
    assert load_encoder_params(file) == params


def test_a_stored_model_brings_its_own_architecture():
    assert "model.hidden_size: stored brings its own" in refusal("--model.name", "stored", "--model.hidden_size", "999")
    assert resolved("--model.name", "stored", "--model.attn_backend", "sdpa").model.name == "stored"


def test_a_seed_is_what_numpy_takes():
    assert "below 4,294,967,296" in refusal("--seed", str(2**32))
    assert resolved("--seed", str(2**32 - 1)).seed == 2**32 - 1
