"""Pseudo-perplexity against the plain loop that it stands for."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pairs import tokenizer as word_tokenizer
from tiny_text_encoders import POSITIONS, captions, tiny_masked_lm, tiny_stored_encoder, tiny_tokenizer

from inft.encoders.evaluation.pseudo_perplexity import (
    ScoredDocument,
    corpus_scores,
    perplexity,
    perplexity_table,
    save_scores,
    score_documents,
)
from inft.encoders.stored import load_masked_lm
from inft.models.neobert import NeoBERTConfig, NeoBERTForMaskedLM
from params.errors import UserError

torch.set_num_threads(1)
TEXTS = ["A small red circle on the left.", "Un grand carré noir à droite.", "左边有一棵紫色的小树。"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=330)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_masked_lm(len(tokenizer), scale=8)


@torch.no_grad()
def plain_score(model, tokenizer, text: str, *, word_l2r: bool) -> float:
    """One padded row and one full forward pass for each token."""
    encoded = tokenizer(text, return_tensors="pt")
    ids, words = encoded["input_ids"][0], encoded.word_ids(0)
    total = 0.0
    for position in range(1, len(ids) - 1):
        masked = ids.clone()
        masked[position] = tokenizer.mask_token_id
        if word_l2r:
            for later in range(position + 1, len(ids) - 1):
                if words[later] == words[position]:
                    masked[later] = tokenizer.mask_token_id
        logits = model(masked[None], attention_mask=torch.ones(1, len(ids))).logits[0, position]
        total += float(logits.log_softmax(-1)[ids[position]])
    return total


@pytest.mark.parametrize("word_l2r", [False, True])
def test_every_token_is_scored_as_by_a_plain_loop(model, tokenizer, word_l2r):
    found = score_documents(model, tokenizer, TEXTS, max_length=POSITIONS, word_l2r=word_l2r)
    for text, document in zip(TEXTS, found, strict=True):
        assert document.log_likelihood == pytest.approx(
            plain_score(model, tokenizer, text, word_l2r=word_l2r), rel=1e-5
        )
        assert document.tokens == len(tokenizer.tokenize(text))


def test_within_word_masking_hides_more_of_words_with_several_tokens(model, tokenizer):
    assert any(len(tokenizer.tokenize(word)) > 1 for word in TEXTS[0].split()), "words must have several tokens"
    plain = score_documents(model, tokenizer, TEXTS[:1], max_length=POSITIONS)[0]
    hidden = score_documents(model, tokenizer, TEXTS[:1], max_length=POSITIONS, word_l2r=True)[0]
    assert hidden.log_likelihood != plain.log_likelihood
    assert hidden.tokens == plain.tokens


@settings(max_examples=10, deadline=None)
@given(budget=st.integers(1, 400))
def test_the_token_budget_changes_nothing(model, tokenizer, budget):
    whole = score_documents(model, tokenizer, TEXTS, max_length=POSITIONS)
    parts = score_documents(model, tokenizer, TEXTS, max_length=POSITIONS, token_budget=budget)
    for one, other in zip(whole, parts, strict=True):
        assert other.log_likelihood == pytest.approx(one.log_likelihood, rel=1e-5)


def test_a_document_beyond_the_context_is_scored_in_pieces(model, tokenizer):
    text = " ".join(captions()[:8])
    tokens = len(tokenizer.tokenize(text))
    found = score_documents(model, tokenizer, [text], max_length=20)[0]
    assert tokens > POSITIONS
    assert found.pieces == math.ceil(tokens / 18)
    assert found.tokens == tokens


def test_the_corpus_is_the_mean_over_tokens_and_each_language_has_its_own(tmp_path):
    documents = [
        ScoredDocument(log_likelihood=-2.0, tokens=2, pieces=1, language="en"),
        ScoredDocument(log_likelihood=-9.0, tokens=3, pieces=1, language="en"),
        ScoredDocument(log_likelihood=-4.0, tokens=1, pieces=1, language="fr"),
    ]
    scores = corpus_scores(documents)
    assert list(scores) == ["en", "fr", "all"]
    assert scores["en"].perplexity == pytest.approx(math.exp(11 / 5))
    assert scores["fr"].perplexity == pytest.approx(math.exp(4))
    assert scores["all"].perplexity == pytest.approx(math.exp(15 / 6))
    assert (scores["all"].tokens, scores["all"].documents) == (6, 3)
    save_scores(tmp_path / "new" / "scores.json", documents, settings={"model": "m"})
    stored = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert stored["corpora"]["fr"]["tokens"] == 1
    assert stored["documents"][0]["perplexity"] == pytest.approx(math.e)


def test_perplexity_of_nothing_and_of_the_impossible():
    assert math.isnan(perplexity(0.0, 0))
    assert perplexity(-1e9, 1) == math.inf


def test_a_text_without_tokens_is_refused(model, tokenizer):
    with pytest.raises(UserError, match=r"text 1 .*no tokens"):
        score_documents(model, tokenizer, [TEXTS[0], ""], max_length=POSITIONS)


def test_a_tokenizer_without_a_mask_token_is_refused(model, tokenizer, tmp_path: Path):
    bare = tiny_tokenizer(tmp_path)
    bare.mask_token = None
    with pytest.raises(UserError, match="mask token"):
        score_documents(model, bare, TEXTS, max_length=POSITIONS)


def test_a_length_without_room_is_refused(model, tokenizer):
    with pytest.raises(UserError, match="no room"):
        score_documents(model, tokenizer, TEXTS, max_length=2)


def test_special_tokens_that_stand_in_a_text_are_scored_as_letters(model, tokenizer):
    found = score_documents(model, tokenizer, ["A [MASK] circle [SEP]."], max_length=POSITIONS)[0]
    letters = tokenizer("A [MASK] circle [SEP].", split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert tokenizer.mask_token_id not in letters
    assert found.tokens == len(letters)


def test_the_share_of_unknown_tokens_is_shown(tmp_path: Path):
    words = word_tokenizer()
    documents = score_documents(tiny_masked_lm(len(words)), words, ["red cat", "red zebra xyz gnu"], max_length=16)
    assert [document.unknown for document in documents] == [0, 3]
    scores = corpus_scores(documents)
    assert scores["all"].unknown == pytest.approx(3 / 6)
    table = perplexity_table(scores)
    assert list(table.columns[3].cells) == ["50.00%"]
    assert table.columns[3].header == "unknown"
    save_scores(tmp_path / "scores.json", documents, settings={})
    assert json.loads((tmp_path / "scores.json").read_text())["corpora"]["all"]["unknown"] == pytest.approx(0.5)


def test_numbers_that_json_lacks_are_null(tmp_path: Path):
    save_scores(tmp_path / "s.json", [ScoredDocument(log_likelihood=-1e9, tokens=1, pieces=1)], settings={})
    text = (tmp_path / "s.json").read_text()
    assert "Infinity" not in text
    assert json.loads(text)["corpora"]["all"]["perplexity"] is None


def test_an_encoder_without_a_masked_lm_head_is_refused(tokenizer, tmp_path: Path):
    stored = tiny_stored_encoder(tmp_path / "pretrained")
    assert load_masked_lm(str(stored)).config.tie_word_embeddings
    tiny_masked_lm().model.save_pretrained(tmp_path / "headless")
    with pytest.raises(UserError, match="without a masked-LM head"):
        load_masked_lm(str(tmp_path / "headless"))
    untied = tiny_masked_lm()
    config = NeoBERTConfig(**{**untied.config.to_dict(), "tie_word_embeddings": False})
    NeoBERTForMaskedLM(config).save_pretrained(tmp_path / "untied")
    assert not load_masked_lm(str(tmp_path / "untied")).config.tie_word_embeddings
