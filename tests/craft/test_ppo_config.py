"""PPOConfig: defaults, and every value that it refuses."""

import pytest
from transformers import HfArgumentParser

import craft
from craft.ppo.config import PPOConfig


def make(tmp_path, **values):
    return PPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **values)


def test_the_defaults_are_those_of_the_former_trainer(tmp_path):
    args = make(tmp_path)
    assert (args.num_ppo_epochs, args.gamma, args.lam, args.vf_coef) == (4, 1.0, 0.95, 0.1)
    assert (args.cliprange, args.cliprange_value, args.kl_coef, args.kl_estimator) == (0.2, 0.2, 0.05, "k1")
    assert args.whiten_advantages
    assert not args.whiten_rewards


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("num_ppo_epochs", 0, "at least 1"),
        ("gamma", 1.5, "at least 0 and at most 1"),
        ("lam", -0.1, "at least 0 and at most 1"),
        ("cliprange", 0.0, "above 0"),
        ("cliprange_value", -1.0, "above 0"),
        ("vf_coef", -0.1, "at least 0"),
        ("kl_coef", float("nan"), "at least 0"),
        ("kl_estimator", "k2", "must be one of k1, k3"),
        ("whiten_rewards", "yes", "True or False"),
        ("max_completion_length", 2.5, "a whole number"),
        ("temperature", 0, "above 0"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_k", -1, "at least 0"),
        ("missing_eos_penalty", -1.0, "at least 0"),
        ("value_head_learning_rate", 0.0, "above 0"),
        ("reward_weights", [1.0, float("nan")], "a list of finite numbers"),
        ("reward_weights", 2.0, "a list of finite numbers"),
        ("train_sampling_strategy", "group_by_length", "random or sequential"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(field, value, allowed, tmp_path):
    with pytest.raises(ValueError, match=f"{field}=.*{allowed}"):
        make(tmp_path, **{field: value})


def test_the_best_checkpoint_is_that_of_the_highest_reward(tmp_path):
    args = make(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=5, save_steps=5)
    assert (args.metric_for_best_model, args.greater_is_better) == ("reward", True)


def test_a_command_line_gives_every_field(tmp_path):
    line = ["--output_dir", str(tmp_path), "--use_cpu", "True", "--kl_coef", "0.2", "--reward_weights", "1", "0.5"]
    line += ["--missing_eos_penalty", "1", "--whiten_rewards", "--model_init_kwargs", '{"dtype": "float32"}']
    (args,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(line)
    assert (args.kl_coef, args.reward_weights, args.missing_eos_penalty) == (0.2, [1.0, 0.5], 1.0)
    assert args.whiten_rewards
    assert args.model_init_kwargs == {"dtype": "float32"}


def test_the_config_of_craft_has_both_kinds_of_fields_and_checks_both(tmp_path):
    args = craft.CRAFTPPOConfig(output_dir=str(tmp_path), use_cpu=True, craft_alpha=0.7, cliprange=0.1)
    assert (args.craft_alpha, args.cliprange, args.num_ppo_epochs) == (0.7, 0.1, 4)
    for wrong in ({"craft_alpha": 2.0}, {"cliprange": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            craft.CRAFTPPOConfig(output_dir=str(tmp_path), use_cpu=True, **wrong)
