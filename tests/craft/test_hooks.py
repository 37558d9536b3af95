"""The hook against output_hidden_states and last_hidden_state, on today's decoder families and on plain modules."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from craft.hooks import (
    LastHiddenStateHook,
    get_backbone,
    get_decoder,
    hidden_size_of,
    last_hidden_state,
    unwrap,
)

SMALL = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 64, "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2,
    "num_experts_per_tok": 1, "moe_intermediate_size": 16,
}  # fmt: skip
DECODERS = [
    "llama", "mistral", "mixtral", "ministral3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2",
    "gemma3_text", "phi", "phi3", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "opt", "bloom", "falcon", "cohere",
    "cohere2", "olmo2", "olmo3", "stablelm", "starcoder2", "granite", "granitemoe", "mpt", "nemotron", "glm4",
    "smollm3", "xglm", "llama4_text", "mamba", "modernbert-decoder",
]  # fmt: skip
ENCODERS = ["bert", "roberta", "xlm-roberta", "modernbert", "deberta-v2", "electra", "distilbert", "albert", "eurobert"]
IDS = torch.arange(3, 17).reshape(2, 7)


def tiny(family: str, **fields: Any) -> PreTrainedModel:
    default = AutoConfig.for_model(family)
    small = {
        name: value
        for name, value in SMALL.items()
        if hasattr(default, name) and not isinstance(getattr(type(default), name, None), property)
    }
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    return auto.from_config(AutoConfig.for_model(family, **small, **fields)).eval()


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_the_hook_takes_the_last_hidden_state_of_every_family(family: str) -> None:
    # failure 12
    model = tiny(family)
    with LastHiddenStateHook(model) as hook, torch.no_grad():
        output = model(input_ids=IDS, output_hidden_states=True)
        hooked = hook.get()
        body = last_hidden_state(get_backbone(model)(input_ids=IDS))
    torch.testing.assert_close(hooked, output.hidden_states[-1])
    assert torch.equal(hooked, body)
    assert hooked.shape == (2, 7, hidden_size_of(model))
    assert not hook.is_attached


def test_the_size_is_that_of_the_output_where_it_is_narrower_than_the_layers() -> None:
    model = tiny("opt", word_embed_proj_dim=16)
    with LastHiddenStateHook(model) as hook:
        model(input_ids=IDS)
        assert hook.get().shape[-1] == hidden_size_of(model) == 16


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3_text", "opt", "cohere2"])
def test_it_works_through_lora_and_gradient_checkpointing_with_the_same_gradient(family: str) -> None:
    gradients = []
    for hooked in (True, False):
        model = get_peft_model(tiny(family), LoraConfig(target_modules="all-linear", init_lora_weights=False))
        model.train()
        if hooked:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with LastHiddenStateHook(model) as hook:
            output = model(input_ids=IDS, output_hidden_states=not hooked)
            state = hook.get() if hooked else output.hidden_states[-1]
        state.pow(2).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients[0].values()) > 4
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize("adapted", [False, True])
def test_it_takes_the_text_states_of_image_models(vlm: Any, make_sample: Any, adapted: bool) -> None:
    model = vlm.model()
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    batch = vlm.collator()([make_sample(), make_sample("Ein Kreis.", colour="blue")])
    labels = batch.pop("labels")
    with LastHiddenStateHook(model) as hook, torch.no_grad():
        output = model(**batch, labels=labels, output_hidden_states=True)
        hooked = hook.get()
        body = get_backbone(model)(**batch).last_hidden_state
    assert torch.equal(hooked, body)
    torch.testing.assert_close(hooked, output.hidden_states[-1])
    assert hooked.shape == (*batch["input_ids"].shape, hidden_size_of(model))
    assert hooked.shape[-1] == model.get_output_embeddings().in_features


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_wrappers_are_seen_through(family: str) -> None:
    model = tiny(family)
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj", "query"]))
    for wrapped in (model, lora, nn.DataParallel(lora), torch.compile(model), torch.compile(nn.DataParallel(lora))):
        assert unwrap(wrapped) is model
        assert get_backbone(wrapped) is model.base_model
        assert get_decoder(wrapped) is model.base_model
        assert hidden_size_of(wrapped) == 32
    assert get_backbone(model.base_model) is get_decoder(model.base_model) is model.base_model


def test_an_image_models_text_decoder_on_its_own_has_its_own_body(llama32: Any) -> None:
    from transformers import MllamaForCausalLM

    model = MllamaForCausalLM(llama32.model().config.text_config)
    assert get_backbone(model) is get_decoder(model) is model.model


def test_it_is_cleared_and_taken_off() -> None:
    model = tiny("llama")
    hook = LastHiddenStateHook(model)
    assert hook.is_attached
    assert hook.get_optional() is None
    with pytest.raises(ValueError, match="run the model first"):
        hook.get()
    model(input_ids=IDS)
    assert hook.get() is hook.hidden_state is hook.get_optional()
    assert hook.get().requires_grad
    hook.clear()
    assert hook.hidden_state is None
    hook.remove()
    model(input_ids=IDS)
    assert hook.hidden_state is None
    assert not hook.is_attached
    hook.remove()  # a second time does nothing


def test_a_layer_is_taken_by_name_also_inside_a_wrapper() -> None:
    model = tiny("llama")
    for outer in (model, nn.DataParallel(model)):
        with LastHiddenStateHook(outer, "model.layers.0") as hook, torch.no_grad():
            output = model(input_ids=IDS, output_hidden_states=True)
        torch.testing.assert_close(output.hidden_states[1], _first_layer(model))
        assert hook.hidden_state is None
    with pytest.raises(ValueError, match=r"no layer 'model.layer.0': names look like model"):
        LastHiddenStateHook(model, "model.layer.0")


def _first_layer(model: PreTrainedModel) -> Tensor:
    with LastHiddenStateHook(model, "model.layers.0") as hook, torch.no_grad():
        model(input_ids=IDS)
        return hook.get()


# Modules that are no transformers model


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Body(nn.Module):
    def __init__(self, norm: str) -> None:
        super().__init__()
        setattr(self, norm, Norm())
        self.last = norm

    def forward(self, input_ids: Tensor) -> Tensor:
        return getattr(self, self.last)(input_ids[..., None].float())


class Plain(nn.Module):
    """No parameters, no device, no config, no get_decoder."""

    def __init__(self, body: str, norm: str) -> None:
        super().__init__()
        setattr(self, body, Body(norm))
        self.body = body

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=getattr(self, self.body)(input_ids) + 1)


@pytest.mark.parametrize("norm", ["norm", "ln_f", "final_layernorm"])
@pytest.mark.parametrize("body", ["model", "transformer", "encoder"])
def test_a_plain_module_is_hooked_at_its_final_norm(body: str, norm: str) -> None:
    model = Plain(body, norm)
    assert get_backbone(model) is getattr(model, body)
    assert get_decoder(model) is getattr(getattr(model, body), norm)
    assert hidden_size_of(model) is None
    with LastHiddenStateHook(model) as hook:
        model(IDS)
        assert torch.equal(hook.get(), IDS[..., None] * 2.0)


class Whole(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output
        self.config = SimpleNamespace(n_embd=5)

    def forward(self) -> Any:
        return self.output


STATE = torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    "output",
    [
        STATE,
        (STATE, "cache"),
        {"last_hidden_state": STATE},
        SimpleNamespace(last_hidden_state=STATE, hidden_states=None),
        SimpleNamespace(hidden_states=(STATE + 1, STATE), logits=STATE + 2),
    ],
)
def test_a_module_without_any_known_part_is_its_own_body(output: Any) -> None:
    model = Whole(output)
    assert get_backbone(model) is get_decoder(model) is model
    assert hidden_size_of(model) == 5
    assert last_hidden_state(output) is STATE
    with LastHiddenStateHook(model) as hook:
        model()
        assert hook.get() is STATE


def test_a_model_without_hidden_states_is_told_what_to_do() -> None:
    output = SimpleNamespace(logits=STATE)
    with pytest.raises(ValueError, match=r"SimpleNamespace holds no hidden states.*output_hidden_states=True"):
        last_hidden_state(output)
    model = Whole(output)
    with LastHiddenStateHook(model) as hook:
        model()
        assert hook.get_optional() is None


def test_a_plain_module_around_a_transformers_model_has_that_ones_body() -> None:
    model = nn.Module()
    model.model, model.extra = tiny("opt"), nn.Linear(2, 2)
    assert get_backbone(model) is model.model.model
    assert get_decoder(model) is model.model.model.decoder


def test_a_plain_modules_own_get_decoder_is_believed() -> None:
    model = Plain("model", "norm")
    decoder = model.model
    model.get_decoder = lambda: decoder  # type: ignore[attr-defined]
    assert get_decoder(model) is decoder
