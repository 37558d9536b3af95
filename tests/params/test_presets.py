import dataclasses
import re
from pathlib import Path

import pytest

from inft.models import MODELS
from params import BasicParams, LoRAParams, SFTParams
from params.check import SECTIONS
from params.describe import describe, describe_field
from params.presets import (
    ADVANCED_FIELD,
    DEMO,
    MODEL_FIELDS,
    MODEL_NAMES,
    OUTPUT_FIELDS,
    RELEASED,
    SAMPLE_CONTEXT,
    TARGETS,
    TRAINING_MODES,
    WIDER,
    lora_targets,
)
from params.resolve import resolve_train

CONFIGS = sorted((Path(__file__).parents[2] / "params" / "configs" / "vlm").rglob("*.yaml"))

# One name per part of each family, as transformers names its modules, and the modes that adapt it.
LAYERS = {
    "llama32": {
        "model.language_model.layers.3.cross_attn.q_proj": "basic advanced",
        "model.language_model.layers.0.self_attn.o_proj": "basic advanced",
        "model.language_model.layers.39.mlp.down_proj": "basic advanced",
        "model.multi_modal_projector": "advanced",
        "model.vision_model.transformer.layers.0.self_attn.q_proj": "",
        "lm_head": "",
    },
    "aya": {
        "model.language_model.layers.0.self_attn.k_proj": "basic advanced",
        "model.language_model.layers.31.mlp.gate_proj": "basic advanced",
        "model.multi_modal_projector.linear_1": "advanced",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj": "",
        "lm_head": "",
    },
    "text": {
        "model.layers.0.self_attn.v_proj": "basic advanced",
        "model.layers.0.mlp.up_proj": "basic advanced",
        "transformer.h.0.attn.c_attn": "basic advanced",
        "gpt_neox.layers.0.attention.query_key_value": "basic advanced",
        "model.layers.0.mlp.router": "advanced",
        "lm_head": "",
        "embed_out": "",
    },
}


@pytest.mark.parametrize("model", MODEL_NAMES)
@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_targets_match_the_language_model_and_in_advanced_mode_the_projector_and_never_the_vision_tower(model, mode):
    targets = lora_targets(model, mode, LoRAParams())
    for layer, modes in LAYERS[model].items():
        assert any(re.fullmatch(target, layer) for target in targets) == (mode in modes), layer


def test_own_targets_replace_the_preset_and_none_of_them_is_ignored():
    own = LoRAParams(target_modules=("q_proj",))
    assert lora_targets("aya", "basic", own) == ("q_proj",)
    assert lora_targets("aya", "advanced", own) == ("q_proj", *lora_targets("aya", "advanced", LoRAParams())[1:])
    whole = LoRAParams(
        target_modules=("q_proj",), aya_advanced_target_modules=("k_proj",), advanced_target_modules=("v",)
    )
    assert lora_targets("aya", "advanced", whole) == ("k_proj",)
    assert lora_targets("llama32", "advanced", whole) == ("v",)


def test_every_preset_names_existing_fields():
    for values in [*DEMO.values(), *RELEASED.values()]:
        for section, fields in values.items():
            assert set(fields) <= {field.name for field in dataclasses.fields(SECTIONS[section])}


def test_there_is_a_demo_for_every_model_and_mode():
    assert set(DEMO) == set(OUTPUT_FIELDS) == {(model, mode) for model in MODEL_NAMES for mode in TRAINING_MODES}


def test_every_output_directory_is_below_the_common_one():
    for output, best in OUTPUT_FIELDS.values():
        assert Path(getattr(SFTParams, output)).is_relative_to(BasicParams.output_dir)
        assert Path(getattr(SFTParams, best)).is_relative_to(getattr(SFTParams, output))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_file_opens_with_its_launch_command_and_resolves(path):
    launch = re.search(
        r"inft train (?P<model>\w+)(?P<flags>.*) --config (?P<file>\S+)", path.read_text().splitlines()[0]
    )
    assert launch is not None
    assert path.as_posix().endswith(launch["file"])
    mode = "advanced" if "--training-mode advanced" in launch["flags"] else None
    resolve_train(launch["model"], training_mode=mode, config_file=path)


def test_every_model_family_has_its_rows_in_params():
    families = {
        "MODELS in inft/models/__init__.py": MODELS,
        "ModelName in params/train.py": MODEL_NAMES,
        "MODEL_FIELDS in params/presets.py": MODEL_FIELDS,
        "OUTPUT_FIELDS in params/presets.py": [model for model, _ in OUTPUT_FIELDS],
        "DEMO in params/presets.py": [model for model, _ in DEMO],
        "TARGETS in params/presets.py": TARGETS,
        "WIDER in params/presets.py": WIDER,
        "ADVANCED_FIELD in params/presets.py": ADVANCED_FIELD,
        "SAMPLE_CONTEXT in params/presets.py": SAMPLE_CONTEXT,
    }
    known = {model for models in families.values() for model in models}
    missing = [f"{place} lacks {model}" for place, models in families.items() for model in known - set(models)]
    assert not missing, "; ".join(missing)


def test_there_are_shipped_files():
    assert len(CONFIGS) >= 3


@pytest.mark.parametrize("section", SECTIONS)
def test_the_description_of_a_section_has_every_field_in_order(section):
    names = [f"{section}.{field.name}" for field in dataclasses.fields(SECTIONS[section])]
    assert [text.name for text in describe(section)] == names


def test_a_description_has_the_comment_and_the_default():
    text = next(text for text in describe("sft") if text.name == "sft.lr")
    assert (text.type, text.default, text.help) == ("number, above 0", "0.00015", "peak, per optimizer step")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("sft.max_steps", "whole number, at least 1; or none"),
        ("lora.dropout", "number, at least 0 and below 1"),
        ("lora.bias", "none|all|lora_only"),
        ("sft.report_to", "list of wandb|tensorboard|mlflow|trackio"),
        ("data.columns", "mapping of image|title|content|caption|language|prompt|chosen|rejected to text"),
        ("basic.gen_do_sample", "true|false"),
        ("basic.device_map", "text; or none"),
    ],
)
def test_a_description_says_which_values_a_field_takes(key, words):
    assert describe_field(key).type == words
