"""NeoBERT: its size, its weights on disk, its variants, and what it refuses."""

import inspect
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from inft.models.neobert import (
    NeoBERTConfig,
    NeoBERTForMaskedLM,
    NeoBERTForSequenceClassification,
    NeoBERTModel,
)
from params.errors import UserError

VARIANTS = {
    "default": {},
    "learned positions": {"rope": False},
    "layer norm": {"rms_norm": False},
    "gelu": {"hidden_act": "gelu"},
    "head with a bias": {"decoder_bias": True},
    "untied": {"tie_word_embeddings": False},
}


def tiny(**changes):
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
    }
    return NeoBERTConfig(**(sizes | changes))


def build(kind=NeoBERTForMaskedLM, **changes):
    torch.manual_seed(3)
    model = kind(tiny(**changes))
    with torch.no_grad():
        for weight in model.parameters():  # large enough for every part to matter
            weight.mul_(8)
    return model


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"num_hidden_layers": 28, "max_position_embeddings": 4096}, 221_665_536),
        ({"num_hidden_layers": 28, "tie_word_embeddings": False}, 245_106_432),
        ({}, 108_394_752),
    ],
)
def test_parameter_counts_are_the_papers(changes, count):
    with torch.device("meta"):
        model = NeoBERTForMaskedLM(NeoBERTConfig(**changes))
    assert model.num_parameters() == count


@pytest.mark.parametrize(("intermediate", "width"), [(3072, 2048), (36, 24), (1, 0), (13, 8), (1536, 1024)])
def test_swiglu_is_two_thirds_wide_in_steps_of_eight(intermediate, width):
    assert NeoBERTConfig(intermediate_size=intermediate).feed_forward_size == width


def test_new_weights_are_uniform_and_norms_are_one():
    model = NeoBERTForMaskedLM(NeoBERTConfig(num_hidden_layers=1, vocab_size=2000, decoder_bias=True))
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert (weight == 1).all(), name
        elif "bias" in name:
            assert (weight == 0).all(), name
        else:
            assert 0.019 < float(weight.detach().abs().max()) <= 0.02, name
            assert abs(float(weight.detach().std()) - 0.02 / 3**0.5) < 2e-4, name
    assert float(model.model.encoder.weight[0].detach().std()) > 0.01, "[PAD] is drawn as every other token"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_is_the_same_after_saving_and_loading(tmp_path, variant):
    model = build(**VARIANTS[variant]).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is NeoBERTForMaskedLM
    tied = variant != "untied"
    assert (loaded.decoder.weight is loaded.model.encoder.weight) == tied
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stored:
        assert ("decoder.weight" in stored.keys()) != tied  # noqa: SIM118 -- not a mapping
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_tie_holds_while_a_loaded_model_is_trained(tmp_path):
    build().save_pretrained(tmp_path)
    model = NeoBERTForMaskedLM.from_pretrained(tmp_path).train()
    before = model.model.encoder.weight.clone()
    ids = torch.tensor([[5, 6, 7, 8]])
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(model.decoder.weight, model.model.encoder.weight)
    assert not torch.equal(model.decoder.weight, before)


def test_encoder_and_classifier_load_from_a_masked_lm(tmp_path):
    saved = build().eval()
    saved.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is NeoBERTConfig
    encoder = AutoModel.from_pretrained(tmp_path)
    assert type(encoder) is NeoBERTModel
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(encoder(ids).last_hidden_state, saved.model(ids).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier) is NeoBERTForSequenceClassification
    assert classifier(ids).logits.shape == (1, 3)
    assert torch.equal(classifier.model.encoder.weight, saved.model.encoder.weight)


