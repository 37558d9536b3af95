"""The section `craft` of `inft train`: presets, switches, and what is refused before anything is loaded."""

from dataclasses import asdict

import pytest

from params import CraftParams, UserError
from params.craft import CRAFT_PRESETS
from params.resolve import dump_yaml, load_params, resolve_train

ROWS = "sft.per_device_train_batch_size=8"  # a batch has negatives


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def resolved(*overrides, model="llama32", config_file=None, **flags):
    return resolve_train(model, overrides=[ROWS, *overrides], config_file=config_file, flags=flags).craft


def message(*overrides, **flags):
    with pytest.raises(UserError) as error:
        resolved(*overrides, **flags)
    return str(error.value)


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_without_a_word_craft_is_off_and_a_switch_turns_it_on():
    assert resolved() == CraftParams()
    assert not CraftParams().enabled
    assert resolved(craft=True) == CraftParams(enabled=True)
    assert resolved(craft=True, craft_pairs="translations").pairs == "translations"
    assert resolved(craft_pairs="translations") == CraftParams(enabled=True, pairs="translations")


@pytest.mark.parametrize("name", CRAFT_PRESETS)
def test_a_preset_turns_craft_on_with_its_values(name):
    for craft in (resolved(craft_preset=name), resolved(f"craft.preset={name}")):
        assert craft == CraftParams(enabled=True, preset=name, **CRAFT_PRESETS[name])


def test_yaml_and_set_win_over_the_preset_and_the_preset_over_the_demo(config):
    file = config("craft:\n  alpha: 0.7\n  temperature: 0.2\n")
    craft = resolved("craft.temperature=0.1", config_file=file, craft_preset="aggressive")
    assert (craft.alpha, craft.temperature, craft.gradient_balancing) == (0.7, 0.1, "gradnorm")
    demo = resolve_train("aya", demo=True, flags={"craft_preset": "minimal"})
    assert (demo.craft.alpha, demo.sft.per_device_train_batch_size) == (0.8, 16)


def test_a_preset_in_a_file_turns_craft_on_and_one_on_the_command_line_replaces_it(config):
    file = config("craft: {preset: balanced}\n")
    assert resolved(config_file=file) == CraftParams(enabled=True, preset="balanced", **CRAFT_PRESETS["balanced"])
    assert resolved(config_file=file, craft_preset="minimal").gradient_balancing == "none"
    off = config("craft: {enabled: false}\n")
    assert resolved(config_file=off, craft_preset="minimal").enabled
    assert resolved(config_file=off, craft_pairs="translations").enabled


def test_pairs_in_a_file_do_not_turn_craft_on(config):
    file = config("craft: {pairs: translations}\n")
    assert "craft.pairs has no effect without CRAFT" in message(config_file=file)
    assert resolved(config_file=file, craft=True).pairs == "translations"
    assert resolved(config_file=file, craft_pairs="") == CraftParams()


def test_no_craft_puts_aside_what_a_file_says_of_it(config):
    file = config("craft:\n  preset: large_batch\n  alpha: 0.3\n  pairs: translations\n")
    assert resolved(config_file=file, craft=False) == CraftParams()


@pytest.mark.parametrize(
    ("overrides", "flags", "option"),
    [
        ((), {"craft_preset": "balanced"}, "--craft-preset"),
        ((), {"craft_pairs": "translations"}, "--craft-pairs"),
        (("craft.alpha=0.5",), {}, "--set craft.alpha"),
    ],
)
def test_no_craft_contradicts_settings_of_craft_on_the_same_line(overrides, flags, option):
    assert f"{option} and --no-craft contradict each other" in message(*overrides, craft=False, **flags)


