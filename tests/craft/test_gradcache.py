"""GradCache: the gradients of the whole batch in the memory of one chunk."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_encoders import VOCABULARY, Tiny, clear, gradients, llama, make_rows, mean_pool, relative
from torch import nn
from transformers import BertConfig, BertModel

from craft.gradcache import grad_cache, split_rows
from craft.losses import info_nce


def plain(encode, chunks):
    return torch.cat([encode(chunk) for chunk in chunks])


def both(modules, encode, chunks, *, scale=1.0, seed=1):
    """Gradients and embeddings through grad_cache and through the plain graph, from the same random state."""
    results = []
    for way in (grad_cache, plain):
        clear(*modules)
        torch.manual_seed(seed)
        z_MD = way(encode, chunks)
        (scale * nonlinear(z_MD)).backward()
        results.append((gradients(*modules), z_MD.detach()))
    return results


def nonlinear(z_MD):
    """Some loss in which every row matters to every other."""
    return (z_MD @ z_MD.T).logsumexp(1).sum() + z_MD.sin().sum()


def tiny_encoder(dtype=torch.float64, dropout=0.3, seed=0):
    torch.manual_seed(seed)
    backbone, head = Tiny(dropout=dropout).to(dtype), nn.Linear(6, 5).to(dtype)

    def encode(chunk):
        return F.normalize(head(mean_pool(backbone(**chunk), chunk["attention_mask"])), dim=-1)

    return (backbone, head), encode


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=12),
    chunk_size=st.integers(1, 5),
    left=st.booleans(),
    scale=st.floats(1e-3, 1e4),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=50, derandomize=True)
def test_gradients_equal_the_plain_graph_with_dropout_at_any_shape_and_scale(lengths, chunk_size, left, scale, seed):
    # failure 4: the published package sends no gradient to the backbone and ignores the scale of the loss
    modules, encode = tiny_encoder(seed=seed)
    chunks, _ = split_rows(make_rows(lengths, left=left, seed=seed), chunk_size)
    (found, z_MD), (expected, plain_z_MD) = both(modules, encode, chunks, scale=scale)
    assert torch.equal(z_MD, plain_z_MD)
    assert relative(found, expected) <= 1e-12


@given(lengths=st.lists(st.integers(1, 7), min_size=2, max_size=12), chunk_size=st.integers(1, 5), left=st.booleans())
@settings(deadline=None, max_examples=50, derandomize=True)
def test_sorted_and_trimmed_chunks_equal_the_whole_batch(lengths, chunk_size, left):
    modules, encode = tiny_encoder(dropout=0.0)
    rows = make_rows(lengths, left=left, width=9)
    expected_BD = encode(rows)
    nonlinear(expected_BD * torch.arange(1, len(lengths) + 1).unsqueeze(1)).backward()
    expected = gradients(*modules)
    clear(*modules)
    chunks, index_B = split_rows(rows, chunk_size)
    z_BD = grad_cache(encode, chunks)[index_B]
    nonlinear(z_BD * torch.arange(1, len(lengths) + 1).unsqueeze(1)).backward()
    torch.testing.assert_close(z_BD, expected_BD, rtol=1e-12, atol=1e-12)
    assert relative(gradients(*modules), expected) <= 1e-12


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return BertModel(config, add_pooling_layer=False).train()


def adapted():
    model = get_peft_model(llama(), LoraConfig(r=3, lora_dropout=0.2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def checkpointed(make, *, reentrant):
    model = make()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


ENCODERS = {
    "decoder": llama,
    "encoder": bert,
    "LoRA": adapted,
    "checkpointing": lambda: checkpointed(bert, reentrant=False),
    "reentrant checkpointing": lambda: checkpointed(bert, reentrant=True),
    "LoRA with checkpointing": lambda: checkpointed(adapted, reentrant=False),
}


def model_encoder(model, dtype):
    head = nn.Linear(16, 5).to(dtype)

    def encode(chunk):
        pooled_BH = mean_pool(model(**chunk).last_hidden_state, chunk["attention_mask"])
        with torch.autocast("cpu", enabled=False):
            return F.normalize(head(pooled_BH.to(dtype)), dim=-1)

    return (model, head), encode


@pytest.mark.filterwarnings("ignore:.*use_reentrant.*", "ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("name", ENCODERS)
def test_real_encoders_get_the_gradients_of_the_plain_graph(name, dtype, limit, left):
    # failure 4
    modules, encode = model_encoder(ENCODERS[name]().to(dtype), dtype)
    chunks, _ = split_rows(make_rows([3, 9, 5, 7, 2, 8, 8, 4, 6], left=left), 2)
    (found, z_MD), (expected, plain_z_MD) = both(modules, encode, chunks, scale=37.0)
    assert torch.equal(z_MD, plain_z_MD)
    assert relative(found, expected) <= limit


def test_autocast_of_the_forward_pass_is_restored_in_backward():
    # failures 15 and 16: bfloat16 in the encoder, float32 in the head, also when backward runs outside of the region
    modules, encode = model_encoder(llama(), torch.float32)
    chunks, _ = split_rows(make_rows([3, 9, 5, 7, 2, 8, 8]), 2)
    found = []
    for way, cache in ((grad_cache, True), (grad_cache, False), (plain, False)):
        clear(*modules)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            z_MD = way(encode, chunks)
        assert z_MD.dtype == torch.float32
        nonlinear(z_MD).backward()
        found.append(gradients(*modules))
    assert relative(found[0], found[2]) <= 1e-6
    assert relative(found[1], found[2]) <= 1e-6
    clear(*modules)
    torch.manual_seed(1)
    nonlinear(plain(encode, chunks)).backward()
    assert relative(found[0], gradients(*modules)) > 1e-4, "autocast was not on at all"


def test_the_head_keeps_float32_gradients_when_backward_runs_inside_autocast():
    modules, encode = model_encoder(llama(), torch.float32)
    chunks, _ = split_rows(make_rows([4] * 6), 2)
    found = []
    for inside in (False, True):
        clear(*modules)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            z_MD = grad_cache(encode, chunks)
            if inside:
                z_MD.backward(torch.ones_like(z_MD))
        if not inside:
            z_MD.backward(torch.ones_like(z_MD))
        found.append(modules[1].weight.grad.clone())
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2)  # the kept chunk is the caller's own region


def test_both_sides_of_pairs_may_be_encoded_before_one_backward():
    modules, encode = tiny_encoder()
    anchors, _ = split_rows(make_rows([3, 5, 2, 4, 4], seed=1), 2)
    positives, _ = split_rows(make_rows([2, 2, 6, 1, 3], seed=2), 2)
    found = []
    for way in (grad_cache, plain):
        clear(*modules)
        torch.manual_seed(3)
        z_BD, other_BD, third_BD = way(encode, anchors), way(encode, positives), way(encode, anchors)
        log_temperature = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
        losses_B = info_nce(z_BD, other_BD, temperature=log_temperature.exp(), negatives_ND=third_BD).losses_B
        losses_B.mean().backward()
        found.append(torch.cat([gradients(*modules), log_temperature.grad.flatten()]))
    assert relative(*found) <= 1e-12


def test_gradients_add_to_those_that_are_there():
    modules, encode = tiny_encoder(dropout=0.0)
    chunks, _ = split_rows(make_rows([3, 5, 2, 4, 4]), 2)
    nonlinear(grad_cache(encode, chunks)).backward()
    once = gradients(*modules)
    nonlinear(grad_cache(encode, chunks)).backward()
    assert relative(gradients(*modules), 2 * once) <= 1e-12


def test_a_second_backward_over_a_retained_graph_is_right():
    modules, encode = tiny_encoder()
    chunks, _ = split_rows(make_rows([3, 5, 2, 4, 4]), 2)
    z_MD = grad_cache(encode, chunks)
    z_MD.backward(torch.ones_like(z_MD), retain_graph=True)
    once = gradients(*modules)
    z_MD.backward(torch.ones_like(z_MD))
    assert relative(gradients(*modules), 2 * once) <= 1e-12


def test_random_states_are_those_of_the_plain_graph_and_untouched_by_backward():
    _, encode = tiny_encoder()
    chunks, _ = split_rows(make_rows([3, 5, 2, 4, 4]), 2)
    torch.manual_seed(5)
    plain(encode, chunks)
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    z_MD = grad_cache(encode, chunks)
    assert torch.equal(torch.get_rng_state(), expected)
    torch.manual_seed(6)
    before = torch.get_rng_state()
    nonlinear(z_MD).backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_random_states_are_restored_after_an_error_in_backward():
    _, encode = tiny_encoder()
    calls = itertools.count()

    def failing(chunk):
        if next(calls) == 4:  # three chunks forward, then the second replay
            raise ArithmeticError("out of luck")
        return encode(chunk)

    chunks, _ = split_rows(make_rows([3, 5, 2, 4, 4]), 2)
    loss = nonlinear(grad_cache(failing, chunks))
    before = torch.get_rng_state()
    with pytest.raises(ArithmeticError):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_each_chunk_but_the_last_is_encoded_twice():
    _, encode = tiny_encoder()
    seen = []

    def counted(chunk):
        seen.append((len(chunk["input_ids"]), torch.is_grad_enabled()))
        return encode(chunk)

    chunks, _ = split_rows(make_rows([4] * 7), 3)
    nonlinear(grad_cache(counted, chunks)).backward()
    # The incomplete chunk comes first: the one that is not repeated is full.
    assert seen == [(1, False), (3, False), (3, True), (1, True), (3, True)]


def test_without_anything_to_train_there_is_no_graph():
    modules, encode = tiny_encoder(dropout=0.0)
    chunks, _ = split_rows(make_rows([3, 5, 2, 4]), 2)
    with torch.no_grad():
        z_MD = grad_cache(encode, chunks)
    for module in modules:
        module.requires_grad_(False)
    frozen_MD = grad_cache(encode, chunks)
    assert not z_MD.requires_grad
    assert not frozen_MD.requires_grad
    assert torch.equal(z_MD, frozen_MD)


def test_no_chunk_is_an_error():
    with pytest.raises(ValueError, match="no chunk"):
        grad_cache(lambda chunk: chunk, [])


class Ledger:
    """Bytes of tensors that autograd holds for backward."""

    def __init__(self):
        self.live = self.peak = 0

    def pack(self, tensor):
        return Held(self, tensor)


class Held:
    def __init__(self, ledger, tensor):
        self.ledger, self.tensor = ledger, tensor
        ledger.live += tensor.nbytes
        ledger.peak = max(ledger.peak, ledger.live)

    def __del__(self):
        self.ledger.live -= self.tensor.nbytes


def held_bytes(model, rows, chunk_size):
    """Bytes held after encoding a batch, and the most that were held until the end of backward."""
    ledger = Ledger()
    _, encode = model_encoder(model, torch.float32)
    chunks, _ = split_rows(make_rows([8] * rows), chunk_size)
    with torch.autograd.graph.saved_tensors_hooks(ledger.pack, lambda held: held.tensor):
        z_MD = grad_cache(encode, chunks)
        after_forward = ledger.live
        z_MD.backward(torch.ones_like(z_MD))
    assert ledger.live == 0
    return after_forward, ledger.peak


@pytest.mark.parametrize("make", [llama, adapted], ids=["full", "LoRA"])
def test_memory_is_that_of_one_chunk_whatever_the_batch(make):
    model = make()
    one_chunk = held_bytes(model, 4, 4)
    assert held_bytes(model, 16, 4) == one_chunk
    assert held_bytes(model, 64, 4) == one_chunk
    assert held_bytes(model, 16, 16)[1] > 3 * one_chunk[1]


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=15), chunk_size=st.integers(1, 6), extra=st.integers(0, 3)
)
@settings(deadline=None, max_examples=50, derandomize=True)
def test_chunks_hold_every_row_once_and_no_more_padding_than_their_longest_row(lengths, chunk_size, extra):
    width = max(max(lengths), 1) + extra
    rows = make_rows(lengths, width=width)
    rows["number"] = torch.arange(len(lengths))
    rows["pixel_values"] = torch.arange(len(lengths) * 3 * width).reshape(len(lengths), 3, width)
    chunks, index_B = split_rows(rows, chunk_size)
    assert torch.equal(torch.cat([chunk["number"] for chunk in chunks])[index_B], rows["number"])
    assert len(chunks) == -(-len(lengths) // chunk_size)
    assert max(len(chunk["number"]) for chunk in chunks) <= chunk_size
    for chunk in chunks:
        numbers = chunk["number"]
        longest = max(1, *(lengths[number] for number in numbers))
        assert chunk["input_ids"].shape[1] == chunk["attention_mask"].shape[1] == longest
        assert torch.equal(chunk["input_ids"], rows["input_ids"][numbers, :longest])
        assert torch.equal(chunk["pixel_values"], rows["pixel_values"][numbers])


def test_leading_padding_stays_because_positions_count_from_it():
    rows = make_rows([2, 5, 1, 3], left=True)
    chunks, index_B = split_rows(rows, 2)
    assert all(chunk["input_ids"].shape[1] == 5 for chunk in chunks)
    assert index_B.tolist() == [0, 1, 2, 3]


def test_lengths_can_be_given_and_without_any_nothing_is_cut():
    rows = {"inputs_embeds": torch.randn(3, 4, 2), "cross_attention_mask": torch.ones(3, 4, 1, 2)}
    chunks, index_B = split_rows(rows, 2, lengths_B=torch.tensor([4, 1, 3]))
    assert [tuple(chunk["cross_attention_mask"].shape) for chunk in chunks] == [(1, 1, 1, 2), (2, 4, 1, 2)]
    assert torch.equal(torch.cat([c["inputs_embeds"][:, 0] for c in chunks])[index_B], rows["inputs_embeds"][:, 0])
    whole, index_B = split_rows(rows, 2)
    assert [chunk["inputs_embeds"].shape[1] for chunk in whole] == [4, 4]
    assert index_B.tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(5, 3, 2), ()], ids=["tiles of all images in one dimension", "a number"])
def test_a_tensor_without_one_entry_per_row_is_named(shape):
    rows = {**make_rows([2, 3, 3]), "pixel_values": torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"pixel_values.*3 rows.*craft_use_gradcache=False"):
        split_rows(rows, 2)


def test_a_chunk_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="craft_gradcache_chunk_size is 0"):
        split_rows(make_rows([2, 3]), 0)
