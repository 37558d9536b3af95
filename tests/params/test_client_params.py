"""A client's configuration: as the guide writes it, strict, and the same after a round trip."""

import json

import pytest

from params.client import DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig
from params.client_resolve import as_mapping, training_config
from params.errors import UserError

GUIDE = {
    "model_ref": "meta-llama/Llama-3-8B",
    "lora_config": {"rank": 16, "alpha": 32.0, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
    "optimizer": {"name": "adamw", "learning_rate": 1e-4, "weight_decay": 0.01},
    "batch_size": 8,
}


def test_the_guides_configuration_and_its_defaults():
    config = training_config(GUIDE)
    assert config.lora == LoRAConfig(target_modules=("q_proj", "v_proj"))
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.bias) == (16, 32.0, 0.05, "none")
    assert (config.optimizer.betas, config.optimizer.eps) == ((0.9, 0.999), 1e-8)
    assert (config.batch_size, config.gradient_accumulation_steps, config.max_steps) == (8, 1, None)
    assert config.dp is None


def test_a_configuration_survives_json():
    config = training_config(GUIDE | {"dp_config": {"dataset_size": 100, "noise_multiplier": 1}, "max_steps": 7})
    assert training_config(json.loads(json.dumps(as_mapping(config)))) == config
    assert training_config(config) == config


def test_without_lora_config_the_defaults_hold():
    assert training_config({"model_ref": "x", "lora_config": None}).lora == LoRAConfig()


def test_dp_config_that_is_not_enabled_is_none():
    assert TrainingConfig(model_ref="x", dp_config=DPConfig(dataset_size=10, enabled=False)).dp is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_ref": None}, "model_ref"),
        ({"lora_config": {"r": 8}}, "lora_config.r is not a parameter"),
        ({"lora_config": {"bias": "all"}}, "lora_config.bias"),
        ({"lora_config": {"target_modules": []}}, "target_modules is empty"),
        ({"lora_config": 3}, "lora_config is 3: give a mapping"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas"),
        ({"optimizer": {"name": "sgd", "eps": 1e-6}}, "do nothing with sgd"),
        ({"optimizer": {"learning_rate": float("nan")}}, "learning_rate"),
        ({"batch_sise": 4}, "batch_sise is not a parameter; did you mean batch_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"dp_config": {}}, "dataset_size is missing"),
        ({"dp_config": {"dataset_size": 100}}, "max_steps is needed"),
        ({"dp_config": {"dataset_size": 100, "target_epsilon": None}}, "neither noise_multiplier nor target_epsilon"),
        ({"dp_config": {"dataset_size": 4, "noise_multiplier": 1}}, "more than dp_config.dataset_size"),
        ({"dp_config": {"dataset_size": 100, "noise_multiplier": 1, "target_delta": 0}}, "target_delta"),
        (
            {"dp_config": {"dataset_size": 100, "noise_multiplier": 1}, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps is 1 with dp_config",
        ),
        (
            {"dp_config": {"dataset_size": 100, "noise_multiplier": 1}, "optimizer": {"max_grad_norm": 1.0}},
            "not for private clients",
        ),
    ],
)
def test_what_is_wrong_is_named(change, told):
    with pytest.raises(UserError, match=told):
        training_config(GUIDE | change)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(UserError) as caught:
        training_config({"lora_config": {"rank": 0}, "batch_size": "many"})
    assert all(name in str(caught.value) for name in ("lora_config.rank", "batch_size", "model_ref"))


def test_the_default_optimizer_is_the_guides():
    assert OptimizerConfig() == OptimizerConfig(name="adamw", learning_rate=1e-4, weight_decay=0.01)