def test_the_attention_backend_is_not_stored(tmp_path):
    build(attn_backend="flash_attn_varlen").save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).attn_backend == "sdpa"
    assert AutoConfig.from_pretrained(tmp_path, attn_backend="flash_attn_varlen").attn_backend == "flash_attn_varlen"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_weight_of_every_variant_gets_a_gradient(variant):
    model = build(**VARIANTS[variant])
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    model(ids, (ids > 0).long(), labels=torch.where(ids > 0, ids, -100)).loss.backward()
    for name, weight in model.named_parameters():
        assert float(weight.grad.abs().max()) > 0, name


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_acts_in_training_only(checkpointed):
    model = build(NeoBERTModel, dropout_prob=0.5)
    if checkpointed:
        model.activation_checkpointing_enable()
    ids = torch.tensor([[5, 6, 7, 8]])
    first, second = (model.train()(ids).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (model.eval()(ids).last_hidden_state for _ in range(2))
    assert torch.equal(first, second)


def test_hidden_states_go_from_the_embedding_to_the_last_norm():
    model = build(NeoBERTModel).eval()
    ids, mask = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    output = model(ids, mask, output_hidden_states=True)
    assert [tuple(x.shape) for x in output.hidden_states] == [(2, 3, 16)] * 3
    assert torch.equal(output.hidden_states[0][1], model.encoder(ids)[1])
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert torch.equal(model(ids, mask, return_dict=False)[0], output.last_hidden_state)


def test_rms_norm_sums_squares_in_float32():
    norm = build(NeoBERTModel, hidden_size=512, intermediate_size=64).layer_norm.to(torch.bfloat16)
    x = (torch.randn(64, 512) * 300).to(torch.bfloat16)
    exact = x.double() * x.double().square().mean(-1, keepdim=True).add(1e-5).rsqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), exact, rtol=2**-7, atol=0)  # two roundings to bfloat16


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_classification_reads_the_first_real_token(left):
    model = build(NeoBERTForSequenceClassification, num_labels=3).eval()
    text = [5, 6, 7]
    alone = model(torch.tensor([text])).logits
    row = [0, 0, *text] if left else [*text, 0, 0]
    ids = torch.tensor([row, [8, 9, 10, 11, 12]])
    padded = model(ids, torch.tensor([[int(token > 0) for token in row], [1] * 5])).logits
    torch.testing.assert_close(padded[:1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "changes", "expected"),
    [
        (torch.tensor([1, 2]), {"num_labels": 3}, torch.nn.functional.cross_entropy),
        (torch.tensor([0.5, 2.0]), {"num_labels": 1}, lambda x, y: torch.nn.functional.mse_loss(x.squeeze(1), y)),
        (
            torch.tensor([[1.0, 0, 1], [0, 0, 1]]),
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            torch.nn.functional.binary_cross_entropy_with_logits,
        ),
    ],
    ids=["classes", "regression", "several classes"],
)
def test_classification_has_the_loss_of_its_problem_type(labels, changes, expected):
    model = build(NeoBERTForSequenceClassification, **changes).eval()
    output = model(torch.tensor([[5, 6], [7, 8]]), labels=labels)
    torch.testing.assert_close(output.loss, expected(output.logits, labels))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 3}, "does not divide"),
        ({"hidden_size": 18, "num_attention_heads": 6}, "must be even"),
        ({"pad_token_id": 40}, "outside the vocabulary"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        tiny(**changes)


def test_token_types_and_attention_weights_are_refused_unless_they_mean_nothing():
    model = build(NeoBERTModel).eval()
    ids = torch.tensor([[5, 6]])
    plain = model(ids).last_hidden_state
    same = model(ids, token_type_ids=torch.zeros_like(ids), output_attentions=False).last_hidden_state
    assert torch.equal(plain, same)
    with pytest.raises(UserError, match="return_token_type_ids=False"):
        model(ids, token_type_ids=torch.tensor([[0, 1]]))
    with pytest.raises(UserError, match="output_attentions"):
        model(ids, output_attentions=True)


def test_flash_attn_says_what_is_missing():
    model = build(NeoBERTModel, attn_backend="flash_attn_varlen")
    with pytest.raises(UserError) as error:
        model(torch.tensor([[5, 6]]))
    for part in ("CUDA device", "flash-attn", "bfloat16", "model.attn_backend: sdpa"):
        assert part in str(error.value)


def test_inputs_of_other_shapes_are_refused():
    model = build(NeoBERTModel)
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="cu_seqlens"):
        model(ids[0])
    with pytest.raises(ValueError, match="no attention_mask"):
        model(ids[0], torch.ones(2), cu_seqlens=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(ids, torch.ones(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"\[B, S\]"):
        model(ids, cu_seqlens=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="ends at 3"):
        model(ids[0], cu_seqlens=torch.tensor([0, 3]), max_seqlen=3, position_ids=torch.tensor([0, 1]))


def test_a_text_beyond_the_context_is_refused_and_padding_does_not_count():
    model = build(NeoBERTModel, max_position_embeddings=4)
    ids, mask = torch.ones(1, 6, dtype=torch.long), torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert model(ids, mask).last_hidden_state.shape == (1, 6, 16)
    with pytest.raises(UserError, match="6 tokens and max_position_embeddings is 4"):
        model(ids)


def test_trainers_find_no_way_to_pass_what_the_models_do_not_read():
    for kind in (NeoBERTModel, NeoBERTForMaskedLM, NeoBERTForSequenceClassification):
        parameters = inspect.signature(kind.forward).parameters.values()
        assert not [x for x in parameters if x.kind is inspect.Parameter.VAR_KEYWORD], kind


def test_resized_embeddings_stay_tied():
    model = build()
    model.resize_token_embeddings(48)
    assert model.decoder.weight is model.model.encoder.weight
    assert model(torch.tensor([[47, 5]])).logits.shape == (1, 2, 48)


def test_nothing_optional_is_needed_to_import():
    code = (
        "import sys\n"
        "for name in ('flash_attn', 'xformers', 'liger_kernel', 'deepspeed'): sys.modules[name] = None\n"
        "import inft.models.neobert, inft.models.neobert_import, inft.encoders.objective\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