def test_an_unknown_key_below_craft_is_told_even_under_no_craft(config):
    assert "did you mean craft.alpha?" in message(config_file=config("craft: {alpa: 1}\n"), craft=False)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("alpha=-0.1", "craft.alpha must be at least 0 and at most 1, got -0.1"),
        ("alpha=1.1", "at most 1"),
        ("beta=2", "at most 1"),
        ("beta_mode=some", "'fixed' or 'auto', got 'some'"),
        ("length_strategy=loop", "'oversample', 'cap', 'auto_beta' or 'error'"),
        ("contrastive_batch_size=0", "at least 1"),
        ("temperature=0", "above 0"),
        ("learnable_temperature=maybe", "valid boolean"),
        ("projection_dim=0", "at least 1"),
        ("projection_dropout=1", "below 1"),
        ("pooling=max", "'last_token'"),
        ("symmetric=2", "valid boolean"),
        ("use_gradcache=x", "valid boolean"),
        ("gradcache_chunk_size=0", "at least 1"),
        ("negative_strategy=hard", "should be 'in_batch' or 'queue', got 'hard'"),
        ("negative_strategy=none", "should be 'in_batch' or 'queue', got 'none'"),
        ("negative_queue_size=0", "at least 1"),
        ("gradient_balancing=mgda", "'pcgrad'"),
        ("gradnorm_alpha=-1", "at least 0"),
        ("loss_scale_momentum=1", "below 1"),
        ("gradient_clip_per_task=x", "valid boolean"),
        ("gradient_clip_value=0", "above 0"),
        ("preset=ballanced", "craft.preset should be 'minimal', 'balanced'"),
        ("enabled=x", "valid boolean"),
        ("alhpa=0.5", "did you mean craft.alpha"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(override, complaint):
    assert complaint in message(f"craft.{override}")


@pytest.mark.parametrize(
    ("overrides", "flags", "complaint"),
    [
        (("craft.alpha=0.5",), {}, "craft.alpha has no effect without CRAFT: add --craft"),
        (("craft.enabled=false", "craft.preset=minimal"), {}, "craft.preset has no effect without CRAFT"),
        (("craft.pairs=translations",), {}, "craft.pairs has no effect without CRAFT: add --craft"),
        (("craft.alpha=1",), {"craft": True}, "--no-craft"),
        (("craft.pooling=cls",), {"craft": True}, "set last_token, mean or weighted_mean"),
        (("craft.beta=0.5",), {"craft": True}, "craft.beta is read with pairs only"),
        (("craft.use_gradcache=true",), {"craft": True}, "add --craft-pairs translations"),
        (("craft.negative_queue_size=9",), {"craft": True}, "no effect without craft.negative_strategy=queue"),
        (("craft.gradnorm_alpha=1",), {"craft": True}, "no effect without craft.gradient_balancing=gradnorm"),
        (("craft.loss_scale_momentum=0.5",), {"craft": True}, "no effect without craft.gradient_balancing=loss_scale"),
        (("craft.gradient_clip_value=2",), {"craft": True}, "no effect without craft.gradient_clip_per_task=true"),
        (("craft.beta=1",), {"craft": True, "craft_pairs": "translations"}, "no micro-batch for the pairs"),
        (
            ("craft.beta=0.5",),
            {"craft_preset": "balanced", "craft_pairs": "translations"},
            "set craft.beta_mode=fixed too",
        ),
        (("craft.temperature=2",), {"craft_preset": "balanced"}, "must be at least 0.01 and at most 1"),
        (("craft.temperature=2",), {"craft_preset": "balanced"}, "craft.learnable_temperature=false"),
    ],
)
def test_settings_that_a_run_would_ignore_are_refused_with_the_remedy(overrides, flags, complaint):
    assert complaint in message(*overrides, **flags)


def test_a_presets_own_values_for_pairs_are_no_mistake_without_pairs():
    assert resolved(craft_preset="memory_efficient").use_gradcache
    craft = resolved("craft.use_gradcache=false", craft_preset="memory_efficient")
    assert not craft.use_gradcache


def test_a_batch_of_one_row_has_no_negatives(monkeypatch):
    one = "sft.per_device_train_batch_size=1"
    told = message(one, craft=True)
    assert "sft.per_device_train_batch_size=1" in told
    assert "craft.negative_strategy=queue" in told
    assert resolved(one, "craft.negative_strategy=queue", craft=True).enabled
    pairs = {"craft": True, "craft_pairs": "translations"}
    assert "craft.contrastive_batch_size=1" in message("craft.contrastive_batch_size=1", **pairs)
    assert resolved(one, "craft.contrastive_batch_size=4", **pairs).enabled
    monkeypatch.setenv("WORLD_SIZE", "2")  # the rows of the other process are negatives
    assert resolved(one, craft=True).enabled


@pytest.mark.parametrize("flags", [{}, {"craft": True}, {"craft_preset": "large_batch", "craft_pairs": "hub:a/b"}])
def test_saved_parameters_start_the_same_run(tmp_path, flags):
    params = resolve_train("aya", overrides=[ROWS], flags=flags)
    path = tmp_path / "params.yaml"
    path.write_text(dump_yaml(params), encoding="utf-8")
    assert load_params(path) == params
    assert resolve_train("aya", config_file=path) == params


def test_a_file_saved_before_there_was_craft_still_loads(tmp_path):
    params = resolve_train("text")
    path = tmp_path / "params.yaml"
    text, _, _ = dump_yaml(params).partition("craft:")
    path.write_text(text, encoding="utf-8")
    assert load_params(path).craft == CraftParams()


def test_every_preset_can_be_started_on_every_demo():
    for name, values in CRAFT_PRESETS.items():
        for pairs in ({}, {"craft_pairs": "translations"}):
            params = resolve_train("llama32", demo=True, flags={"craft_preset": name, **pairs})
            assert asdict(params.craft).items() >= dict(values).items()
