"""One token at a time for each row: drawn from the model's distribution by the row's own generator, until it ends.

`Draw` goes into transformers' `generate` as a logits processor and leaves one token for its argmax, so that the cache
and the padding are transformers' and the randomness is ours.

Axes: B rows, V vocabulary, K tokens that a draw may fall on.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from inft.client.errors import NotFinite
from inft.client.vision import TOKENIZER

UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are no character
MOST_BYTES = 4  # of a character


@dataclass(kw_only=True)
class Row:
    """A completion as it is written."""

    tokenizer: Any
    last: int  # the prompt's last token: whether a completion begins with a space, some tokenizers tell by it alone
    generator: torch.Generator  # on the CPU
    ends: Collection[int]  # end tokens
    stops: Sequence[str]  # texts that end it
    tokens: list[int] = field(default_factory=list)  # all that were drawn, up to and with an end token or a stop text
    logprobs: list[float] = field(default_factory=list)  # of each under the model itself, at temperature 1, unfiltered
    stopped: bool = False

    def add(self, token: int, logprob: float) -> None:
        """Append a token, and find whether the row ends with it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.stopped = token in self.ends or any(stop in self._tail() for stop in self.stops)

    def text(self) -> str:
        """Return the completion: without special tokens, and up to where its first stop text begins.

        One that was cut in the middle of a character is without that character's bytes.
        """
        text = text_after(self.tokenizer, self.last, self.tokens)
        if not self.stopped and text.endswith(UNFINISHED):
            text = self._whole_characters(text)
        return text[: min((text.find(stop) for stop in self.stops if stop in text), default=len(text))]

    def _whole_characters(self, text: str) -> str:
        # A token may hold the end of one character and the beginning of the next, so it is the text that is cut; but
        # where tokens are single bytes, one too few makes some tokenizers spoil the whole characters before it too.
        shorter = [text_after(self.tokenizer, self.last, self.tokens[:-count]) for count in range(1, MOST_BYTES)]
        whole = [shortened for shortened in shorter if not shortened.endswith(UNFINISHED)]
        return max([text.rstrip(UNFINISHED), *whole], key=len)

    def _tail(self) -> str:
        """The end of the text: a stop text is looked for after each token, so it ends in the newest one."""
        # A token has a byte or more, but for special ones, which have none.
        width = max(len(stop.encode()) for stop in self.stops) + 8
        window = [self.last, *self.tokens][-width - 1 :]
        return text_after(self.tokenizer, window[0], window[1:])


class Draw(LogitsProcessor):
    """Draws each row's next token: temperature, then top_k, then top_p, as transformers orders them; 0 is greedy.

    A token's log-probability is that of the unchanged logits. What is drawn for a row that has ended is not kept.
    Errors: NotFinite for logits that are NaN or infinite.
    """

    def __init__(self, rows: Sequence[Row], *, temperature: float, top_k: int, top_p: float) -> None:
        self.rows = rows
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores [B, V] with all but the drawn tokens at -inf."""
        logits_BV = scores.float()
        if not bool(logits_BV.amax(1).isfinite().all()):
            raise NotFinite(
                "sample: the model's logits are not finite: load a state from before its weights were lost."
            )
        tokens_B = self._tokens(logits_BV)
        logprobs_B = logits_BV.log_softmax(1).gather(1, tokens_B[:, None])[:, 0]
        for row, token, logprob in zip(self.rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
            if not row.stopped:
                row.add(token, logprob)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens_B[:, None], 0.0)

    def _tokens(self, logits_BV: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits_BV.argmax(1)
        uniform_B = torch.cat([torch.rand(1, dtype=torch.float64, generator=row.generator) for row in self.rows])
        return draw_tokens(logits_BV, uniform_B, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


class AllStopped(StoppingCriteria):
    """Tells `generate` which rows have ended."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return [B], true where a row has ended."""
        return torch.tensor([row.stopped for row in self.rows], device=input_ids.device)


def draw_tokens(logits_BV: Tensor, uniform_B: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Return the token [B] at which each row's cumulative probability passes uniform_B, numbers of [0, 1).

    Only the `top_k` most likely tokens count (0: all), and of these the fewest that together have `top_p`.
    """
    vocabulary = logits_BV.shape[1]
    if top_k or top_p < 1:
        kept_BK, ids_BK = logits_BV.topk(min(top_k or vocabulary, vocabulary), dim=1)  # sorted, most likely first
    else:
        kept_BK, ids_BK = logits_BV, None
    # On the CPU in float64: the sums are then the same on every device, and in one order.
    kept_BK = kept_BK.cpu().double()
    probs_BK = ((kept_BK - kept_BK.amax(1, keepdim=True)) / temperature).softmax(1)
    if top_p < 1:
        before_BK = probs_BK.cumsum(1) - probs_BK
        before_BK[:, 0] = 0.0  # the most likely token stays, whatever rounding says
        probs_BK = probs_BK.masked_fill(before_BK >= top_p, 0.0)
    sums_BK = probs_BK.cumsum(1)
    places_B1 = torch.searchsorted(sums_BK, uniform_B[:, None] * sums_BK[:, -1:], right=True)
    # Rounding may let the product reach the sum itself: then it is the last token with a probability.
    last_B1 = torch.searchsorted(sums_BK, sums_BK[:, -1:].contiguous())
    places_B1 = places_B1.minimum(last_B1).to(logits_BV.device)
    return places_B1[:, 0] if ids_BK is None else ids_BK.gather(1, places_B1)[:, 0]


def text_after(tokenizer: Any, last: int, tokens: Sequence[int]) -> str:
    """Return the text of `tokens` as it stands after the token `last`, without special tokens."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    with TOKENIZER:
        before, whole = tokenizer.decode([last], **options), tokenizer.decode([last, *tokens], **options)
        # Where `last` is half a character, its text changes with what follows.
        return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(list(tokens), **options)
