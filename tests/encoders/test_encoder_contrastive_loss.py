"""The contrastive loss and its gradients against equations in float64, text by text; GradCache, SimCSE, duplicates."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pairs import bert, neobert, tokenizer

from craft.pooling import pool_hidden_states
from inft.encoders.contrastive.batches import BatchDraws, ContrastiveBatch, pair_batch, simcse_batch
from inft.encoders.contrastive.encode import Dropout, TextEncoder, flat_inputs, padded_inputs, pool_flat
from inft.encoders.contrastive.objective import chunks_by_length, contrastive_loss, encode_batch
from inft.encoders.contrastive.tokenized import TokenizedRow, text_key, tokens_of
from params.encoder import ContrastiveParams

POOLINGS = ("mean", "cls", "last_token", "weighted_mean")
MODELS = {"neobert": neobert, "bert": bert}
LOCAL = ContrastiveParams(gather_negatives=False)


def row(query: str, positives: list[str], negatives: list[str] = ()) -> TokenizedRow:
    words = tokenizer()
    texts = [[query], positives, list(negatives)]
    (tokens,), *others = (tokens_of(part, "", 48, words) for part in texts)
    return TokenizedRow(
        tokens, text_key(query), others[0], [text_key(t) for t in positives], others[1], [text_key(t) for t in texts[2]]
    )


def batch_of(rows: list[TokenizedRow], most: int = 9) -> ContrastiveBatch:
    numbers = [(0, 0, number) for number in range(len(rows))]
    return pair_batch(rows, numbers, "rows", BatchDraws(seed=0, max_negatives=most))


def plain_batch() -> ContrastiveBatch:
    return batch_of(
        [
            row("where is the red cat", ["a red cat stands here of old"], ["a red dog", "a car"]),
            row("where is the car", ["a car"]),
            row("tree", ["the very old tree stands here is green"], ["a very old house"]),
            row("a gold lamp of the house", ["lamp"], ["a red dog"]),
            row("horse", ["a brown horse stands"], ["the bird", "bird"]),
        ]
    )


def encoder_of(model, pooling="mean") -> TextEncoder:
    return TextEncoder(model=model, pooling=pooling, pad_token_id=0)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def stepped(encoder: TextEncoder, batch: ContrastiveBatch, params: ContrastiveParams):
    encoder.model.zero_grad(set_to_none=True)
    losses_B = contrastive_loss(encoder, batch, params).losses_B
    losses_B.mean().backward()
    return losses_B.detach(), gradients(encoder.model)


def by_equation(model, batch: ContrastiveBatch, params: ContrastiveParams, pooling: str) -> torch.Tensor:
    """The losses from each text encoded by itself, in loops over Python numbers."""

    def vector(text: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(text.astype(np.int64))[None]
        hidden_TH = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        count = len(hidden_TH)
        weights = {
            "mean": [1.0] * count,
            "cls": [1.0] + [0.0] * (count - 1),
            "last_token": [0.0] * (count - 1) + [1.0],
            "weighted_mean": [float(place + 1) for place in range(count)],
        }[pooling]
        pooled = sum(w * h for w, h in zip(weights, hidden_TH, strict=True)) / sum(weights)
        return pooled / pooled.norm()

    queries, positives, negatives = (
        [vector(t) for t in texts] for texts in (batch.queries, batch.positives, batch.negatives)
    )
    texts = [[t.tobytes() for t in part] for part in (batch.queries, batch.positives, batch.negatives)]
    known = [
        {(kind, key) for keys in found for kind, key in enumerate(keys) if key}
        for found in batch.known_keys_BP2.tolist()
    ]
    losses = []
    for i, query in enumerate(queries):
        own = {texts[0][i], texts[1][i]}
        shared = [j != i and bool(own & {texts[0][j], texts[1][j]}) for j in range(len(queries))]
        terms = [
            torch.exp(query @ p / params.temperature)
            for j, p in enumerate(positives)
            if j == i or not (shared[j] or answers(batch.positive_keys_B2[j], known[i]))
        ]
        for n, keys in zip(negatives, batch.negative_keys_N2, strict=True):
            if not answers(keys, known[i]):
                terms.append(params.hard_negative_weight * torch.exp(query @ n / params.temperature))
        loss = torch.log(sum(terms)) - query @ positives[i] / params.temperature
        if params.loss_type == "symmetric":
            back = [
                torch.exp(positives[i] @ q / params.temperature)
                for j, q in enumerate(queries)
                if j == i or not (shared[j] or answers(batch.positive_keys_B2[i], known[j]))
            ]
            loss = (loss + torch.log(sum(back)) - query @ positives[i] / params.temperature) / 2
        losses.append(loss)
    return torch.stack(losses)


def answers(keys_2: torch.Tensor, known: set[tuple[int, int]]) -> bool:
    """Whether a text is, by its own key or that of its tokens, among a row's known texts."""
    return any((kind, key) in known for kind, key in enumerate(keys_2.tolist()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("loss_type", ["info_nce", "symmetric"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_loss_and_gradients_equal_the_equation_in_float64(name, pooling, loss_type, chunk):
    model = MODELS[name]().double()
    batch = plain_batch()
    params = replace(LOCAL, loss_type=loss_type, temperature=0.1, hard_negative_weight=2.5, gradcache_chunk_size=chunk)
    losses_B, found = stepped(encoder_of(model, pooling), batch, params)
    model.zero_grad(set_to_none=True)
    expected_B = by_equation(model, batch, params, pooling)
    expected_B.mean().backward()
    torch.testing.assert_close(losses_B, expected_B.detach(), rtol=1e-9, atol=1e-9)
    for weight, gradient in gradients(model).items():
        torch.testing.assert_close(found[weight], gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_gradcache_equals_the_plain_gradient(name, chunk):
    model, batch = MODELS[name](), plain_batch()
    losses_B, plain = stepped(encoder_of(model), batch, LOCAL)
    cached_B, cached = stepped(encoder_of(model), batch, replace(LOCAL, gradcache_chunk_size=chunk))
    torch.testing.assert_close(cached_B, losses_B, rtol=1e-5, atol=1e-6)
    assert cached.keys() == plain.keys()
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in plain.values()))
    off = math.sqrt(sum(float((cached[w] - g).double().square().sum()) for w, g in plain.items()))
    assert off / norm < 1e-6


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunk", [None, 3])
def test_simcse_is_the_loss_of_two_passes_under_its_dropout(name, checkpointing, chunk):
    """The same passes in one graph, from the same random state, give the same gradients, however often they run."""
    model = MODELS[name](dropout=0.1)
    rows = [row(f"the {colour} cat", ["a"], ["dog"]) for colour in ("red", "blue", "gold", "pink")]
    batch, encoder, dropout = simcse_batch(rows, "rows"), encoder_of(model), Dropout(model)
    dropout.use(0.4)
    torch.manual_seed(5)
    texts = [*batch.queries, *batch.positives]
    if chunk:
        chunks, order = chunks_by_length(texts, chunk)
    else:
        chunks, order = ([texts] if name == "neobert" else [batch.queries, batch.positives]), torch.arange(8)
    queries_BD, positives_BD = torch.cat([encoder(chunk) for chunk in chunks])[order].split(4)
    expected = F.cross_entropy(queries_BD @ positives_BD.T / LOCAL.temperature, torch.arange(4))
    expected.backward()
    plain = gradients(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(5)
    losses_B, found = stepped(encoder, batch, replace(LOCAL, gradcache_chunk_size=chunk))
    torch.testing.assert_close(losses_B.mean(), expected.detach(), rtol=1e-5, atol=1e-6)
    for weight, gradient in plain.items():
        torch.testing.assert_close(found[weight], gradient, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(queries_BD, positives_BD, atol=1e-3)
    dropout.use(None)
    assert {layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)} == {0.1}


def test_simcse_without_dropout_would_learn_nothing_from_equal_vectors():
    rows = [row(f"the {colour} cat", ["a"], ["dog"]) for colour in ("red", "blue")]
    queries_BD, positives_BD, negatives_ND = encode_batch(encoder_of(bert()), simcse_batch(rows, "rows"), None)
    torch.testing.assert_close(queries_BD, positives_BD)
    assert len(negatives_ND) == 0


def test_texts_that_rows_share_are_no_negatives():
    model = neobert().double()
    rows = [
        row("where is the cat", ["cat", "the old cat"], ["a dog", "the old cat"]),  # its own second positive
        row("where is the cat", ["a red cat"]),  # the same query
        row("where is the old cat", ["cat", "the old cat"], ["where is the old cat"]),  # a positive of row 0
        row("car", ["a car"], ["cat"]),
    ]
    batch = batch_of(rows)
    params = replace(LOCAL, temperature=0.2, loss_type="symmetric")
    found = contrastive_loss(encoder_of(model), batch, params).losses_B
    torch.testing.assert_close(found, by_equation(model, batch, params, "mean"), rtol=1e-9, atol=1e-9)
    alone = contrastive_loss(encoder_of(model), batch_of(rows[1:2]), LOCAL).losses_B
    assert alone.tolist() == [0.0]  # nothing to contrast
    pair = contrastive_loss(encoder_of(model), batch_of([row("cat", ["a"]), row("cat", ["the"])]), params).losses_B
    assert pair.tolist() == [0.0, 0.0]


def test_texts_cut_to_the_same_tokens_are_no_negatives():
    one, other = row("cat", ["the old dog"]), row("car", ["the old dog"])
    other = other._replace(positive_keys=[12345])  # another text whose tokens are the same
    loss = contrastive_loss(encoder_of(neobert()), batch_of([one, other]), LOCAL).losses_B
    assert loss.tolist() == [0.0, 0.0]


def test_a_query_is_no_negative_of_a_text_that_answers_it():
    """Row 0 drew another positive than row 1's: on the way back, row 1's positive must not push query 0 away."""
    first, second = row("cat", ["a cat", "the old cat"]), row("house", ["the old cat"])
    batch = batch_of([first, second])
    batch = replace(batch, positives=[first.positives[0], second.positives[0]], positive_keys_B2=keys_of(first, second))
    params = replace(LOCAL, temperature=0.2, loss_type="symmetric")
    model = neobert().double()
    found_B = contrastive_loss(encoder_of(model), batch, params).losses_B
    torch.testing.assert_close(found_B, by_equation(model, batch, params, "mean"), rtol=1e-9, atol=1e-9)
    queries, positives, _ = encode_batch(encoder_of(model), batch, None)
    forward = torch.logaddexp(*(queries[1] @ positives.T / 0.2)) - queries[1] @ positives[1] / 0.2
    assert found_B[1].item() == pytest.approx(forward.item() / 2)  # nothing is left to contrast on the way back


def keys_of(*rows: TokenizedRow) -> torch.Tensor:
    """The keys of each row's first positive."""
    return pair_batch(
        [row._replace(positives=row.positives[:1], positive_keys=row.positive_keys[:1]) for row in rows],
        [(0, 0, number) for number in range(len(rows))],
        "rows",
        BatchDraws(seed=0, max_negatives=0),
    ).positive_keys_B2


def test_a_positive_that_was_not_drawn_is_known_by_its_tokens_too():
    rows = [row("cat", ["a cat", "the old cat"]), row("house", ["the old cat"], ["a cat"])]
    rows[1] = rows[1]._replace(positive_keys=[12345], negative_keys=[54321])  # other texts, cut to the same tokens
    losses_B = contrastive_loss(encoder_of(neobert()), batch_of(rows), LOCAL).losses_B
    assert losses_B[0].item() == 0


def test_a_heavier_hard_negative_pulls_harder():
    model, batch = neobert(), plain_batch()
    losses = [
        contrastive_loss(encoder_of(model), batch, replace(LOCAL, hard_negative_weight=weight)).losses_B.mean().item()
        for weight in (0.01, 1.0, 10.0)
    ]
    without = replace(batch, negatives=[], negative_keys_N2=batch.negative_keys_N2[:0])
    nothing = contrastive_loss(encoder_of(model), batch, replace(LOCAL, hard_negative_weight=0.0)).losses_B
    torch.testing.assert_close(nothing, contrastive_loss(encoder_of(model), without, LOCAL).losses_B)
    assert nothing.mean().item() < losses[0]
    assert losses[0] < losses[1] < losses[2]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_pooling_a_flat_stream_equals_pooling_rows(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(length, 5, dtype=torch.float64, generator=generator) for length in lengths]
    flat_TH = torch.cat(hidden).requires_grad_()
    rows_BSH = torch.nn.utils.rnn.pad_sequence(flat_TH.split(lengths), batch_first=True, padding_value=7.0)
    mask_BS = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    for pooling in POOLINGS:
        ours, theirs = pool_flat(flat_TH, bounds, pooling), pool_hidden_states(rows_BSH, mask_BS.long(), pooling)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        weights = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
        (gradient,), (expected,) = (
            torch.autograd.grad((x * weights).sum(), flat_TH, retain_graph=True) for x in (ours, theirs)
        )
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_both_layouts_of_neobert_give_the_same_embeddings():
    model, texts = neobert().eval(), [*plain_batch().queries, *plain_batch().positives]
    flat_TH = model(**flat_inputs(texts, torch.device("cpu"))).last_hidden_state
    padded = padded_inputs(texts, 0, torch.device("cpu"))
    rows_BSH = model(**padded).last_hidden_state
    torch.testing.assert_close(rows_BSH[padded["attention_mask"].bool()], flat_TH, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=25), size=st.integers(1, 8))
def test_chunks_are_sorted_by_length_and_the_order_comes_back(lengths, size):
    texts = [np.full(length, number, dtype=np.int32) for number, length in enumerate(lengths)]
    chunks, order = chunks_by_length(texts, size)
    flat = [text for chunk in chunks for text in chunk]
    assert [len(text) for text in flat] == sorted(lengths)
    assert [flat[place][0] for place in order.tolist()] == list(range(len(texts)))
    assert all(len(chunk) == size for chunk in chunks[1:])
    assert 1 <= len(chunks[0]) <= size
