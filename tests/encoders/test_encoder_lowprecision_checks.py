"""What keeps a low-precision section from running: settings, filters, packages and hardware."""

from dataclasses import asdict

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from low_precision_runs import NOT_COMPILED, SECTIONS, tiny_model, with_section

from inft.encoders.lowprecision.convert import check_low_precision
from inft.encoders.lowprecision.filter import Filter, LinearShape, kept_layers
from inft.encoders.lowprecision.layers import linear_shapes
from inft.encoders.lowprecision.needs import Machine, missing, needs_of
from inft.encoders.lowprecision.transformer_engine import recipe_arguments
from params.encoder import EncoderParams, EncoderTrainerParams
from params.encoder_lowprecision import low_precision_problems, unread_low_precision
from params.errors import UserError
from params.lowprecision import TorchAOParams, TransformerEngineParams
from params.yamlfile import Given

GUIDE = {
    "float8 rowwise": """
torchao:
  enable: true
  recipe: "float8_rowwise"
  skip_first_last_linear: true
  auto_filter_small_kn: false
  filter_fqns: ["decoder"]
""",
    "float8 tensorwise": """
torchao:
  enable: true
  recipe: "float8_tensorwise"
  enable_fsdp_float8_all_gather: true
  precompute_float8_dynamic_scale_for_fsdp: true
""",
    "NVFP4": """
transformer_engine:
  enable: true
  recipe: "nvfp4"
  filter_fqns: ["decoder"]
  skip_first_last_linear: true
  require_compile: true
""",
    "NVFP4 on packed sequences": """
transformer_engine:
  enable: true
  recipe: "nvfp4"
  disable_2d_quantization: true
  disable_rht: true
  disable_stochastic_rounding: true
""",
    "MXFP8": """
transformer_engine:
  enable: true
  recipe: "mxfp8"
  filter_fqns: ["decoder"]
  skip_first_last_linear: true
  require_compile: true
  fp8_format: "E4M3"
""",
    "Quartet-II": """
quartet2:
  enable: true
  recipe: "quartet_ii"
  filter_fqns: ["decoder"]
  skip_first_last_linear: true
  required_dim_multiple: 128
  four_over_six: true
  require_compile: true
""",
}


@pytest.mark.parametrize("text", GUIDE.values(), ids=GUIDE)
def test_the_guides_examples_hold(text):
    [(name, fields)] = yaml.safe_load(text).items()
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    params = with_section(name, **{key: value for key, value in fields.items() if key != "enable"})
    assert {key: asdict(getattr(params, name))[key] for key in fields} == fields
    assert low_precision_problems(params) == []


def test_nothing_is_wrong_without_an_enabled_section():
    assert low_precision_problems(EncoderParams(task="contrastive")) == []
    check_low_precision(EncoderParams())


IN_FP32 = EncoderTrainerParams(torch_compile=True, mixed_precision="no")
CHECKPOINTED = EncoderTrainerParams(torch_compile=True, gradient_checkpointing=True)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        *[(with_section(name, NOT_COMPILED), f"{name}.require_compile") for name in SECTIONS],
        (with_section("quartet2", IN_FP32), "mixed_precision: bf16"),
        (with_section("torchao", IN_FP32, recipe="float8_rowwise"), "mixed_precision: bf16"),
        (with_section("torchao", recipe="mxfp8_cublas", auto_filter_small_kn=True), "auto_filter_small_kn has no"),
        (with_section("torchao", recipe="float8_rowwise_with_gw_hp", auto_filter_small_kn=True), "has no effect"),
        (with_section("torchao", recipe="mxfp4_qat", emulate=True), "emulate has no effect"),
        (with_section("torchao", filter_fqns=(), skip_first_last_linear=False), "Add decoder to torchao.filter_fqns"),
        (with_section("torchao", filter_fqns=("",)), "empty entry"),
        (with_section("transformer_engine", disable_rht=True), "only with nvfp4"),
        (with_section("transformer_engine", recipe="nvfp4", fp8_format="E4M3"), "fp8_format has no effect"),
        (with_section("transformer_engine", amax_history_len=16), "only with fp8_delayed"),
        (with_section("transformer_engine", CHECKPOINTED), "gradient_checkpointing"),
        (EncoderParams(task="contrastive", torchao=TorchAOParams(enable=True, require_compile=False)), "pretraining"),
        (
            EncoderParams(torchao=TorchAOParams(enable=True), transformer_engine=TransformerEngineParams(enable=True)),
            "torchao.enable and transformer_engine.enable exclude each other",
        ),
    ],
)
def test_a_setting_that_cannot_hold_is_told_with_its_remedy(params, words):
    [problem] = low_precision_problems(params)
    assert words in problem
    assert any(verb in problem for verb in ("set ", "Set ", "drop it", "Add ", "turn it off", "enable one"))


