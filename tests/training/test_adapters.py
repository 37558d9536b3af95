"""LoRA targets: exactly the layers that are meant, and what they cost."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from inft.models.modules import linear_modules, list_linear_modules, meta_model, part_of
from inft.training.adapters import Coverage, add_adapters, coverage, exact_pattern, resolve_targets
from inft.training.quantise import quantization_config
from params import LoRAParams, QLoRAParams, UserError

LANGUAGE = {
    "llama32": r".*language_model\.layers\.\d+\.(self_attn|cross_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    "aya": r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    "text": r".*\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
}
PROJECTOR = {"llama32": r".*multi_modal_projector", "aya": r".*multi_modal_projector\.linear_[12]"}
SMALL = LoRAParams(r=4, alpha=8, dropout=0.0)


def adapted_layers(model):
    names = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    return sorted(name.removeprefix("base_model.model.") for name in names)


def perturbed(model):
    """The model with every adapter weight moved, so that it differs from its base."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize(("name", "millions"), [("llama32", 210.5), ("aya", 168.7)])
def test_the_released_models_cost_what_they_should(request, name, millions):
    spec = request.getfixturevalue(name).spec
    model = meta_model(spec, next(iter(spec.released)))
    rows = coverage(model, spec, (LANGUAGE[name], PROJECTOR[name]), lora=LoRAParams(r=64))
    assert sum(row.trainable_parameters for row in rows) / 1e6 == pytest.approx(millions, abs=0.05)
    covered = {row.part: (row.adapted, row.total) for row in rows}
    assert covered.pop("vision")[0] == covered.pop("head")[0] == 0
    assert all(adapted == total for adapted, total in covered.values())


def test_planned_coverage_is_what_the_adapters_hold(family):
    targets = (LANGUAGE[family.spec.name],)
    planned = coverage(family.model(), family.spec, targets, lora=SMALL)
    model = add_adapters(family.model(), family.spec, SMALL, targets, seed=0)
    assert coverage(model, family.spec, targets) == planned
    assert sum(row.trainable_parameters for row in planned) == model.get_nb_trainable_parameters()[0]


def test_planned_coverage_counts_the_magnitudes_of_dora(text):
    lora = LoRAParams(r=4, use_dora=True)
    planned = coverage(text.model(), text.spec, ("q_proj",), lora=lora)
    assert coverage(add_adapters(text.model(), text.spec, lora, ("q_proj",), seed=0), text.spec, ()) == planned


def test_exactly_the_matched_layers_are_adapted(family):
    targets = (LANGUAGE[family.spec.name], *filter(None, [PROJECTOR.get(family.spec.name)]))
    model = add_adapters(family.model(), family.spec, SMALL, targets, seed=0)
    expected = [n for n in list_linear_modules(family.model()) if any(re.fullmatch(t, n) for t in targets)]
    assert adapted_layers(model) == sorted(expected)
    assert all(part_of(name, family.spec) not in ("vision", "head") for name in expected)


def test_a_plain_name_leaves_the_vision_tower_alone(vlm):
    names = resolve_targets(vlm.model(), vlm.spec, ("q_proj",))
    assert names
    assert all(name.endswith(".q_proj") and "vision" not in name for name in names)


def test_a_plain_dotted_name_matches_its_last_components(aya):
    model = aya.model()
    assert resolve_targets(model, aya.spec, ("multi_modal_projector.linear_1",)) == [
        "model.multi_modal_projector.linear_1"
    ]


def test_the_vision_tower_is_adapted_when_a_pattern_says_so(vlm):
    model = vlm.model()
    names = resolve_targets(model, vlm.spec, (r".*vision.*\.fc1",))
    assert {part_of(name, vlm.spec) for name in names} == {"vision"}
    full = names[0]
    assert resolve_targets(model, vlm.spec, (full,)) == [full], "a full name is meant"


def test_a_plain_name_of_the_vision_tower_only_says_how_to_mean_it(vlm):
    with pytest.raises(UserError, match=r"names layers of the vision tower only: write \.\*vision\.\*\\\.fc1"):
        resolve_targets(vlm.model(), vlm.spec, ("fc1",))


