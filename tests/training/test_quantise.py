"""4-bit weights: which layers, and training on them with evaluations in between."""

import pytest
import torch

from inft.models.modules import linear_modules, part_of
from inft.training.adapters import add_adapters, coverage
from inft.training.quantise import after_quantised_load, quantised_modules, quantization_config
from params import LoRAParams, QLoRAParams

LORA = LoRAParams(r=4, alpha=8, dropout=0.0)


def quantised(family, **options):
    config = quantization_config(QLoRAParams(**options), family.spec)
    return after_quantised_load(family.model(quantization_config=config, dtype="bfloat16"))


def test_the_config_says_what_the_parameters_say(aya):
    config = quantization_config(
        QLoRAParams(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False, bnb_4bit_compute_dtype="float32"),
        aya.spec,
    )
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("fp4", False)
    assert config.bnb_4bit_compute_dtype == torch.float32


def test_without_4_bit_there_is_no_config(aya):
    assert quantization_config(QLoRAParams(load_in_4bit=False), aya.spec) is None


def test_vision_tower_projector_and_head_stay_in_16_bit(family):
    model = quantised(family)
    packed = quantised_modules(model)
    assert {part_of(name, family.spec) for name in packed} <= {"self-attention", "cross-attention", "MLP"}
    language = [n for n in linear_modules(model) if part_of(n, family.spec) not in ("vision", "projector", "head")]
    assert packed == language
    others = [p for name, p in model.named_parameters() if not any(name.startswith(f"{n}.") for n in packed)]
    assert {p.dtype for p in others} == {torch.bfloat16}


def test_a_parameter_quantises_vision_too(vlm):
    packed = quantised_modules(quantised(vlm, quantize_vision=True))
    parts = {part_of(name, vlm.spec) for name in packed}
    assert {"vision", "projector"} < parts
    assert "head" not in parts


def test_everything_is_frozen_before_the_adapters_come(family):
    assert not any(p.requires_grad for p in quantised(family).parameters())


def test_training_goes_on_after_an_evaluation(family, make_sample):
    model = add_adapters(quantised(family), family.spec, LORA, ("q_proj", "up_proj", "down_proj"), seed=0)
    batch = family.collator()([make_sample(), make_sample("A blue circle.", colour="blue")])
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(3):
        model.train()
        model(**batch).loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trainable)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            losses.append(float(model(**batch).loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_an_evaluation_leaves_the_gradients_as_they_were(text, make_sample):
    model = add_adapters(quantised(text), text.spec, LORA, ("q_proj", "up_proj", "down_proj"), seed=0)
    batch = text.collator()([make_sample()])

    def gradients():
        model.zero_grad()
        model.train()(**batch).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    before = gradients()
    with torch.no_grad():
        model.eval()(**batch)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


def test_evaluation_and_training_forward_agree(text, make_sample):
    model, batch = quantised(text), text.collator()([make_sample()])
    with torch.no_grad():
        evaluated = model.eval()(**batch).logits
        trained = model.train()(**batch).logits
    torch.testing.assert_close(evaluated, trained)


def test_coverage_of_packed_layers_counts_their_true_shapes(text):
    model = quantised(text)
    planned = coverage(model, text.spec, ("up_proj",), lora=LORA)
    assert planned == coverage(text.model(), text.spec, ("up_proj",), lora=LORA)
    assert coverage(add_adapters(model, text.spec, LORA, ("up_proj",), seed=0), text.spec, ()) == planned


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_goes_on_after_an_evaluation_on_cuda(family, make_sample):
    model = add_adapters(quantised(family), family.spec, LORA, ("q_proj", "up_proj"), seed=0)
    batch = {key: value.to(model.device) for key, value in family.collator()([make_sample()]).items()}
    for _ in range(2):
        model.train()(**batch).loss.backward()
        with torch.no_grad():
            assert torch.isfinite(model.eval()(**batch).loss)
