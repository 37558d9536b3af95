"""Pseudo-perplexity of a masked language model: each token is predicted from all the others, one after the other.

Salazar et al. 2020, "Masked Language Model Scoring"; with word_l2r a word's later tokens are hidden with it (Kauf and
Ivanova 2023, "A Better Way to Do Masked Language Model Scoring"), since they would give it away.

Axes: T tokens of a stream of masked copies, N copies in it.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from inft.encoders.outputs import write_json
from inft.encoders.stored import load_masked_lm, load_tokenizer, longest_text
from params.errors import UserError

TOKEN_BUDGET = 16_384  # tokens of one stream of masked copies


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredDocument:
    """One document's pseudo-log-likelihood."""

    log_likelihood: float  # nats, summed over its tokens
    tokens: int  # special ones not counted
    pieces: int  # above 1: it was longer than the context
    unknown: int = 0  # tokens that stand for what the vocabulary does not have: easy to predict, and no words
    language: str | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of a token."""
        return perplexity(self.log_likelihood, self.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusScore:
    """A corpus's pseudo-perplexity: exp of the mean over all its tokens."""

    perplexity: float
    log_likelihood: float  # nats per token
    tokens: int
    documents: int
    unknown: float = 0.0  # share of the tokens that stand for what the vocabulary does not have


def perplexity(log_likelihood: float, tokens: int) -> float:
    """exp(-log_likelihood / tokens), in which nats are summed; nan without any token, inf beyond a float's range."""
    if tokens == 0:
        return math.nan
    exponent = -log_likelihood / tokens
    return math.exp(exponent) if exponent < math.log(1e308) else math.inf


def evaluate_texts(
    place: str,
    rows: Sequence[tuple[str, str | None]],
    *,
    max_length: int | None = None,
    word_l2r: bool = False,
    token_budget: int = TOKEN_BUDGET,
) -> list[ScoredDocument]:
    """Score pairs of text and language under a stored NeoBERT, on CUDA where there is one.

    Errors: UserError for another architecture, a model without a masked-LM head, and texts longer than it can take.
    """
    tokenizer, model = load_tokenizer(place), load_masked_lm(place)
    longest = longest_text(tokenizer, model.config)
    if (max_length or 0) > longest:
        raise UserError(f"max_length {max_length} is beyond what {place} can take, {longest} tokens. Lower it.")
    return score_documents(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        tokenizer,
        [text for text, _ in rows],
        [language for _, language in rows],
        max_length=max_length or longest,
        word_l2r=word_l2r,
        token_budget=token_budget,
    )


def score_documents(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    languages: Sequence[str | None] | None = None,
    *,
    max_length: int,
    word_l2r: bool = False,
    token_budget: int = TOKEN_BUDGET,
) -> list[ScoredDocument]:
    """Return the pseudo-log-likelihood of each text.

    A text of n tokens becomes n copies with one token masked in each, in one flat stream of up to `token_budget`
    tokens with the copies of other texts; one beyond max_length is scored in pieces. `word_l2r` also masks the later
    tokens of the same word. Errors: UserError for a text without tokens and a tokenizer without a mask token.
    """
    if tokenizer.mask_token_id is None:
        raise UserError("pseudo-perplexity needs a tokenizer with a mask token; this one has none.")
    cut = [_pieces(tokenizer, text, max_length, number) for number, text in enumerate(texts)]
    copies = (copy for index, pieces in enumerate(cut) for piece in pieces for copy in piece.copies(index, word_l2r))
    unknown_id = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id
    sums = [0.0] * len(texts)
    for batch in _batches(copies, token_budget):
        for copy, nats in zip(batch, _log_likelihoods(model, batch, tokenizer.mask_token_id), strict=True):
            sums[copy.document] += nats
    return [
        ScoredDocument(
            log_likelihood=total,
            tokens=sum(len(piece.scored) for piece in pieces),
            pieces=len(pieces),
            unknown=sum(int((piece.tokens[piece.scored] == unknown_id).sum()) for piece in pieces),
            language=None if languages is None else languages[index],
        )
        for index, (total, pieces) in enumerate(zip(sums, cut, strict=True))
    ]


def corpus_scores(documents: Sequence[ScoredDocument]) -> dict[str, CorpusScore]:
    """Return the score of each language, and under "all" that of all documents; tokens weigh alike."""
    groups: dict[str, list[ScoredDocument]] = defaultdict(list)
    for document in documents:
        if document.language is not None:
            groups[document.language].append(document)
    return {**{name: _corpus(groups[name]) for name in sorted(groups)}, "all": _corpus(documents)}


def save_scores(path: Path, documents: Sequence[ScoredDocument], *, settings: Mapping[str, Any]) -> None:
    """Write corpus and document scores as JSON, whole or not at all."""
    record = {
        **settings,
        "corpora": {name: asdict(score) for name, score in corpus_scores(documents).items()},
        "documents": [{**asdict(document), "perplexity": document.perplexity} for document in documents],
    }
    write_json(path, record)


