"""Which tokens a masked language model predicts, and what it sees in their place.

A token's fate depends on (seed, epoch, document, piece, position) alone: it is the same whatever process reads the
document, in whatever order, and after a resume. Axes: T tokens of several documents in a row, N documents.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from inft.encoders.data.counter import hashed, uniform

IGNORED = -100  # label of a token that is not predicted
EVALUATION_PROBABILITY = 0.15  # whatever share a run trains on, so that runs can be compared
EVALUATION_SEED = 0  # likewise: evaluation masks are the same in every run
_MASKED, _RANDOM = 0.8, 0.9  # below: [MASK]; below: another token; else it stays (Devlin et al. 2019, section 3.1)
_CHOSEN, _FATE, _OTHER = 0, 1, 2  # the three random numbers of a token


@dataclass(frozen=True, kw_only=True)
class MaskRule:
    """How documents are masked; ``special_ids`` are never predicted nor put in."""

    seed: int
    probability: float
    mask_all: bool
    mask_token_id: int
    vocab_size: int  # of the tokenizer: other tokens are drawn from below it
    special_ids: tuple[int, ...]


def mask_tokens(
    tokens: np.ndarray,
    *,
    seed: int,
    epoch: int,
    key: int,
    piece: int,
    probability: float,
    mask_all: bool,
    mask_token_id: int,
    vocab_size: int,
    special_ids: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the model sees of one document, and its labels (IGNORED where nothing is predicted), as int32."""
    rule = MaskRule(
        seed=seed,
        probability=probability,
        mask_all=mask_all,
        mask_token_id=mask_token_id,
        vocab_size=vocab_size,
        special_ids=tuple(special_ids),
    )
    lengths = np.array([len(tokens)])
    return mask_documents(tokens, lengths, np.array([key]), np.array([piece]), rule=rule, epoch=epoch)


def mask_documents(
    tokens_T: np.ndarray, lengths_N: np.ndarray, keys_N: np.ndarray, pieces_N: np.ndarray, *, rule: MaskRule, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the model sees of documents that follow each other in ``tokens_T``, and the labels, as int32.

    Each token that is not special is predicted with the rule's probability. Of these 80 % become [MASK], 10 % a token
    drawn from those that are not special, 10 % stay; with mask_all every one becomes [MASK].
    """
    stream_T = np.repeat(hashed(rule.seed, epoch, keys_N, pieces_N), lengths_N)
    starts_N = np.cumsum(lengths_N) - lengths_N
    place_T = np.arange(len(tokens_T)) - np.repeat(starts_N, lengths_N)
    chosen_T = uniform(stream_T, place_T, _CHOSEN) < rule.probability
    chosen_T &= ~np.isin(tokens_T, np.array(rule.special_ids, np.int64))
    labels_T = np.where(chosen_T, tokens_T, IGNORED).astype(np.int32)
    seen_T = tokens_T.astype(np.int32)  # a copy
    if rule.mask_all:
        seen_T[chosen_T] = rule.mask_token_id
        return seen_T, labels_T
    fate_T = uniform(stream_T, place_T, _FATE)
    seen_T[chosen_T & (fate_T < _MASKED)] = rule.mask_token_id
    random_T = chosen_T & (fate_T >= _MASKED) & (fate_T < _RANDOM)
    words = _words(rule.vocab_size, rule.special_ids)
    seen_T[random_T] = words[hashed(stream_T[random_T], place_T[random_T], _OTHER) % np.uint64(len(words))]
    return seen_T, labels_T


@lru_cache(maxsize=8)
def _words(vocab_size: int, special_ids: tuple[int, ...]) -> np.ndarray:
    """The tokens that may stand in for another."""
    return np.setdiff1d(np.arange(vocab_size, dtype=np.int32), np.array(special_ids, np.int32))
