"""Every flag of the guide parses and arrives; what is misspelt, refused or never read is told."""

import shlex
from dataclasses import fields
from importlib.util import find_spec

import pytest
from craft_parser import make_parser, parse
from run_resume import refuse_other_flags, write_run_file

from craft.config import CRAFTConfigMixin
from craft.presets import CRAFT_PRESETS, get_preset
from params.errors import UserError

NEEDED = ["--model_name_or_path", "model", "--sft_data", "rows.jsonl", "--output_dir", "out"]

# Section 12 of the guide, and the other memory and balance options that it names.
GUIDE = {
    "--craft_use_hidden_state_hook true": True,
    "--craft_use_gradcache true": True,
    "--craft_gradcache_chunk_size 4": 4,
    "--craft_learnable_temperature true": True,
    "--craft_projection_dim 256": 256,
    "--craft_projection_dropout 0.1": 0.1,
    "--craft_gradient_balancing loss_scale": "loss_scale",
    "--craft_gradient_balancing gradnorm": "gradnorm",
    "--craft_loss_scale_momentum 0.99": 0.99,
    "--craft_gradnorm_alpha 1.5": 1.5,
    "--craft_negative_strategy queue": "queue",
    "--craft_negative_queue_size 1024": 1024,
    "--craft_gradient_clip_per_task true": True,
    "--craft_gradient_clip_value 0.5": 0.5,
}

# A value of every field that is not its default.
OTHERS = {
    "craft_alpha": ("0.7", 0.7),
    "craft_beta": ("0.25", 0.25),
    "craft_beta_mode": ("auto", "auto"),
    "craft_length_strategy": ("cap", "cap"),
    "craft_contrastive_batch_size": ("6", 6),
    "craft_temperature": ("0.1", 0.1),
    "craft_learnable_temperature": ("true", True),
    "craft_projection_dim": ("64", 64),
    "craft_projection_dropout": ("0.2", 0.2),
    "craft_pooling": ("mean", "mean"),
    "craft_symmetric": ("true", True),
    "craft_use_gradcache": ("true", True),
    "craft_gradcache_chunk_size": ("2", 2),
    "craft_use_hidden_state_hook": ("false", False),
    "craft_negative_strategy": ("queue", "queue"),
    "craft_negative_queue_size": ("99", 99),
    "craft_contrastive_keys": ('\'{"anchor_labels": "mine"}\'', {"anchor_labels": "mine"}),
    "craft_assistant_mask_strategy": ("none", "none"),
    "craft_assistant_mask_key": ("none", None),
    "craft_report_metrics": ("temperature gradient_norm", ["temperature", "gradient_norm"]),
    "craft_debug": ("true", True),
    "craft_gradient_balancing": ("pcgrad", "pcgrad"),
    "craft_gradnorm_alpha": ("0.5", 0.5),
    "craft_loss_scale_momentum": ("0.9", 0.9),
    "craft_balancing_max_ratio": ("none", None),
    "craft_gradient_clip_per_task": ("true", True),
    "craft_gradient_clip_value": ("2.5", 2.5),
    "craft_allow_packed_contrastive": ("true", True),
}


def parsed(flags: str = ""):
    return parse([*NEEDED, *shlex.split(flags)])


@pytest.mark.parametrize("flag", GUIDE)
def test_a_flag_of_the_guide_arrives(flag):
    name = flag.split()[0].removeprefix("--")
    assert getattr(parsed(flag).training, name) == GUIDE[flag]


def test_every_craft_field_is_a_flag():
    assert OTHERS.keys() == {f.name for f in fields(CRAFTConfigMixin)}
    arguments, defaults = parsed(" ".join(f"--{name} {word}" for name, (word, _) in OTHERS.items())), parsed()
    for name, (_, value) in OTHERS.items():
        found = getattr(arguments.training, name)
        assert found != getattr(defaults.training, name), name
        assert ({**found, **value} if isinstance(value, dict) else value) == found, name


@pytest.mark.parametrize("preset", CRAFT_PRESETS)
def test_a_preset_gives_way_to_flags(preset):
    found = parsed(f"--craft_preset {preset} --craft_alpha 0.55").training
    assert {name: getattr(found, name) for name in get_preset(preset)} == {**get_preset(preset), "craft_alpha": 0.55}


def test_held_out_rows_choose_the_checkpoint():
    found = parsed("--eval_data held_out.jsonl --save_steps 50").training
    assert (found.eval_strategy.value, found.eval_steps, found.load_best_model_at_end) == ("steps", 50, True)
    assert parsed().training.eval_strategy.value == "no"


