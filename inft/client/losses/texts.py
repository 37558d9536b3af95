"""Prompts and completions as rows of token ids, with labels on the completion and its end token alone."""

from typing import Any

from inft.client.losses.inputs import IGNORED
from params.errors import UserError

Rows = list[list[int]]


def tokenise_texts(prompts: Any, completions: Any, *, tokenizer: Any, max_length: int) -> tuple[Rows, Rows, Rows]:
    """Return ids, mask and labels of prompt + completion + end token, padded on the right to the longest row.

    Both are tokenised on their own, so that no token is half prompt and half completion. The start token stands first
    where the tokenizer has one and sets it. Nothing is cut: a row without its end would teach never to stop.
    Errors: UserError with the row for what is no text, an empty completion, a row above `max_length`, a number of
    completions other than of prompts; and for a tokenizer without an end token.
    """
    _require_texts(prompts, completions)
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("the tokenizer has no end token, which a completion needs: set tokenizer.eos_token.")
    start = _start(tokenizer)
    rows, labels = [], []
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        context = [*start, *_ids(tokenizer, prompt)]
        answer = [*_ids(tokenizer, completion), end]
        length = len(context) + len(answer)
        if length > max_length:
            raise UserError(
                f"row {number} has {length} tokens in prompt, completion and end token, more than the {max_length} "
                "allowed: shorten its texts."
            )
        if not context:
            raise UserError(f"prompt: row {number} is empty and the tokenizer sets no start token: give a prompt.")
        rows.append([*context, *answer])
        labels.append([*[IGNORED] * len(context), *answer])
    longest = max(map(len, rows))
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return _padded(rows, longest, padding), mask, _padded(labels, longest, IGNORED)


def _require_texts(prompts: Any, completions: Any) -> None:
    for name, texts in (("prompt", prompts), ("completion", completions)):
        if not isinstance(texts, list) or not texts:
            raise UserError(f"{name}: expected a text or a list of texts.")
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"{name}: row {number} is {type(text).__name__}: give a text.")
    if len(prompts) != len(completions):
        raise UserError(f"prompt has {len(prompts)} rows and completion {len(completions)}: give as many.")
    for number, text in enumerate(completions):
        if not text:
            raise UserError(f"completion: row {number} is empty, so there is nothing to learn: drop the row.")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _start(tokenizer: Any) -> list[int]:
    # Read off an empty text: a tokenizer may have a start token and not set it, and may set an end token unasked.
    first = list(tokenizer("")["input_ids"])[:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


def _padded(rows: Rows, length: int, value: int) -> Rows:
    return [[*row, *[value] * (length - len(row))] for row in rows]
