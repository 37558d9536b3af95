"""CRAFT's fields in a trainer's arguments: checked when made, kept by every copy, presets and suggestions."""

import copy
import dataclasses
import json
import pickle
import sys
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

import craft.config
from craft.config import (
    CRAFT_PRESETS,
    CRAFTConfigMixin,
    CRAFTSFTConfig,
    auto_configure,
    craft_settings,
    get_preset,
)
from craft.fields import DEFAULT_KEYS
from params.craft import CRAFT_PRESETS as PLAIN_PRESETS
from params.craft import CraftParams

DEFAULTS = {
    "craft_alpha": 0.6,
    "craft_beta": 0.6,
    "craft_beta_mode": "fixed",
    "craft_length_strategy": "oversample",
    "craft_contrastive_batch_size": None,
    "craft_temperature": 0.05,
    "craft_learnable_temperature": False,
    "craft_projection_dim": 256,
    "craft_projection_dropout": 0.0,
    "craft_pooling": "last_token",
    "craft_symmetric": False,
    "craft_use_gradcache": False,
    "craft_gradcache_chunk_size": 4,
    "craft_use_hidden_state_hook": True,
    "craft_negative_strategy": "in_batch",
    "craft_negative_queue_size": 65536,
    "craft_contrastive_keys": dict(DEFAULT_KEYS),
    "craft_assistant_mask_strategy": "auto",
    "craft_assistant_mask_key": "assistant_masks",
    "craft_report_metrics": ["contrastive_accuracy", "representation_consistency"],
    "craft_debug": False,
    "craft_gradient_balancing": "none",
    "craft_gradnorm_alpha": 1.5,
    "craft_loss_scale_momentum": 0.99,
    "craft_balancing_max_ratio": 2.0,
    "craft_gradient_clip_per_task": False,
    "craft_gradient_clip_value": 1.0,
    "craft_allow_packed_contrastive": False,
}
OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "craft_alpha": (-0.1, 1.1, float("nan"), "0.6", True, None),
    "craft_beta": (-0.1, 1.1),
    "craft_beta_mode": ("automatic", 1),
    "craft_length_strategy": ("oversampling", None),
    "craft_contrastive_batch_size": (0, 2.0, "4"),
    "craft_temperature": (0.0, -0.05, float("nan")),
    "craft_learnable_temperature": (1, "yes"),
    "craft_projection_dim": (0, 12.5, True),
    "craft_projection_dropout": (-0.1, 1.0),
    "craft_pooling": ("last", "max"),
    "craft_symmetric": (0,),
    "craft_use_gradcache": ("true",),
    "craft_gradcache_chunk_size": (0, 4.0),
    "craft_use_hidden_state_hook": (None,),
    "craft_negative_strategy": ("in batch", "queued"),
    "craft_negative_queue_size": (0, -1),
    "craft_contrastive_keys": ({"anchor": "input_ids"}, {"anchor_labels": 3}, {"anchor_labels": ""}, None, "x", "[1]"),
    "craft_assistant_mask_strategy": ("labels",),
    "craft_assistant_mask_key": (3,),
    "craft_report_metrics": ("temperature", ["accuracy"], [1], 3),
    "craft_debug": ("no",),
    "craft_gradient_balancing": ("grad_norm",),
    "craft_gradnorm_alpha": (-1,),
    "craft_loss_scale_momentum": (1.0, -0.1),
    "craft_balancing_max_ratio": (0.5, "3"),
    "craft_gradient_clip_per_task": (1,),
    "craft_gradient_clip_value": (0,),
    "craft_allow_packed_contrastive": ("",),
}


def sft_config(**fields: Any) -> Any:
    return CRAFTSFTConfig(output_dir="out", use_cpu=True, report_to=[], **fields)


def own_fields(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in DEFAULTS}


def test_the_fields_and_defaults_are_those_of_the_published_package():
    assert own_fields(CRAFTConfigMixin()) == DEFAULTS
    assert {f.name for f in dataclasses.fields(CRAFTConfigMixin)} == set(DEFAULTS)
    assert own_fields(sft_config()) == DEFAULTS


def test_every_field_has_a_help_text():
    assert all(f.metadata["help"] for f in dataclasses.fields(CRAFTConfigMixin))


@pytest.mark.parametrize("field", OUT_OF_RANGE)
def test_a_value_that_is_not_allowed_is_refused_by_name(field):
    """# failure 20."""
    assert set(OUT_OF_RANGE) == set(DEFAULTS)
    for value in OUT_OF_RANGE[field]:
        with pytest.raises(ValueError, match=f"^{field}=.* (must|has|is not)"):
            CRAFTConfigMixin(**{field: value})


