"""Recipes of torchao that run on any hardware: near the plain model, not equal to it, plain in checkpoints."""

from copy import deepcopy

import pytest
import torch
from low_precision_runs import NOT_COMPILED, loss_of, tiny_model, with_section
from safetensors.torch import load_file

from inft.encoders.lowprecision.convert import (
    check_low_precision,
    convert_linears,
    low_precision_context,
    token_multiple,
)
from inft.encoders.optimizer import make_optimizers
from inft.models.neobert import NeoBERTForMaskedLM
from params.encoder import EncoderParams, OptimizerParams
from params.errors import UserError
from params.lowprecision import TorchAOParams

pytest.importorskip("torchao")

from inft.encoders.lowprecision.torchao import convert_torchao

# Recipe -> largest relative error of any weight's gradient: 8 bits hold 3 of mantissa, 4 bits hold 1.
RECIPES = {
    "float8_tensorwise": 0.15,
    "float8_rowwise": 0.15,
    "float8_rowwise_with_gw_hp": 0.15,
    "mxfp8_emulated": 0.15,
    "mxfp4_emulated": 0.6,
    "mxfp4_qat": 0.6,
}


def params_of(recipe: str, **fields) -> EncoderParams:
    here = {"emulate": recipe.startswith("float8"), "require_compile": False}
    return with_section("torchao", NOT_COMPILED, recipe=recipe, **here, **fields)


def gradients(model: NeoBERTForMaskedLM) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_converted_model_is_near_the_plain_one_and_not_equal(recipe, autocast):
    plain, model = tiny_model(), tiny_model()
    done = convert_linears(model, params_of(recipe))
    assert len(done.converted) == 11
    losses = [loss_of(each, autocast=autocast) for each in (plain, model)]
    for loss in losses:
        loss.backward()
    assert 0 < abs(losses[1] - losses[0]) < (0.02 if "fp4" in recipe else 0.002) * losses[0]
    wanted = gradients(plain)
    errors = {name: (grad - wanted[name]).norm() / wanted[name].norm() for name, grad in gradients(model).items()}
    assert max(errors.values()) < RECIPES[recipe]
    assert all(error > 0 for error in errors.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_conversion_changes_no_weight_no_tie_and_no_random_state(recipe):
    plain, model = tiny_model(), tiny_model()
    weights = {name: id(weight) for name, weight in model.named_parameters()}
    state = torch.get_rng_state()
    convert_linears(model, params_of(recipe))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: id(weight) for name, weight in model.named_parameters()} == weights
    assert model.decoder.weight is model.model.encoder.weight
    for (name, wanted), (other, got) in zip(plain.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == other
        assert got.dtype == wanted.dtype
        assert type(got) is torch.Tensor
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_converted_model_is_stored_as_plain_weights(recipe, tmp_path):
    plain, model = tiny_model(), tiny_model()
    convert_linears(model, params_of(recipe))
    for name, each in (("plain", plain), ("converted", model)):
        each.save_pretrained(tmp_path / name)
    stored = load_file(tmp_path / "converted" / "model.safetensors")
    wanted = load_file(tmp_path / "plain" / "model.safetensors")
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(stored[name], wanted[name]) for name in wanted)
    again = NeoBERTForMaskedLM.from_pretrained(tmp_path / "converted")
    assert torch.equal(loss_of(again), loss_of(plain))


@pytest.mark.parametrize("recipe", ["float8_rowwise", "mxfp8_emulated", "mxfp4_qat"])
def test_a_resumed_run_goes_on_bit_equal(recipe, tmp_path):
    def run(model, optimizer, steps):
        losses = []
        for _ in range(steps):
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def start(seed):
        model = tiny_model(seed)
        convert_linears(model, params_of(recipe))
        return model, *make_optimizers(model, OptimizerParams(lr=0.01))

    model, optimizer = start(0)
    run(model, optimizer, 2)
    model.save_pretrained(tmp_path)
    resumed, other = start(1)
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    first, second = run(model, optimizer, 3), run(resumed, other, 3)
    assert first == second
    assert first[-1] < first[0]


