"""The masked-LM objective: masked positions alone, fused or with all logits, the same loss and gradients."""

import pytest
import torch
import torch.nn.functional as F
from encoder_streams import gradients, stream, texts, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from inft.encoders.objective import masked_lm_loss, resolve_fused
from inft.models import masked_lm
from params.errors import UserError

PATHS = {
    "masked only": {"fused": "off"},
    "auto": {},
    "torch's kernel": {"fused": "torch"},
    "full logits": {"masked_only": False},
}


def plain_loss(model, batch):
    """Σ -log p(label), one position after the other."""
    hidden_TH = model.model(batch.input_ids_T, cu_seqlens=batch.cu_seqlens).last_hidden_state
    total = model.decoder(hidden_TH).sum() * 0
    for hidden_H, label in zip(hidden_TH, batch.labels_T.tolist(), strict=True):
        if label != -100:
            logits_V = model.decoder(hidden_H)
            total = total + logits_V.exp().sum().log() - logits_V[label]
    return total


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "decoder_bias": True}], ids=["tied", "bias"])
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_every_path_is_the_plain_loss(path, changes, lengths, seed):
    model = tiny_model(**changes)
    batch = stream(texts(lengths, seed))
    found = masked_lm_loss(model, batch, **PATHS[path])
    expected = plain_loss(model, batch)
    torch.testing.assert_close(found.loss_sum, expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(gradients(model, found.loss_sum), gradients(model, expected), rtol=1e-6, atol=1e-10)
    assert found.count == batch.masked


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_chunks_of_the_fused_loss_add_up(path, monkeypatch):
    monkeypatch.setattr(masked_lm, "ROWS", 4)
    model, batch = tiny_model(), stream(texts([20, 9], 3))
    assert batch.masked > 8
    found = masked_lm_loss(model, batch, **PATHS[path])
    torch.testing.assert_close(found.loss_sum, plain_loss(model, batch), rtol=1e-6, atol=0)
    most_likely = model(batch.input_ids_T, cu_seqlens=batch.cu_seqlens).logits.argmax(-1)
    assert int(found.correct) == int((most_likely == batch.labels_T).sum())
    assert not found.correct.requires_grad


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_no_masked_position_is_loss_zero_with_a_graph(path):
    model, batch = tiny_model(), stream(texts([6, 3], 0, share=0.0))
    found = masked_lm_loss(model, batch, **PATHS[path])
    assert float(found.loss_sum.detach()) == 0
    assert (found.count, int(found.correct)) == (0, 0)
    assert all((g == 0).all() for g in gradients(model, found.loss_sum))


def test_masked_only_makes_no_logits_of_other_positions():
    model, batch = tiny_model(), stream(texts([30, 20], 1, share=0.2))
    rows = []
    model.decoder.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    masked_lm_loss(model, batch)
    assert rows == [batch.masked]


def test_the_loss_goes_through_the_forward_pass_of_a_wrapper():
    class Wrapper(torch.nn.Module):
        """As DistributedDataParallel: its work hangs on its own forward."""

        def __init__(self, module):
            super().__init__()
            self.module = module
            self.calls = 0

        def forward(self, *args, **inputs):
            self.calls += 1
            return self.module(*args, **inputs)

    model, batch = tiny_model(), stream(texts([6, 5], 2))
    wrapper = Wrapper(model)
    found = masked_lm_loss(wrapper, batch)
    assert wrapper.calls == 1
    assert torch.equal(found.loss_sum, masked_lm_loss(model, batch).loss_sum)


def test_a_masked_lm_has_transformers_mean_loss():
    model, batch = tiny_model(), stream(texts([6, 5], 2))
    output = model(batch.input_ids_T, cu_seqlens=batch.cu_seqlens, labels=batch.labels_T)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, batch.labels_T))
    only = model(batch.input_ids_T, cu_seqlens=batch.cu_seqlens, labels=batch.labels_T, masked_only=True)
    torch.testing.assert_close(only.loss, output.loss)
    assert only.logits is None


@pytest.mark.parametrize("path", ["masked only", "torch's kernel", "full logits"])
def test_bfloat16_autocast_sums_in_float32(path):
    model, batch = tiny_model().float(), stream(texts([40, 20], 2))
    with torch.autocast("cpu", torch.bfloat16):
        found = masked_lm_loss(model, batch, **PATHS[path])
    assert found.loss_sum.dtype == torch.float32
    torch.testing.assert_close(found.loss_sum, plain_loss(model, batch), rtol=0.05, atol=0)
    found.loss_sum.backward()
    assert model.model.encoder.weight.grad.dtype == torch.float32


def test_kernels_that_cannot_run_say_what_is_missing():
    model, batch = tiny_model(), stream(texts([6], 0))
    with pytest.raises(UserError, match=r"liger needs .*CUDA device.*fused_linear_cross_entropy: off"):
        masked_lm_loss(model, batch, fused="liger")
    with pytest.raises(UserError, match="masked_logits_only_loss: true"):
        masked_lm_loss(model, batch, masked_only=False, fused="torch")
    with pytest.raises(ValueError, match="masked_only needs labels"):
        model(batch.input_ids_T, cu_seqlens=batch.cu_seqlens, masked_only=True)


def test_a_converted_head_is_called_as_it_is():
    class Converted(torch.nn.Linear):
        """What a low-precision recipe puts in the place of a linear layer."""

    model, batch = tiny_model(), stream(texts([6], 0))
    model.decoder.__class__ = Converted
    assert resolve_fused("auto", model, "cuda") == "off"
    with pytest.raises(UserError, match="converted to Converted"):
        masked_lm_loss(model, batch, fused="torch")


def test_auto_is_off_on_a_cpu_and_a_kernel_on_cuda():
    model = tiny_model()
    assert resolve_fused("auto", model, "cpu") == "off"
    assert resolve_fused("auto", model, "cuda") == ("liger" if masked_lm.has_liger() else "torch")
