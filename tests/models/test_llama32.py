"""Llama 3.2 Vision: rows without an image beside rows with one."""

import pytest
import torch

from inft.models.llama32 import skip_rows_without_image


def hooks(model):
    layers = model.model.language_model.layers
    return [sum(hook is skip_rows_without_image for hook in layer._forward_hooks.values()) for layer in layers]


def test_every_cross_attention_layer_is_mended_once(llama32):
    model = llama32.spec.prepare(llama32.model())
    assert hooks(model) == [int(hasattr(layer, "cross_attn")) for layer in model.model.language_model.layers]


def test_without_the_mending_a_text_row_depends_on_its_neighbours(llama32, make_sample):
    model, collator = llama32.model(), llama32.collator()
    for layer in model.model.language_model.layers:
        layer._forward_hooks.clear()
    batch, alone = collator([make_sample(), make_sample("A", image=False)]), collator([make_sample("A", image=False)])
    with torch.no_grad():
        together = model(**batch).logits[1][batch["attention_mask"][1].bool()]
        difference = (together - model(**alone).logits[0]).abs().max()
    assert difference > 1e-3, "transformers now masks these rows itself: the hook can go"


def test_image_rows_keep_the_logits_of_the_unmended_model(llama32, make_sample):
    model, batch = llama32.model(), llama32.collator()([make_sample(), make_sample("B", colour="blue")])
    with torch.no_grad():
        mended = model(**batch).logits
        for layer in model.model.language_model.layers:
            layer._forward_hooks.clear()
        assert torch.equal(model(**batch).logits, mended)


def test_a_text_row_generates_the_same_beside_an_image_row(llama32, make_sample):
    model, collator = llama32.model(), llama32.collator()
    row = make_sample(image=False)
    options = {"max_new_tokens": 6, "do_sample": False}
    beside = model.generate(**collator.prompts([make_sample(), row]), **options)[1, -6:]
    assert torch.equal(beside, model.generate(**collator.prompts([row]), **options)[0, -6:])


def test_no_gradient_reaches_the_cross_attention_from_text_rows(llama32, make_sample):
    model = llama32.model().train()
    batch = llama32.collator()([make_sample(), make_sample("A", image=False)])
    batch["labels"][0] = -100
    model(**batch).loss.backward()
    layer = next(layer for layer in model.model.language_model.layers if hasattr(layer, "cross_attn"))
    assert layer.cross_attn.q_proj.weight.grad.abs().max() == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_hook_works_under_gradient_checkpointing(llama32, make_sample, checkpointing):
    model = llama32.model().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = llama32.collator()([make_sample(), make_sample("A", image=False)])
    loss = model(**batch).loss
    loss.backward()
    layer = next(layer for layer in model.model.language_model.layers if hasattr(layer, "cross_attn"))
    assert layer.cross_attn.q_proj.weight.grad.abs().max() > 0
    torch.testing.assert_close(loss.detach(), llama32.model()(**batch).loss.detach())


def test_the_image_changes_the_logits(llama32, make_sample):
    model, collator = llama32.model(), llama32.collator()
    red, blue = (model(**collator([make_sample(colour=colour)])).logits for colour in ("red", "blue"))
    assert (red - blue).abs().max() > 1e-3
