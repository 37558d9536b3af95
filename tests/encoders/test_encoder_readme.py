"""What the guide of text encoders names exists."""

import re
from pathlib import Path

import pytest

from inft.cli import COMMANDS
from params.encoder_resolve import ENCODER, SHIPPED

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "inft" / "encoders" / "README.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Every parameter that the user's training guide names.
GUIDE = (
    "trainer.per_device_train_batch_size",
    "trainer.gradient_accumulation_steps",
    "trainer.max_steps",
    "datacollator.pack_sequences",
    "model.attn_backend",
    "trainer.enforce_full_packed_batches",
    "dataset.num_workers",
    "dataset.pin_memory",
    "dataset.persistent_workers",
    "dataset.prefetch_factor",
    "dataset.eval_split",
    "dataset.eval_samples",
    "trainer.eval_max_batches",
    "trainer.mixed_precision",
    "trainer.torch_compile",
    "trainer.torch_compile_backend",
    "trainer.torch_compile_dynamic",
    "trainer.masked_logits_only_loss",
    "torchao.enable",
    "torchao.recipe",
    "torchao.skip_first_last_linear",
    "torchao.auto_filter_small_kn",
    "torchao.filter_fqns",
    "torchao.enable_fsdp_float8_all_gather",
    "torchao.precompute_float8_dynamic_scale_for_fsdp",
    "torchao.require_compile",
    "transformer_engine.enable",
    "transformer_engine.recipe",
    "transformer_engine.filter_fqns",
    "transformer_engine.require_compile",
    "transformer_engine.skip_first_last_linear",
    "transformer_engine.fp8_format",
    "transformer_engine.disable_2d_quantization",
    "transformer_engine.disable_rht",
    "transformer_engine.disable_stochastic_rounding",
    "quartet2.enable",
    "quartet2.recipe",
    "quartet2.filter_fqns",
    "quartet2.skip_first_last_linear",
    "quartet2.required_dim_multiple",
    "quartet2.four_over_six",
    "quartet2.require_compile",
    "trainer.resume_from_checkpoint",
    "dataset.streaming",
    "dataset.path",
    "trainer.gradient_checkpointing",
    "trainer.gradient_clipping",
    "datacollator.mask_all",
)


@pytest.mark.parametrize("name", GUIDE)
def test_a_parameter_of_the_users_guide_exists(name):
    assert name in ENCODER.field_types


def test_every_parameter_that_the_readme_names_exists():
    sections = "|".join(ENCODER.sections)
    named = set(re.findall(rf"\b((?:{sections})\.[a-z_]+)\b", TEXT))
    files = {name for name in named if name.endswith((".py", ".md", ".json", ".yaml", ".safetensors"))}
    assert len(named - files) > 15
    assert [name for name in sorted(named - files) if name not in ENCODER.field_types] == []


def test_every_command_and_script_that_the_readme_names_exists():
    commands = set(re.findall(r"\binft ([a-z]+(?:-[a-z]+)*)", TEXT)) - {"import"}
    assert commands <= {*COMMANDS}, commands - {*COMMANDS}
    scripts = set(re.findall(r"scripts/[\w/]+\.py", TEXT))
    assert len(scripts) >= 6
    assert [path for path in sorted(scripts) if not (ROOT / path).is_file()] == []
    configs = set(re.findall(r"configs/([\w/]+\.yaml)", TEXT + README))
    assert configs
    assert [path for path in sorted(configs) if not (SHIPPED / path).is_file()] == []