def test_one_message_lists_every_problem_with_a_suggestion():
    wrong = {
        "craft_alpha": 2,
        "craft_pooling": "last_tokn",
        "craft_contrastive_keys": {"anchor_label": "x"},
        "craft_report_metrics": ["temprature"],
    }
    with pytest.raises(ValueError, match="craft_alpha") as caught:
        sft_config(**wrong)
    lines = str(caught.value).splitlines()
    assert [line.partition("=")[0] for line in lines] == list(wrong)
    assert lines[0] == "craft_alpha=2 must be at least 0 and at most 1."
    for line, meant in zip(lines[1:], ("last_token", "anchor_labels", "temperature"), strict=True):
        assert f"did you mean {meant!r}?" in line


def test_fields_that_do_not_go_together_are_refused():
    assert CRAFTConfigMixin(craft_temperature=0.005).craft_temperature == 0.005  # failure 19: fixed, and used as given
    with pytest.raises(ValueError, match=r"at least 0\.01 and at most 1"):
        CRAFTConfigMixin(craft_temperature=0.005, craft_learnable_temperature=True)
    with pytest.raises(ValueError, match="craft_assistant_mask_key must name"):
        CRAFTConfigMixin(craft_assistant_mask_strategy="provided", craft_assistant_mask_key=None)


def test_numbers_become_pythons_and_the_other_spelling_the_first():
    made = CRAFTConfigMixin(
        craft_alpha=np.float32(0.5),
        craft_projection_dim=np.int64(64),
        craft_gradnorm_alpha=1,
        craft_negative_strategy="inbatch",
    )
    assert [type(v) for v in (made.craft_alpha, made.craft_projection_dim, made.craft_gradnorm_alpha)] == [
        float,
        int,
        float,
    ]
    assert made.craft_negative_strategy == "in_batch"


def test_contrastive_keys_read_both_ways_and_are_completed():
    keys = sft_config(craft_contrastive_keys={"anchor_labels": "answers"}).craft_contrastive_keys
    assert keys.anchor_labels == keys["anchor_labels"] == "answers"
    assert keys.positive_input_ids == keys.get("positive_input_ids") == "input_ids_tgt"
    keys.anchor_labels = "labels"
    assert keys["anchor_labels"] == "labels"
    with pytest.raises(AttributeError, match="no role 'anchor_label'"):
        keys.anchor_label = "x"
    with pytest.raises(AttributeError, match="roles: anchor_input_ids"):
        _ = keys.anchor