def perplexity_table(scores: Mapping[str, CorpusScore]) -> Table:
    """A row for each language, the last one for all."""
    table = Table(title="Pseudo-perplexity")
    table.add_column("language")
    for heading in ("documents", "tokens", "unknown", "nats per token", "pseudo-perplexity"):
        table.add_column(heading, justify="right")
    for name, score in scores.items():
        figures = (f"{score.unknown:.2%}", f"{-score.log_likelihood:.4f}", f"{score.perplexity:.4g}")
        table.add_row(name, f"{score.documents:,}", f"{score.tokens:,}", *figures)
    return table


def _corpus(documents: Sequence[ScoredDocument]) -> CorpusScore:
    total = math.fsum(document.log_likelihood for document in documents)
    tokens = sum(document.tokens for document in documents)
    return CorpusScore(
        perplexity=perplexity(total, tokens),
        log_likelihood=total / tokens if tokens else math.nan,
        tokens=tokens,
        documents=len(documents),
        unknown=sum(document.unknown for document in documents) / tokens if tokens else math.nan,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """Up to max_length tokens of a document, special ones included."""

    tokens: np.ndarray  # int64
    scored: np.ndarray  # positions that are no special token
    words: np.ndarray  # number of each position's word; -1: none

    def copies(self, document: int, word_l2r: bool) -> Iterator["_Copy"]:
        """A copy for each scored position."""
        for position in self.scored:
            later = self.scored[(self.scored > position) & (self.words[self.scored] == self.words[position])]
            hidden = np.append(later, position) if word_l2r else np.array([position])
            yield _Copy(document=document, tokens=self.tokens, position=int(position), hidden=hidden)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Copy:
    document: int
    tokens: np.ndarray
    position: int  # that is predicted
    hidden: np.ndarray  # positions that are masked


def _pieces(tokenizer: Any, text: str, max_length: int, number: int) -> list[_Piece]:
    """The tokens of a text in pieces that fit into the context, each with special tokens of its own."""
    if max_length <= tokenizer.num_special_tokens_to_add():
        raise UserError(f"max_length {max_length} has no room for a token beside the special ones. Raise it.")
    encoded = tokenizer(
        text,
        truncation=True,
        max_length=max_length,
        return_overflowing_tokens=True,
        return_special_tokens_mask=True,
        split_special_tokens=True,  # "[MASK]" in a text is letters, as any other word
    )
    pieces = [
        _Piece(
            tokens=np.array(ids, dtype=np.int64),
            scored=np.flatnonzero(np.array(special) == 0),
            words=np.array([-1 if word is None else word for word in encoded.word_ids(index)]),
        )
        for index, (ids, special) in enumerate(zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True))
    ]
    if not any(len(piece.scored) for piece in pieces):
        raise UserError(f"text {number} (from 0) has no tokens: {text[:40]!r}. Drop it.")
    return pieces


def _batches(copies: Iterator[_Copy], token_budget: int) -> Iterator[list[_Copy]]:
    """Copies in order, as many at a time as the budget has room for, one at least."""
    batch: list[_Copy] = []
    tokens = 0
    for copy in copies:
        if batch and tokens + len(copy.tokens) > token_budget:
            yield batch
            batch, tokens = [], 0
        batch.append(copy)
        tokens += len(copy.tokens)
    if batch:
        yield batch


@torch.no_grad()
def _log_likelihoods(model: Any, batch: Sequence[_Copy], mask_token_id: int) -> list[float]:
    """Nats of each copy's predicted token, in float32; only predicted positions meet the head."""
    device = next(model.parameters()).device
    lengths_N = np.array([len(copy.tokens) for copy in batch])
    starts_N = np.cumsum(lengths_N) - lengths_N
    ids_T = np.concatenate([copy.tokens for copy in batch])
    predicted_N = starts_N + [copy.position for copy in batch]
    targets_N = ids_T[predicted_N]
    ids_T[np.concatenate([start + copy.hidden for start, copy in zip(starts_N, batch, strict=True)])] = mask_token_id

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    hidden_TH = model.model(
        on_device(ids_T),
        position_ids=on_device(np.arange(len(ids_T)) - np.repeat(starts_N, lengths_N)),
        cu_seqlens=on_device(np.append(starts_N, len(ids_T)).astype(np.int32)),
        max_seqlen=int(lengths_N.max()),
    ).last_hidden_state
    logits_NV = model.decoder(hidden_TH[on_device(predicted_N)]).float()
    nats_N = logits_NV.log_softmax(-1).gather(1, on_device(targets_N)[:, None])
    return nats_N[:, 0].tolist()