def test_lists_take_spaces_and_commas():
    for words in ("sin_Sinh urd_Arab", "sin_Sinh,urd_Arab"):
        plan = parsed(f"--sources flores --languages {words}").data_plan()
        assert plan.options.language_pairs == [("eng_Latn", "sin_Sinh"), ("eng_Latn", "urd_Arab")]


def test_qlora_has_both_names():
    assert parsed("--use_qlora").model.load_in_4bit
    assert parsed("--load_in_4bit true").model.load_in_4bit


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--craft_alhpa 0.5", r"--craft_alhpa, did you mean '--craft_alpha'\?"),
        ("--craft_alpha 2", "craft_alpha=2.0 must be at least 0 and at most 1"),
        ("--craft_alpha much", "craft_alpha.*could not convert string to float"),
        ("--craft_pooling max", "craft_pooling"),
        ("--craft_preset small", "invalid choice: 'small'"),
        ("--craft_contrastive_keys {x}", "is not valid JSON"),
        ("""--craft_contrastive_keys '{"anchor_label": "x"}'""", "did you mean 'anchor_labels'"),
        ("--eval_data x.jsonl --save_steps many", "invalid float value: 'many'"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size 0 must be at least 1"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0 must be at least 1"),
        ("--max_length -1", "--max_length -1 must be at least 1"),
        ("--learning_rate -1", "--learning_rate -1 must be at least 0"),
        ("--num_train_epochs 0", "--num_train_epochs 0 must be above 0"),
        ("--accelerator_config nowhere.json", "No such file.*'nowhere.json'"),
        ("--trust_remote_code", "--trust_remote_code is not read"),
        ("--dataset_text_field body", "--dataset_text_field is not read: .*rename the column"),
        (
            """--model_init_kwargs '{"dtype": "float16"}'""",
            "--model_init_kwargs is not read: .*--model_name_or_path, --dtype, --attn_implementation",
        ),
    ],
)
def test_a_refused_flag_is_told(flags, message):
    with pytest.raises(UserError, match=message):
        parsed(flags)


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_a_flag_of_a_library_that_is_absent_is_told():
    with pytest.raises(UserError, match=r"deepspeed.*Install it, or leave out the flag"):
        parsed("--deepspeed stage2.json")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sources flore", "did you mean 'flores'"),
        ("--sources flores --languages si", "'si' is no language code of FLORES"),
        ("--sources flores --languages SIN_sinh", r"Did you mean sin_Sinh\?"),
        ("--sources flores --language_pairs eng_Latn", "write a pair as two codes"),
        ("--sources flores --languages sin_Sinh --language_pairs eng_Latn-urd_Arab", "not both"),
        ("--sources all-nli --languages sin_Sinh", "add one of them to --sources"),
        ("--sources all-nli --nllb_min_laser_score 1.3", "--nllb_min_laser_score is for nllb"),
        ("--sources all-nli --flores_split devtest", "--flores_split is for flores"),
        ("--max_contrastive_samples 5", "--max_contrastive_samples is for pairs"),
        ("--sources all-nli --max_contrastive_samples 0", "must be at least 1"),
        ("--sources flores all-nli --languages sin_Sinh --hard_negatives", "flores have no negatives"),
    ],
)
def test_data_flags_that_contradict_or_that_nothing_reads_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        parsed(flags).data_plan()


@pytest.mark.parametrize(
    ("name", "before", "now"),
    [
        ("warmup_steps", "0", "5"),
        ("adam_beta1", "0.9", "0.8"),
        ("adam_beta2", "0.999", "0.95"),
        ("adam_epsilon", "1e-8", "1e-6"),
        ("dataloader_drop_last", "false", "true"),
        ("train_sampling_strategy", "random", "group_by_length"),
        ("lr_scheduler_kwargs", "{}", '{"num_cycles": 2}'),
        ("label_smoothing_factor", "0", "0.1"),
    ],
)
def test_a_run_does_not_go_on_with_another_optimizer_or_order_of_rows(tmp_path, name, before, now):
    def arguments(value):
        return parse([*NEEDED, "--output_dir", str(tmp_path), f"--{name}", value])

    write_run_file(arguments(before))
    refuse_other_flags(arguments(before))
    with pytest.raises(UserError, match=f"{name}: .* -> "):
        refuse_other_flags(arguments(now))


def test_help_tells_the_own_flags_and_help_all_the_others():
    short, long = (make_parser(argv).format_help() for argv in ([], ["--help_all"]))
    for name in (
        "--sources",
        "--craft_use_gradcache",
        "--learning_rate",
        "--resume_from_checkpoint latest",
        "examples:",
    ):
        assert name in " ".join(short.split())
    assert "--adam_beta1" not in short
    assert "--adam_beta1" in long
    assert max(map(len, short.splitlines())) <= 210  # one long list of choices