def test_every_dead_target_is_named_with_its_neighbours(vlm):
    with pytest.raises(UserError) as error:
        resolve_targets(vlm.model(), vlm.spec, ("q_proj", "mm_projector", "multi_modal_projector_2", "vision_proj"))
    lines = str(error.value).splitlines()
    assert [line.split("'")[1] for line in lines] == ["mm_projector", "multi_modal_projector_2", "vision_proj"]
    assert all("multi_modal_projector" in line.split("Nearest")[1] for line in lines)
    assert f"inft list-modules {vlm.spec.name}" in lines[0]


def test_the_head_is_not_adapted(family):
    for targets in (("lm_head",), (".*",)):
        with pytest.raises(UserError, match=r"matches the head lm_head"):
            resolve_targets(family.model(), family.spec, targets)


def test_no_targets_and_a_broken_pattern_are_errors(text):
    with pytest.raises(UserError, match="no LoRA target"):
        resolve_targets(text.model(), text.spec, ())
    with pytest.raises(UserError, match=r"'\(q' is no regular expression"):
        resolve_targets(text.model(), text.spec, ("(q",))


def test_the_same_seed_gives_the_same_adapters(text):
    first, again, other = (
        add_adapters(text.model(), text.spec, SMALL, ("q_proj", "up_proj"), seed=seed).state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_the_adapters_are_configured_as_the_parameters_say(text):
    lora = LoRAParams(r=4, alpha=6, dropout=0.25, use_rslora=True, use_dora=True, bias="lora_only")
    config = add_adapters(text.model(), text.spec, lora, ("q_proj",), seed=0).peft_config["default"]
    found = (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora, config.use_dora, config.bias)
    assert found == (4, 6, 0.25, True, True, "lora_only")


def test_adding_adapters_leaves_the_random_state_alone(text):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    add_adapters(text.model(), text.spec, SMALL, ("q_proj",), seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_adapters_begin_as_the_base_model(family, make_sample):
    batch = family.collator()([make_sample()])
    base = family.model()
    with torch.no_grad():
        expected = base(**batch).logits
        adapted = add_adapters(base, family.spec, SMALL, ("q_proj",), seed=0).eval()
        torch.testing.assert_close(adapted(**batch).logits, expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"init": "gaussian"}, {"init": "pissa"}, {"bias": "lora_only"}],
    ids=str,
)
def test_saved_adapters_load_with_plain_peft(family, make_sample, tmp_path, options):
    lora = LoRAParams(r=4, alpha=8, dropout=0.0, **options)
    targets = (LANGUAGE[family.spec.name], *filter(None, [PROJECTOR.get(family.spec.name)]))
    batch = family.collator()([make_sample()])
    model = perturbed(add_adapters(family.model(), family.spec, lora, targets, seed=0))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(family.model(), tmp_path).eval()
    assert adapted_layers(again) == adapted_layers(model)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=1e-4, rtol=1e-4)


def test_rank_stabilised_scale_is_that_of_the_paper(text):
    model = add_adapters(text.model(), text.spec, LoRAParams(r=4, alpha=8, use_rslora=True), ("q_proj",), seed=0)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert layer.scaling == {"default": 8 / 4**0.5}


def test_pissa_is_refused_on_4_bit_weights(text):
    quantised = text.model(quantization_config=quantization_config(QLoRAParams(), text.spec))
    with pytest.raises(UserError, match=r"lora.init=pissa .* use --no-quantize"):
        add_adapters(quantised, text.spec, LoRAParams(init="pissa"), ("q_proj",), seed=0)


def test_coverage_lists_parts_in_reading_order(llama32):
    rows = coverage(llama32.model(), llama32.spec, ("cross_attn.q_proj",), lora=LoRAParams(r=1))
    assert [row.part for row in rows] == ["vision", "projector", "self-attention", "cross-attention", "MLP", "head"]
    layers = [name for name in linear_modules(llama32.model()) if ".cross_attn." in name]
    queries = len(layers) // 4
    assert rows[3] == Coverage(
        part="cross-attention", total=len(layers), adapted=queries, trainable_parameters=queries * (128 + 128)
    )


names = st.lists(st.sampled_from(["model", "layers", "0", "1", "12", "a_b", "q.proj", "x"]), min_size=1, max_size=6)


@given(st.sets(names.map(".".join), min_size=1, max_size=12), st.sets(names.map(".".join), max_size=12))
def test_an_exact_pattern_matches_its_names_and_no_others(wanted, others):
    pattern = exact_pattern(sorted(wanted))
    for name in wanted | others:
        assert (re.fullmatch(pattern, name) is not None) == (name in wanted)
