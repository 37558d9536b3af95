"""The checks before the first step find what they are for, and leave no trace."""

import dataclasses
from pathlib import Path

import pytest
import torch
from encoder_runs import run_tiny, tiny_params, write_data

from inft.encoders.build import build_model, load_tokenizer
from inft.encoders.data.batches import PretrainingBatches
from inft.encoders.data.documents import open_data
from inft.encoders.guards import documents_are_apart, tokens_are_masked, weights_get_gradients, words_are_known
from inft.encoders.pretrain import MaskedTokens
from inft.models import neobert
from params.errors import UserError


@pytest.fixture
def first(tmp_path: Path):
    """(task, model, first batch) of a tiny run."""
    write_data(tmp_path)
    params = tiny_params(tmp_path, model__dropout_prob=0.1)
    tokenizer = load_tokenizer(params)
    data = open_data(params, tokenizer)
    batch = next(PretrainingBatches(data, tokenizer, params))
    return MaskedTokens(params, tokenizer, data), build_model(params, tokenizer), batch


def without_borders(q_TAD, k_TAD, v_TAD, cu_seqlens, max_seqlen, backend):
    """An attention that sees the whole stream, as a kernel with the wrong mask would."""
    q, k, v = (x.transpose(0, 1) for x in (q_TAD, k_TAD, v_TAD))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1)


def test_a_sound_model_passes_and_nothing_changes(first):
    task, model, batch = first
    before, state = {n: p.clone() for n, p in model.state_dict().items()}, torch.get_rng_state()
    results = list(task.guards(model, batch))
    assert [result.name for result in results] == ["known words", "masked tokens", "documents apart", "gradients"]
    assert all(result.ok for result in results)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_attention_across_documents_is_found(first, monkeypatch):
    _, model, batch = first
    monkeypatch.setattr(neobert, "document_attention", without_borders)
    result = documents_are_apart(model, batch)
    assert not result.ok
    assert "model.attn_backend: sdpa" in result.detail


def test_a_run_whose_documents_see_each_other_is_not_started(tmp_path, monkeypatch):
    write_data(tmp_path)
    monkeypatch.setattr(neobert, "document_attention", without_borders)
    with pytest.raises(UserError, match="documents apart"):
        run_tiny(tmp_path)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_weight_without_gradient_is_named(first):
    task, model, batch = first
    block = model.model.transformer_encoder[1]
    with torch.no_grad():
        block.wo.weight.zero_()
    assert "transformer_encoder.1.qkv" in weights_get_gradients(model, batch, task.loss).detail


def test_a_script_that_the_tokenizer_does_not_know_is_told(first):
    _, _, batch = first
    unknown = dataclasses.replace(
        batch, input_ids_T=torch.full_like(batch.input_ids_T, 1), labels_T=torch.full_like(batch.labels_T, -100)
    )
    result = words_are_known(unknown, 1)
    assert not result.ok
    assert "tokenizer.name" in result.detail
    assert words_are_known(unknown, None).ok
    half = dataclasses.replace(unknown, labels_T=torch.where(torch.arange(len(batch.labels_T)) % 3 > 0, 7, 1))
    assert words_are_known(half, 1).ok, "a masked token counts as what it was"


def test_no_masked_token_in_many_is_found(first):
    _, _, batch = first
    none = dataclasses.replace(batch, masked=0, tokens=10_000)
    assert not tokens_are_masked(none, 0.15).ok
    assert tokens_are_masked(dataclasses.replace(none, tokens=20), 0.15).ok, "of few it is chance"