COPIES = {
    "json": lambda c: CRAFTSFTConfig(**json.loads(c.to_json_string())),
    "to_dict": lambda c: CRAFTSFTConfig(**c.to_dict()),
    "replace": dataclasses.replace,
    "pickle": lambda c: pickle.loads(pickle.dumps(c)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", COPIES)
def test_fields_survive_every_copy(way):
    config = sft_config(craft_alpha=0.3, craft_contrastive_keys={"anchor_labels": "answers"}, craft_pooling="mean")
    found = COPIES[way](config)
    assert own_fields(found) == own_fields(config)
    assert found.craft_contrastive_keys.anchor_labels == "answers"


def test_pickled_arguments_load_where_the_class_has_not_been_made_yet(monkeypatch):
    saved = pickle.dumps(sft_config(craft_alpha=0.3))
    monkeypatch.delitem(vars(craft.config), "CRAFTSFTConfig")
    assert pickle.loads(saved).craft_alpha == 0.3


def test_a_replaced_field_is_checked_again():
    with pytest.raises(ValueError, match="craft_alpha=7"):
        dataclasses.replace(sft_config(), craft_alpha=7)


def test_the_fields_are_options_of_a_script():
    line = "--output_dir out --use_cpu --craft_use_gradcache true --craft_gradcache_chunk_size 8 --craft_beta 0.5"
    line += " --craft_gradient_balancing gradnorm --craft_report_metrics temperature gradient_norm"
    words = [*line.split(), "--craft_contrastive_keys", '{"anchor_labels": "answers"}']
    (config,) = HfArgumentParser(CRAFTSFTConfig).parse_args_into_dataclasses(words)
    assert (config.craft_use_gradcache, config.craft_gradcache_chunk_size, config.craft_beta) == (True, 8, 0.5)
    assert config.craft_contrastive_keys.anchor_labels == "answers"
    assert config.craft_report_metrics == ["temperature", "gradient_norm"]


@dataclasses.dataclass
class PlainArgs(CRAFTConfigMixin, TrainingArguments):
    """Arguments of a plain Trainer."""


def test_settings_are_a_checked_copy_of_any_arguments():
    args = PlainArgs(output_dir="out", use_cpu=True, report_to=[], craft_alpha=0.2)
    assert own_fields(craft_settings(args)) == {**DEFAULTS, "craft_alpha": 0.2}
    assert own_fields(craft_settings(SimpleNamespace(craft_beta=0.3))) == {**DEFAULTS, "craft_beta": 0.3}
    args.craft_alpha = 3
    with pytest.raises(ValueError, match="craft_alpha=3"):
        craft_settings(args)
    with pytest.raises(TypeError, match=r"class Args\(CRAFTConfigMixin, TrainingArguments\)"):
        craft_settings(TrainingArguments(output_dir="out", use_cpu=True, report_to=[]))


TABLE = {
    "minimal": {"alpha": 0.8, "gradient_balancing": "none", "use_gradcache": False, "learnable_temperature": False},
    "balanced": {"alpha": 0.6, "gradient_balancing": "loss_scale", "learnable_temperature": True, "beta_mode": "auto"},
    "memory_efficient": {"use_gradcache": True, "gradcache_chunk_size": 4, "projection_dim": 128},
    "large_batch": {
        "alpha": 0.5,
        "use_gradcache": True,
        "gradcache_chunk_size": 8,
        "negative_strategy": "queue",
        "negative_queue_size": 65536,
    },
    "aggressive": {"alpha": 0.4, "gradient_balancing": "gradnorm", "use_gradcache": True, "negative_queue_size": 32768},
}


@pytest.mark.parametrize("name", TABLE)
def test_presets_are_those_of_the_guide(name):
    made = CRAFTSFTConfig.from_preset(name, output_dir="out", use_cpu=True)
    expected = {f"craft_{key}": value for key, value in TABLE[name].items()}
    assert {key: getattr(made, key) for key in expected} == expected
    assert own_fields(made) == {**DEFAULTS, **CRAFT_PRESETS[name]}
    assert made.output_dir == "out"
    CraftParams(**PLAIN_PRESETS[name])


def test_own_values_replace_those_of_a_preset():
    made = CRAFTSFTConfig.from_preset("memory_efficient", use_cpu=True, craft_alpha=0.7, per_device_train_batch_size=2)
    assert (made.craft_alpha, made.per_device_train_batch_size, made.output_dir) == (0.7, 2, "./outputs")
    assert CRAFTConfigMixin.from_preset("minimal").craft_alpha == 0.8
    get_preset("balanced")["craft_alpha"] = 0.0
    assert get_preset("balanced")["craft_alpha"] == 0.6


def test_an_unknown_preset_is_told_with_the_nearest():
    with pytest.raises(ValueError, match=r"no CRAFT preset 'balance', did you mean 'balanced'\?"):
        CRAFTSFTConfig.from_preset("balance")


def test_the_parameters_of_a_run_have_the_same_defaults_and_ranges():
    hints = get_type_hints(CRAFTConfigMixin, include_extras=True)
    for name, hint in get_type_hints(CraftParams, include_extras=True).items():
        if name in ("enabled", "preset", "pairs"):
            continue
        if name == "pooling":  # of a run: none, which depends on whether there are pairs
            assert CraftParams().pooling is None
            assert hint == hints["craft_pooling"] | None
            continue
        assert getattr(CraftParams(), name) == DEFAULTS[f"craft_{name}"], name
        if name == "negative_strategy":
            # The trainer's takes the published package's other spelling too, and none for data with own negatives.
            assert set(get_args(hint)) == set(get_args(hints[f"craft_{name}"])) - {"inbatch", "none"}
        else:
            assert hint == hints[f"craft_{name}"], name


@pytest.mark.parametrize(("width", "projection"), [(32, 64), (512, 128), (4096, 256)])
def test_auto_takes_a_quarter_of_the_width(tiny_llama, width, projection):
    tiny_llama.config.hidden_size = width
    assert auto_configure(tiny_llama, available_memory_gb=80)["craft_projection_dim"] == projection


def test_auto_finds_the_width_of_image_models_and_wrapped_ones(tiny_llama):
    from peft import LoraConfig, get_peft_model
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration, Cohere2Config, SiglipVisionConfig

    text = Cohere2Config(
        vocab_size=99,
        hidden_size=320,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    vision = SiglipVisionConfig(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    vlm = AyaVisionForConditionalGeneration(
        AyaVisionConfig(vision_config=vision, text_config=text, image_token_index=98)
    )
    assert auto_configure(vlm, available_memory_gb=80)["craft_projection_dim"] == 80
    tiny_llama.config.hidden_size = 400
    adapted = get_peft_model(tiny_llama, LoraConfig(r=1, target_modules=["q_proj"]))
    wrapped = torch.nn.DataParallel(adapted)
    assert auto_configure(adapted, available_memory_gb=80)["craft_projection_dim"] == 100
    assert auto_configure(wrapped, available_memory_gb=80)["craft_projection_dim"] == 100


@pytest.mark.parametrize(("sft", "pairs", "beta"), [(60, 40, 0.6), (1, 99, 0.3), (99, 1, 0.8), (50, None, 0.5)])
def test_auto_takes_beta_from_the_sizes(sft, pairs, beta):
    found = auto_configure(None, range(sft), None if pairs is None else range(pairs), 80)
    assert found["craft_beta"] == pytest.approx(beta)


def test_auto_leaves_beta_where_a_data_set_has_no_length():
    assert "craft_beta" not in auto_configure(None, iter([1]), range(9), 80)
    assert "craft_beta" not in auto_configure(None, None, range(9), 80)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (80, {**get_preset("balanced")}),
        (24, {**get_preset("balanced")}),
        (23.9, {**get_preset("balanced"), "craft_use_gradcache": True, "craft_gradcache_chunk_size": 4}),
        (
            15.9,
            {
                **get_preset("balanced"),
                "craft_use_gradcache": True,
                "craft_gradcache_chunk_size": 2,
                "craft_projection_dim": 128,
            },
        ),
    ],
)
def test_auto_saves_memory_where_there_is_little(memory, expected):
    assert auto_configure(available_memory_gb=memory) == expected


def test_auto_measures_the_memory_when_it_is_not_given(monkeypatch):
    import psutil

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8e9))
    assert auto_configure()["craft_gradcache_chunk_size"] == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * 10**9, 48 * 10**9))
    assert auto_configure()["craft_gradcache_chunk_size"] == 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40 * 10**9, 48 * 10**9))
    assert "craft_use_gradcache" not in auto_configure()
    with pytest.raises(ValueError, match="available_memory_gb=0 must be above 0"):
        auto_configure(available_memory_gb=0)


