"""Aya Vision: one definition of the logits in every path."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import Cohere2ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from inft.models.aya import LogitScale, prepare


def reference_loss(model, batch):
    """Cross entropy by Cohere's definition, head(hidden) * logit_scale, in float64."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    hidden = model.model(**inputs).last_hidden_state.double()
    logits = hidden @ model.lm_head.weight.double().T * model.config.text_config.logit_scale
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def test_the_scale_matters(aya):
    assert aya.model().config.text_config.logit_scale not in (0, 1)


def test_plain_loss_fused_loss_and_definition_agree(aya, make_sample):
    model = aya.model()
    batch = aya.collator()([make_sample(), make_sample("دائرة", image=False)])
    with torch.no_grad():
        expected = reference_loss(model, batch)
        plain = model(**batch).loss
        add_fused_lm_head(model)
        fused = model(**batch, fused_lm_head=True).loss
    torch.testing.assert_close(plain.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(fused.double(), expected, atol=1e-6, rtol=1e-6)


def test_the_definition_is_that_of_cohere2(aya, make_sample):
    model = aya.model()
    batch = aya.collator()([make_sample(image=False)])
    with torch.device("meta"):
        cohere = Cohere2ForCausalLM(model.config.text_config)
    cohere.model, cohere.lm_head = model.model.language_model, torch.nn.Linear(1, 1, bias=False)
    cohere.lm_head.weight = model.lm_head.weight
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, cohere(batch["input_ids"]).logits)


def test_gradients_of_both_heads_agree_under_lora(aya, make_sample):
    batch = aya.collator()([make_sample()])
    gradients = []
    for fused in (False, True):
        base = aya.model()
        if fused:
            add_fused_lm_head(base)
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False))
        model(**batch, **({"fused_lm_head": True} if fused else {})).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, through_fused in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, through_fused, atol=1e-6, rtol=1e-4)


def test_generation_scores_are_scaled_too(aya, make_sample):
    model, prompts = aya.model(), aya.collator().prompts([make_sample()])
    out = model.generate(**prompts, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        torch.testing.assert_close(out.logits[0], model(**prompts).logits[:, -1], atol=1e-5, rtol=1e-5)


def test_preparing_twice_scales_once(aya):
    model = prepare(prepare(aya.model()))
    assert sum(isinstance(hook, LogitScale) for hook in model.lm_head._forward_hooks.values()) == 1


def test_a_forward_that_scales_by_itself_is_left_alone(aya):
    model = aya.model()
    model.lm_head._forward_hooks.clear()

    class Mended(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * self.config.text_config.logit_scale
            return output

    model.__class__ = Mended
    prepare(model)
    assert not model.lm_head._forward_hooks
