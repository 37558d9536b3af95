"""Flat streams, padded batches and documents alone: the same hidden states, losses and gradients."""

import pytest
import torch
from encoder_streams import gradients, pad, stream, texts, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from inft.encoders.objective import masked_lm_loss

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


@pytest.mark.parametrize("rope", [True, False], ids=["rotary", "learned"])
@settings(max_examples=20, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_packed_loss_and_gradients_are_those_of_each_document_alone(rope, lengths, seed):
    model = tiny_model(rope=rope)
    documents = texts(lengths, seed)
    packed = masked_lm_loss(model, stream(documents))
    packed_gradients = gradients(model, packed.loss_sum)
    alone = [masked_lm_loss(model, stream([document])) for document in documents]
    total = sum(loss.loss_sum for loss in alone)
    torch.testing.assert_close(packed.loss_sum, total, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(packed_gradients, gradients(model, total), rtol=1e-6, atol=1e-12)
    assert packed.count == sum(loss.count for loss in alone)
    assert packed.correct == sum(loss.correct for loss in alone)


@settings(max_examples=20, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 99), left=st.booleans(), spare=st.integers(0, 3))
def test_a_padded_batch_gives_the_loss_and_gradients_of_the_stream(lengths, seed, left, spare):
    model = tiny_model()
    documents = texts(lengths, seed)
    flat = masked_lm_loss(model, stream(documents))
    flat_gradients = gradients(model, flat.loss_sum)
    batch = pad(documents, left=left, spare=spare)
    for masked_only in (True, False):
        padded = model(**batch, masked_only=masked_only, reduction="sum")
        torch.testing.assert_close(padded.loss, flat.loss_sum, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradients(model, padded.loss), flat_gradients, rtol=1e-6, atol=1e-12)
        assert padded.correct == flat.correct


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_hidden_states_at_padding_are_zeros_and_others_those_of_the_stream(left):
    model = tiny_model().model
    documents = texts([3, 0, 7], 1)
    flat = stream(documents)
    expected = model(flat.input_ids_T, cu_seqlens=flat.cu_seqlens).last_hidden_state
    batch = pad(documents, left=left, spare=2)
    found = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected, rtol=0, atol=1e-12)
    assert (found[~real] == 0).all()


@pytest.mark.parametrize("rope", [True, False], ids=["rotary", "learned"])
def test_no_document_sees_another(rope):
    model = tiny_model(rope=rope).model
    documents = texts([5, 4, 5, 5], 2)
    before = stream(documents)
    changed = stream([documents[0], (documents[1][0] + 1, documents[1][1]), *documents[2:]])
    first, second = (model(x.input_ids_T, cu_seqlens=x.cu_seqlens).last_hidden_state for x in (before, changed))
    others = torch.tensor([True] * 5 + [False] * 4 + [True] * 10)
    assert torch.equal(first[others], second[others])
    assert not torch.isclose(first[~others], second[~others]).any(1).all()


@pytest.mark.parametrize("rope", [True, False], ids=["rotary", "learned"])
def test_positions_restart_in_each_document(rope):
    model = tiny_model(rope=rope).model
    document = texts([6], 3)[0]
    x = stream([document, texts([3], 4)[0], document])
    hidden = model(x.input_ids_T, cu_seqlens=x.cu_seqlens).last_hidden_state
    torch.testing.assert_close(hidden[:6], hidden[9:], rtol=0, atol=1e-12)
    told = model(x.input_ids_T, cu_seqlens=x.cu_seqlens, position_ids=x.position_ids_T, max_seqlen=x.max_seqlen)
    assert torch.equal(hidden, told.last_hidden_state)


@pytest.mark.parametrize("rope", [True, False], ids=["rotary", "learned"])
def test_order_within_a_document_matters(rope):
    model = tiny_model(rope=rope).model
    ids = torch.tensor([[7, 8, 9, 7]])
    hidden = model(ids).last_hidden_state[0]
    assert not torch.allclose(hidden[0], hidden[3])


@pytest.mark.parametrize("padded", [False, True], ids=["flat", "padded"])
def test_gradient_checkpointing_changes_no_gradient(padded):
    model = tiny_model(dropout_prob=0.3).train()
    documents = texts([4, 6, 1], 5)

    def run():
        torch.manual_seed(11)
        if padded:
            loss = model(**pad(documents, left=False), masked_only=True, reduction="sum").loss
        else:
            loss = masked_lm_loss(model, stream(documents)).loss_sum
        return loss, gradients(model, loss)

    plain = run()
    calls = []
    model.activation_checkpointing_enable()
    for block in model.model.transformer_encoder:
        block.qkv.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(run(), plain, rtol=1e-10, atol=1e-12)
    assert len(calls) == 2 * len(model.model.transformer_encoder), "every block is computed twice"


def test_a_batch_of_empty_documents_has_loss_zero_with_a_graph():
    model = tiny_model()
    loss = masked_lm_loss(model, stream(texts([0, 0], 0)))
    assert float(loss.loss_sum.detach()) == 0
    assert all((g == 0).all() for g in gradients(model, loss.loss_sum))


def compiled_equals_eager(backend):
    torch._dynamo.reset()
    model = tiny_model()
    compiled = torch.compile(model, backend=backend)
    for seed, lengths in enumerate(([4, 6, 1], [4, 4, 3], [9, 0, 5, 2])):
        batch = stream(texts(lengths, seed))
        expected, found = masked_lm_loss(model, batch), masked_lm_loss(compiled, batch)
        torch.testing.assert_close(found.loss_sum, expected.loss_sum, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            gradients(model, found.loss_sum), gradients(model, expected.loss_sum), rtol=1e-6, atol=1e-11
        )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_has_the_same_loss_and_gradients(backend):
    compiled_equals_eager(backend)


@pytest.mark.slow
def test_a_model_compiled_to_machine_code_has_the_same_loss_and_gradients():
    compiled_equals_eager("inductor")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rope", [True, False], ids=["rotary", "learned"])
def test_the_cuda_kernel_gives_the_hidden_states_of_the_loop(rope):
    model = tiny_model(rope=rope, hidden_size=128).cuda().model
    batch = stream(texts([5, 0, 31, 4, 4, 17], 6))
    inputs = {"input_ids": batch.input_ids_T.cuda(), "cu_seqlens": batch.cu_seqlens.cuda()}
    expected = model(**inputs).last_hidden_state  # float64: document by document
    found = model.to(torch.bfloat16)(**inputs).last_hidden_state
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.05)