@pytest.mark.parametrize("recipe", ["float8_rowwise", "mxfp8_emulated", "mxfp4_qat"])
def test_converted_layers_compile_to_the_same_numbers(recipe):
    plain, compiled = tiny_model(), tiny_model()
    for model in (plain, compiled):
        convert_linears(model, params_of(recipe))
    for block in compiled.model.transformer_encoder:
        block.ffn.compile(backend="aot_eager", fullgraph=True)
    losses = [loss_of(model) for model in (plain, compiled)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert all(torch.equal(grad, gradients(compiled)[name]) for name, grad in gradients(plain).items())


def test_recipes_round_differently():
    losses = []
    for recipe in RECIPES:
        model = tiny_model()
        convert_linears(model, params_of(recipe))
        loss = loss_of(model)
        loss.backward()
        losses.append((loss.item(), model.model.transformer_encoder[1].wo.weight.grad.norm().item()))
    assert len(set(losses)) == len(RECIPES)


def test_named_layers_stay_plain_and_are_told_with_their_reason():
    model = tiny_model()
    done = convert_linears(
        model, params_of("float8_rowwise", filter_fqns=("decoder", "ffn"), skip_first_last_linear=False)
    )
    assert done.converted == tuple(f"model.transformer_encoder.{i}.{name}" for i in range(3) for name in ("qkv", "wo"))
    assert {type(model.get_submodule(name)) for name in done.kept} == {torch.nn.Linear}
    assert all(type(model.get_submodule(name)) is not torch.nn.Linear for name in done.converted)
    assert done.describe() == "6 of 13 linear layers converted (filter_fqns: 7 layers)"


@pytest.mark.parametrize("recipe", ["float8_rowwise", "float8_tensorwise"])
def test_torchaos_own_rule_keeps_what_is_too_small_to_gain_speed(recipe):
    kept = {"float8_rowwise": [True] * 4, "float8_tensorwise": [False, True, False, True]}[recipe]
    with torch.device("meta"):
        model = NeoBERTForMaskedLM(tiny_model().config.__class__(num_hidden_layers=2, vocab_size=64))
    params = params_of(recipe, auto_filter_small_kn=True, skip_first_last_linear=False)
    if all(kept):
        with pytest.raises(UserError, match=r"8 by auto_filter_small_kn.*set torchao.auto_filter_small_kn: false"):
            convert_linears(model, params)
        return
    done = convert_linears(model, params)
    names = [f"model.transformer_encoder.0.{name}" for name in ("qkv", "wo", "ffn.w12", "ffn.w3")]
    assert [name in done.kept for name in names] == kept


FSDP_FIELDS = ("enable_fsdp_float8_all_gather", "precompute_float8_dynamic_scale_for_fsdp")


@pytest.mark.parametrize("recipe", ["float8_tensorwise", "float8_rowwise", "mxfp8_emulated"])
@pytest.mark.parametrize("names", [FSDP_FIELDS[:1], FSDP_FIELDS[1:], FSDP_FIELDS])
def test_settings_of_fsdp_are_taken_told_to_do_nothing_and_do_nothing(recipe, names):
    plain, model = tiny_model(), tiny_model()
    assert convert_linears(plain, params_of(recipe)).notes == ()
    [note] = convert_linears(model, params_of(recipe, **dict.fromkeys(names, True))).notes
    assert all((f"torchao.{name}" in note) == (name in names) for name in FSDP_FIELDS)
    assert "whole in every process" in note
    assert "drop" in note
    assert {type(module) for module in model.modules()} == {type(module) for module in plain.modules()}
    assert torch.equal(loss_of(model), loss_of(plain))


def test_a_run_from_python_is_checked_as_one_from_the_command_line_is():
    model, plain = tiny_model(), tiny_model()
    wrong = with_section("torchao", NOT_COMPILED, recipe="float8_rowwise")
    with pytest.raises(UserError) as refusal:
        convert_linears(model, wrong)
    with pytest.raises(UserError) as checked:
        check_low_precision(wrong)
    assert str(refusal.value) == str(checked.value)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


def test_what_runs_here_is_let_through_and_what_does_not_is_refused():
    for recipe in RECIPES:
        check_low_precision(params_of(recipe))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"capability 8\.9.*torchao\.emulate: true"):
            check_low_precision(with_section("torchao", recipe="float8_rowwise"))
        with pytest.raises(UserError, match="torch_compile_backend: aot_eager"):
            check_low_precision(with_section("torchao", recipe="mxfp8_emulated"))
        with pytest.raises(UserError, match=r"nvfp4_qat needs a GPU.*10\.0.*torchao\.recipe: mxfp4_qat"):
            check_low_precision(with_section("torchao", recipe="nvfp4_qat"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_nvfp4_qat_multiplies_by_hardware_which_is_why_it_needs_a_gpu():
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    convert_torchao(layers, ["0"], TorchAOParams(enable=True, recipe="nvfp4_qat"))
    with pytest.raises(ValueError, match=r"mat_a.dtype\(\)=Float4_e2m1fn_x2"):
        layers(torch.randn(32, 64))


@pytest.mark.parametrize(
    ("params", "multiple"),
    [
        (EncoderParams(), 1),
        (params_of("float8_rowwise"), 16),
        (params_of("mxfp8_emulated"), 32),
        (params_of("mxfp4_qat"), 1),
        (with_section("transformer_engine", recipe="mxfp8"), 32),
        (with_section("transformer_engine", recipe="nvfp4"), 128),
        (with_section("quartet2"), 128),
    ],
)
def test_batches_are_padded_to_what_the_products_take(params, multiple):
    assert token_multiple(params) == multiple


def test_without_a_section_nothing_is_converted():
    model = tiny_model()
    before = [type(module) for module in model.modules()]
    done = convert_linears(model, EncoderParams())
    assert (done.converted, done.kept, done.notes) == ((), {}, ())
    assert [type(module) for module in model.modules()] == before
    with low_precision_context(EncoderParams()):
        pass
