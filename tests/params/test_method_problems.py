import dataclasses
from pathlib import Path

import pytest

from params import PreferenceParams, RLParams, UserError
from params.check import SECTIONS
from params.craft import CRAFT_PRESETS
from params.describe import describe_field
from params.methods import ONE_METHOD, PREFERENCE_METHODS, RL_METHODS
from params.presets import DEMO_LANGUAGES, METHOD, METHOD_DEMO, METHODS, MODEL_NAMES, TRAINING_MODES
from params.resolve import dump_yaml, load_params, resolve_train


def message(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        resolve_train(*args, **kwargs)
    return str(caught.value)


SAMPLE = {"data": "sample"}  # its rows are captions, preferences and prompts


def test_without_a_word_a_run_fine_tunes_on_captions():
    params = resolve_train("aya")
    assert (params.method, params.output_dir, params.task) == ("sft", "outputs/aya_basic", "aya_basic")
    assert (params.preference, params.rl) == (PreferenceParams(), RLParams())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("demo", [False, True])
def test_every_method_resolves_for_every_family_and_mode_without_further_flags(method, demo):
    for model in MODEL_NAMES:
        for mode in TRAINING_MODES:
            params = resolve_train(model, training_mode=mode, method=method, demo=demo, flags=SAMPLE)
            assert params.method == method
            assert params.sft.best_metric == ("reward" if method in RL_METHODS else "loss")


def test_every_run_has_a_directory_and_a_log_of_its_own():
    runs = [
        resolve_train(model, training_mode=mode, method=method, demo=demo, flags=SAMPLE)
        for model in MODEL_NAMES
        for mode in TRAINING_MODES
        for method in METHODS
        for demo in (False, True)
    ]
    for names in ({run.output_dir for run in runs}, {run.best_model_dir for run in runs}, {run.task for run in runs}):
        assert len(names) == len(runs)
    dpo = resolve_train("llama32", training_mode="advanced", method="dpo", demo=True)
    assert dpo.output_dir == "outputs/llama32_advanced_dpo_demo"
    assert dpo.best_model_dir == "outputs/llama32_advanced_dpo_demo/best"
    assert dpo.task == "llama32_advanced_dpo_demo"


def test_a_method_brings_its_own_numbers_and_the_user_s_win():
    sft, dpo, ppo = (resolve_train("llama32", method=method, flags=SAMPLE) for method in ("sft", "dpo", "ppo"))
    assert dpo.sft.lr < sft.sft.lr
    assert (ppo.rl.kl_coef, ppo.rl.num_iterations) == (0.05, 4)
    assert resolve_train("llama32", method="grpo").rl.kl_coef == 0
    own = resolve_train("llama32", method="ppo", overrides=["rl.kl_coef=0", "sft.lr=2e-5"])
    assert (own.rl.kl_coef, own.sft.lr) == (0, 2e-5)


def test_a_demo_s_numbers_stand_above_those_of_the_method():
    for (model, method), sections in METHOD_DEMO.items():
        params = resolve_train(model, method=method, demo=True)
        for section, fields in sections.items():
            for name, value in fields.items():
                assert getattr(getattr(params, section), name) == value


def test_every_table_of_methods_names_methods_and_existing_fields():
    assert set(METHOD) == set(METHODS) == set(DEMO_LANGUAGES)
    assert {key[1] for key in METHOD_DEMO} <= set(METHODS)
    for values in [*METHOD.values(), *METHOD_DEMO.values()]:
        for section, fields in values.items():
            assert set(fields) <= {field.name for field in dataclasses.fields(SECTIONS[section])}
    known = {f"{section}.{f.name}" for section in ("preference", "rl") for f in dataclasses.fields(SECTIONS[section])}
    assert set(ONE_METHOD) <= known
    assert set(ONE_METHOD.values()) <= {*PREFERENCE_METHODS, *RL_METHODS}


def test_the_file_may_name_the_method_and_the_command_line_may_not_contradict_it(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("method: grpo\nrl:\n  rewards: [chrf, length]\n  reward_weights: [1, 0.5]\n", encoding="utf-8")
    params = resolve_train("text", config_file=file)
    assert (params.method, params.rl.rewards, params.rl.reward_weights) == ("grpo", ("chrf", "length"), (1.0, 0.5))
    assert "method is grpo, but the command line says dpo" in message("text", method="dpo", config_file=file)
    assert "unknown method 'drpo'; did you mean" in message("text", method="drpo")
    assert "say it on the command line instead" in message("text", overrides=["method=dpo"])


def test_a_resolved_run_reads_back_with_its_method(tmp_path: Path):
    params = resolve_train("text", method="ppo", overrides=["rl.rewards=exact,my.module:fn", "rl.reward_weights=2,1"])
    path = tmp_path / "params.yaml"
    path.write_text(dump_yaml(params), encoding="utf-8")
    assert load_params(path) == params


@pytest.mark.parametrize(
    ("method", "overrides", "complaint"),
    [
        ("sft", ["preference.dpo_beta=0.2"], "preference.dpo_beta has no effect with --method sft: add --method dpo"),
        ("sft", ["rl.temperature=0.7"], "add --method grpo or --method ppo, or leave it out"),
        ("dpo", ["preference.orpo_beta=0.2"], "no effect with --method dpo: add --method orpo"),
        ("orpo", ["preference.dpo_loss_type=ipo"], "no effect with --method orpo: add --method dpo"),
        ("dpo", ["rl.rewards=exact"], "rl.rewards has no effect with --method dpo"),
        ("grpo", ["rl.gamma=0.9"], "rl.gamma has no effect with --method grpo: add --method ppo"),
        ("ppo", ["rl.num_generations=4"], "rl.num_generations has no effect with --method ppo: add --method grpo"),
        ("dpo", ["sft.best_metric=reward"], "--method dpo rewards none: set loss"),
        ("grpo", ["sft.best_metric=loss"], "set reward, or leave --best-metric out"),
        ("dpo", ["preference.label_smoothing=0.1"], "set robust or exo_pair"),
        ("dpo", ["preference.dpo_loss_type=exo_pair"], "set 0.001"),
        ("dpo", ["preference.label_smoothing=0.5"], "below 0.5"),
        ("dpo", ["preference.dpo_beta=0"], "above 0"),
        ("grpo", ["rl.rewards=[]"], "name at least one reward function"),
        ("grpo", ["rl.rewards=chrf,chrf"], "names a function twice"),
        ("grpo", ["rl.reward_weights=1,2"], "has 2 numbers, but rl.rewards names 1 functions (chrf)"),
        ("grpo", ["rl.reward_weights=0"], "all 0"),
        ("grpo", ["rl.reward_weights=inf"], "finite"),
        ("grpo", ["rl.num_generations=1"], "at least 2"),
        ("grpo", ["rl.num_generations=5"], "does not divide the 16 rows of an optimizer step"),
        ("grpo", ["rl.num_generations=5"], "or lower the generations to 4"),
        ("ppo", ["rl.max_completion_length=4096"], "leaves no token for the prompt"),
        ("ppo", ["rl.top_p=0"], "above 0"),
        ("sft", ["data.columns.rejected=worse"], "data.columns.rejected has no effect with --method sft"),
        ("ppo", ["data.columns.chosen=best"], "--method ppo, which reads data.columns.caption"),
        ("sft", ["data.columns.prompt=question"], "data.columns.prompt has no effect with --method sft"),
    ],
)
def test_what_a_method_would_ignore_or_choke_on_is_refused_with_its_remedy(method, overrides, complaint):
    assert complaint in message("aya", method=method, overrides=overrides, flags=SAMPLE)


@pytest.mark.parametrize("setting", ["craft.beta=0.4", "craft.beta_mode=auto", "craft.length_strategy=cap"])
def test_what_orders_batches_of_pairs_has_no_effect_where_each_batch_has_its_own(setting):
    flags = {"craft_pairs": "translations", **SAMPLE}
    many = ["sft.per_device_train_batch_size=4"]
    name = setting.partition("=")[0]
    assert f"{name} has no effect with --method dpo" in message(
        "aya", method="dpo", overrides=[setting, *many], flags=flags
    )
    resolve_train("aya", overrides=[setting, *many], flags=flags)
    preset = {**flags, "craft_preset": "balanced"}  # a preset's own values are no setting of the user's
    resolve_train("aya", method="dpo", overrides=many, flags=preset)


def test_preferences_are_not_looked_for_where_there_are_none():
    assert "MUNIChus has captions only: name a data set with --data" in message("aya", method="dpo")
    assert "--method orpo needs" in message("aya", method="orpo", flags={"data": "munichus"})
    own = ["data.dataset_id=me/munichus-preferences"]
    assert resolve_train("aya", method="dpo", overrides=own).data.dataset_id == "me/munichus-preferences"
    assert resolve_train("aya", method="grpo").data.data is None


def test_rows_of_all_processes_count_as_rows_of_a_step(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert resolve_train("aya", method="grpo", overrides=["rl.num_generations=12"]).rl.num_generations == 12
    assert "48 rows of an optimizer step" in message("aya", method="grpo", overrides=["rl.num_generations=5"])


def test_a_run_by_reward_may_keep_its_last_step():
    unchosen = ["sft.load_best_model_at_end=no", "sft.early_stopping_patience=0"]
    assert resolve_train("aya", method="grpo", overrides=unchosen).sft.best_metric == "reward"


def test_every_field_of_the_new_sections_is_told_with_its_meaning():
    for section in ("preference", "rl"):
        for field in dataclasses.fields(SECTIONS[section]):
            assert describe_field(f"{section}.{field.name}").help
    assert describe_field("rl.reward_weights").type == "list of number"


@pytest.mark.parametrize("method", RL_METHODS)
@pytest.mark.parametrize(
    ("flags", "overrides"),
    [
        ({"craft_preset": "aggressive"}, []),
        ({"craft": True}, ["craft.gradient_balancing=gradnorm"]),
        ({"craft": True}, ["craft.gradient_balancing=uncertainty"]),
    ],
)
def test_losses_around_zero_are_not_weighed_by_their_size(method, flags, overrides):
    many = ["sft.per_device_train_batch_size=8", *overrides]
    said = message("aya", method=method, overrides=many, flags=flags)
    assert "weighs losses by their size" in said
    assert "add --set craft.gradient_balancing=pcgrad" in said
    assert ("--craft-preset aggressive" in said) == ("craft_preset" in flags)
    mended = [*many, "craft.gradient_balancing=pcgrad"]
    assert resolve_train("aya", method=method, overrides=mended, flags=flags).craft.gradient_balancing == "pcgrad"
    if not overrides:
        assert resolve_train("aya", method="dpo", overrides=many, flags={**flags, **SAMPLE}).craft.enabled


@pytest.mark.parametrize("preset", [name for name in CRAFT_PRESETS if name != "aggressive"])
@pytest.mark.parametrize("method", RL_METHODS)
def test_every_other_preset_of_craft_goes_with_rewards(method, preset):
    assert resolve_train("aya", method=method, demo=True, flags={"craft_preset": preset}).craft.enabled


def test_answers_to_one_prompt_are_no_negatives_of_each_other(monkeypatch):
    one_prompt = [
        "sft.per_device_train_batch_size=4",
        "sft.gradient_accumulation_steps=2",
        "rl.num_generations=8",
        "rl.rewards=length",
    ]
    said = message("aya", method="grpo", overrides=one_prompt, flags={"craft": True})
    assert "the 8 answers of an optimizer step are all to one prompt (rl.num_generations=8)" in said
    for more in ("rl.num_generations=4", "sft.gradient_accumulation_steps=4", "craft.negative_strategy=queue"):
        assert resolve_train("aya", method="grpo", overrides=[*one_prompt, more], flags={"craft": True}).craft.enabled
    pairs = {"craft_pairs": "translations"}
    assert resolve_train("aya", method="grpo", overrides=one_prompt, flags=pairs).craft.enabled
    assert resolve_train("aya", method="grpo", overrides=one_prompt).method == "grpo"
    assert resolve_train("aya", method="ppo", overrides=[*one_prompt[:2]], flags={"craft": True}).craft.enabled
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resolve_train("aya", method="grpo", overrides=one_prompt, flags={"craft": True}).craft.enabled


def test_a_flag_that_nothing_reads_is_told_even_at_its_default(tmp_path):
    told = "rl.rewards has no effect with --method dpo: add --method grpo or --method ppo, or leave it out"
    assert told in message("aya", method="dpo", flags={"rewards": "chrf", **SAMPLE})
    assert told in message("aya", method="dpo", overrides=["rl.rewards=chrf"], flags=SAMPLE)
    file = tmp_path / "params.yaml"  # a saved run names every field
    file.write_text(dump_yaml(resolve_train("aya", method="dpo", flags=SAMPLE)), encoding="utf-8")
    assert resolve_train("aya", config_file=file).method == "dpo"


@pytest.mark.parametrize("flags", [{"craft": True}, {"craft_pairs": "translations"}])
@pytest.mark.parametrize(
    "overrides", [["craft.beta=0.3"], ["craft.beta=0"], ["craft.beta=0.3", "craft.beta_mode=auto"]]
)
def test_an_order_of_batches_that_there_is_not_is_one_mistake_each(flags, overrides):
    many = ["sft.per_device_train_batch_size=4", *overrides]
    said = message("aya", method="dpo", overrides=many, flags={**flags, **SAMPLE})
    assert said.count("no effect with --method dpo") == len(overrides)
    assert "craft-pairs" not in said
    assert "errors in the parameters" not in said or f"{len(overrides)} errors" in said