@pytest.mark.parametrize("name", SECTIONS)
def test_without_the_compile_requirement_a_section_needs_no_compilation(name):
    assert low_precision_problems(with_section(name, NOT_COMPILED, require_compile=False)) == []


def told(*keys: str, origin: str = "--") -> dict[str, Given]:
    return {key: Given(None, f"--{key}" if origin == "--" else origin) for key in keys}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_field_of_a_section_that_is_off_is_told_to_do_nothing(name):
    [problem] = unread_low_precision(EncoderParams(), told(f"{name}.recipe", "trainer.max_steps"))
    assert problem == f"{name}.recipe has no effect unless {name}.enable is true: set that, or drop it."
    assert unread_low_precision(with_section(name), told(f"{name}.recipe", f"{name}.enable")) == []


def test_fields_that_do_nothing_are_told_once_for_each_section():
    keys = told("torchao.recipe", "quartet2.recipe", "torchao.emulate", origin="run.yaml line 4")
    assert unread_low_precision(EncoderParams(), keys) == [
        "torchao.recipe, torchao.emulate have no effect unless torchao.enable is true: set that, or drop them.",
        "quartet2.recipe has no effect unless quartet2.enable is true: set that, or drop it.",
    ]


def test_a_section_may_be_turned_off_above_its_fields():
    params, file = EncoderParams(), told("torchao.recipe", "torchao.enable", origin="run.yaml line 4")
    assert unread_low_precision(params, {**file, **told("torchao.enable")}) == []
    assert unread_low_precision(params, file) == []
    assert unread_low_precision(params, told("torchao.recipe", "torchao.enable")) == []
    [problem] = unread_low_precision(params, {**file, **told("torchao.recipe")})
    assert problem.startswith("torchao.recipe has no effect")


def test_a_contrastive_run_tells_such_fields_elsewhere():
    assert unread_low_precision(EncoderParams(task="contrastive"), told("torchao.recipe")) == []


CPU = Machine(gpu=None, capability=None, torch="2.13.0+cpu", cuda=None, modules=frozenset({"torchao"}))
EVERYTHING = frozenset({"torchao", "transformer_engine", "quartet2", "qutlass"})


def gpu(major: int, minor: int) -> Machine:
    return Machine(gpu="A GPU", capability=(major, minor), torch="2.13.0", cuda="13.0", modules=EVERYTHING)


# The lowest of these GPUs that runs a recipe, and from which on none does: A100, L4, H200, B200, RTX PRO 6000.
GPUS = [gpu(8, 0), gpu(8, 9), gpu(9, 0), gpu(10, 0), gpu(12, 0)]
RUNS = {
    ("torchao", "float8_tensorwise"): GPUS[1:],
    ("torchao", "float8_rowwise"): GPUS[1:],
    ("torchao", "float8_rowwise_with_gw_hp"): GPUS[1:],
    ("torchao", "mxfp8_emulated"): [CPU, *GPUS],
    ("torchao", "mxfp8_cublas"): GPUS[3:],
    ("torchao", "mxfp8_cublas_rceil"): GPUS[3:],
    ("torchao", "mxfp4_emulated"): [CPU, *GPUS],
    ("torchao", "mxfp4_cutlass"): GPUS[3:],
    ("torchao", "mxfp4_qat"): [CPU, *GPUS],
    ("torchao", "nvfp4_qat"): GPUS[3:],
    ("transformer_engine", "fp8_delayed"): GPUS[1:],
    ("transformer_engine", "fp8_current"): GPUS[1:],
    ("transformer_engine", "mxfp8"): GPUS[3:4],
    ("transformer_engine", "nvfp4"): GPUS[3:],
    ("quartet2", "quartet_ii"): GPUS[4:],
}


@pytest.mark.parametrize(("name", "recipe"), RUNS)
def test_a_recipe_runs_on_the_hardware_that_has_its_numbers(name, recipe):
    needs = needs_of(name, SECTIONS[name](recipe=recipe))
    assert [machine for machine in [CPU, *GPUS] if not missing(needs, machine)] == RUNS[name, recipe]


def test_emulated_float8_needs_no_gpu():
    assert not missing(needs_of("torchao", TorchAOParams(recipe="float8_rowwise", emulate=True)), CPU)


def test_what_is_missing_is_named_with_what_was_found():
    packages, hardware = (
        missing(needs_of("transformer_engine", TransformerEngineParams(recipe="mxfp8")), machine)
        for machine in (gpu(10, 0)._replace(modules=frozenset()), gpu(12, 0))
    )
    assert packages == ["the package transformer_engine (pip install --no-build-isolation 'inft[transformer_engine]')"]
    assert hardware == [
        "a GPU of compute capability 10.0 or higher and below 12.0 (Blackwell); found A GPU of 12.0 (torch 2.13.0, "
        "CUDA 13.0)"
    ]
    [no_gpu] = missing(needs_of("torchao", TorchAOParams()), CPU)
    assert no_gpu.endswith("found no GPU (torch 2.13.0+cpu, built without CUDA)")