@pytest.mark.parametrize(("rows", "queue"), [(100_000, None), (100_001, 50_000), (10**6, 65536)])
def test_auto_takes_a_queue_for_many_pairs(rows, queue):
    found = auto_configure(None, range(10), range(rows), 80)
    assert found.get("craft_negative_queue_size") == queue
    assert found.get("craft_negative_strategy") == (None if queue is None else "queue")


def test_auto_makes_arguments_and_takes_overrides(tiny_llama):
    config = CRAFTSFTConfig.auto(
        output_dir="out",
        model=tiny_llama,
        sft_dataset=range(30),
        contrastive_dataset=range(10),
        available_memory_gb=10,
        use_cpu=True,
        craft_gradient_balancing="gradnorm",
        num_train_epochs=5,
    )
    assert (config.craft_beta, config.craft_projection_dim, config.craft_gradcache_chunk_size) == (0.75, 64, 2)
    assert (config.craft_gradient_balancing, config.num_train_epochs) == ("gradnorm", 5)


def test_the_other_trainers_arguments_have_the_fields_too():
    for name in ("CRAFTDPOConfig", "CRAFTGRPOConfig", "CRAFTORPOConfig"):
        made = getattr(craft, name).from_preset("minimal", use_cpu=True, report_to=[])
        assert made.craft_alpha == 0.8
        assert type(made).__mro__[2].__name__ == name.removeprefix("CRAFT")


def test_a_missing_trl_is_told_where_it_is_needed(monkeypatch):
    """# failure 23."""
    monkeypatch.delitem(vars(craft.config), "CRAFTORPOConfig", raising=False)
    monkeypatch.setitem(sys.modules, "trl.experimental.orpo", None)
    with pytest.raises(ImportError, match=r"CRAFTORPOConfig needs trl.experimental.orpo.ORPOConfig of TRL 1.16"):
        _ = craft.config.CRAFTORPOConfig