def test_a_refusal_names_every_problem_at_once(monkeypatch):
    monkeypatch.setattr("inft.encoders.lowprecision.convert.this_machine", lambda: CPU._replace(modules=frozenset()))
    with pytest.raises(UserError) as refusal:
        check_low_precision(with_section("torchao", NOT_COMPILED, recipe="mxfp8_cublas"))
    for words in ("torch_compile: true", "inft[lowprecision]", "capability 10.0", "recipe: mxfp8_emulated"):
        assert words in str(refusal.value)


NEOBERT = [
    *[
        LinearShape(f"model.transformer_encoder.{block}.{name}", inputs, outputs)
        for block in range(12)
        for name, inputs, outputs in (
            ("qkv", 768, 2304),
            ("wo", 768, 768),
            ("ffn.w12", 768, 4096),
            ("ffn.w3", 2048, 768),
        )
    ],
    LinearShape("decoder", 768, 30522),
]


def test_the_names_of_the_filter_are_those_of_the_model():
    names = [layer.name for layer in linear_shapes(tiny_model(num_hidden_layers=12))]
    assert names == [layer.name for layer in NEOBERT]


def test_the_guides_filters_keep_the_head_and_the_first_layer():
    rule = Filter(section="torchao", names=("decoder",), skip_first_last=True, multiple=16)
    assert kept_layers(NEOBERT, rule) == {
        "decoder": "filter_fqns",
        "model.transformer_encoder.0.qkv": "skip_first_last_linear",
    }


def test_a_filter_takes_any_part_of_a_name():
    kept = kept_layers(NEOBERT, Filter(section="torchao", names=("ffn.w3", "encoder.11.")))
    assert set(kept) == {layer.name for layer in NEOBERT if "ffn.w3" in layer.name or "encoder.11." in layer.name}


def test_sides_that_are_no_multiple_stay_as_they_are():
    assert kept_layers(NEOBERT, Filter(section="torchao", multiple=16)) == {
        "decoder": "768 x 30522 is not in multiples of 16"
    }
    assert not kept_layers(NEOBERT[:-1], Filter(section="quartet2", multiple=128))


def test_a_filter_that_meets_no_layer_is_told_with_the_names_there_are():
    with pytest.raises(UserError, match=r"'deocder'.*model\.transformer_encoder\.\*\.qkv.*decoder"):
        kept_layers(NEOBERT, Filter(section="torchao", names=("deocder",)))


layers = st.lists(
    st.builds(LinearShape, st.text("abc.", min_size=1), st.integers(1, 64), st.integers(1, 64), st.booleans()),
    min_size=1,
    unique_by=lambda layer: layer.name,
)


@given(layers, st.sampled_from([1, 2, 16]), st.booleans(), st.booleans())
def test_every_layer_is_either_kept_for_a_reason_or_fits_the_rule(layers, multiple, ends, takes_bias):
    rule = Filter(section="torchao", multiple=multiple, skip_first_last=ends, takes_bias=takes_bias)
    fits = [
        layer.inputs % multiple == layer.outputs % multiple == 0
        and (takes_bias or not layer.bias)
        and not (ends and place in (0, len(layers) - 1))
        for place, layer in enumerate(layers)
    ]
    if not any(fits):
        with pytest.raises(UserError, match="no linear layer left"):
            kept_layers(layers, rule)
        return
    kept = kept_layers(layers, rule)
    assert [layer.name not in kept for layer in layers] == fits


def test_recipes_of_transformer_engine_take_what_their_fields_say():
    quiet = {"disable_rht": True, "disable_stochastic_rounding": True, "disable_2d_quantization": True}
    te = TransformerEngineParams
    assert recipe_arguments(te(recipe="nvfp4", **quiet)) == ("NVFP4BlockScaling", quiet)
    assert recipe_arguments(te(recipe="mxfp8")) == ("MXFP8BlockScaling", {"fp8_format": "E4M3"})
    assert recipe_arguments(te(recipe="fp8_current")) == ("Float8CurrentScaling", {"fp8_format": "HYBRID"})
    assert recipe_arguments(te(recipe="fp8_delayed", fp8_format="E4M3", amax_history_len=16, margin=1)) == (
        "DelayedScaling",
        {"fp8_format": "E4M3", "margin": 1, "amax_history_len": 16, "amax_compute_algo": "max"},
    )
