"""A user's batch, checked: rows of token ids with labels, or prompts and completions to tokenise.

Labels and per-token extras are about the token at their own position, as in transformers; `loss_inputs` shifts them.

Axes: B rows, T positions.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from inft.client.losses.inputs import IGNORED, LossInputs, next_token, next_token_labels
from inft.client.losses.numbers import as_list, number_tensor, token_rows
from inft.client.losses.texts import tokenise_texts
from params.errors import UserError

FIELDS = ("input_ids", "attention_mask", "labels", "prompt", "completion")
EXTRAS = ("advantages", "old_logprobs", "weights", "targets", "pair_ids", "chosen")  # of the built-in losses


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of equal length on the CPU, ready for a model."""

    input_ids_BT: Tensor  # int64
    attention_mask_BT: Tensor  # int64: 1 real, 0 padding
    labels_BT: Tensor  # int64, about the token at the same position; IGNORED where nothing is supervised
    extras: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))  # float32 or int64, B rows

    @property
    def tokens(self) -> int:
        """The number of real tokens."""
        return int(self.attention_mask_BT.sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on another device."""
        return Batch(
            input_ids_BT=self.input_ids_BT.to(device),
            attention_mask_BT=self.attention_mask_BT.to(device),
            labels_BT=self.labels_BT.to(device),
            extras={name: values.to(device) for name, values in self.extras.items()},
        )

    def loss_inputs(self, logits_BTV: Tensor, hidden_BTH: Tensor | None = None) -> LossInputs:
        """Return what a loss is given: labels and extras [B, T, ...] stand at the position that predicts them.

        Extras of one value, or one vector, for each row stay as they are.
        """
        grid = self.labels_BT.shape
        extras = {
            name: next_token(values, 0) if values.shape[:2] == grid else values for name, values in self.extras.items()
        }
        return LossInputs(
            logits_BTV=logits_BTV,
            labels_BT=next_token_labels(self.labels_BT),
            attention_mask_BT=self.attention_mask_BT,
            hidden_BTH=hidden_BTH,
            extras=extras,
        )


def parse_batch(mapping: Mapping[str, Any], *, vocab_size: int, max_length: int, tokenizer: Any = None) -> Batch:
    """Return the batch that a user's mapping describes, in lists (as JSON has them), arrays or tensors.

    Either ``input_ids``, with ``attention_mask`` (all 1 without it) and ``labels`` (the ids where the mask is 1 without
    them), or ``prompt`` and ``completion``, each a text or a list of texts, tokenised with the labels on the completion
    and its end token alone. Every other field is an extra of the loss: numbers, with one entry for each row.
    Errors: UserError that names the field, row and position, with the remedy: ragged rows, ids or labels outside the
    vocabulary, lengths that differ between fields or exceed `max_length`, a mask other than 0 and 1, a label on
    padding, a field that is nearly one of those that are known.
    """
    if not isinstance(mapping, Mapping):
        raise UserError(f"a batch is a mapping with input_ids, or prompt and completion, not {type(mapping).__name__}.")
    _require_known(mapping)
    if "input_ids" in mapping:
        rows, mask, labels = _given_rows(mapping, vocab_size, max_length)
    else:
        rows, mask, labels = _text_rows(mapping, vocab_size, max_length, tokenizer)
    names = [name for name in mapping if name not in FIELDS]
    return Batch(
        input_ids_BT=torch.tensor(rows, dtype=torch.int64),
        attention_mask_BT=torch.tensor(mask, dtype=torch.int64),
        labels_BT=torch.tensor(labels, dtype=torch.int64),
        extras=MappingProxyType({name: number_tensor(name, mapping[name], rows=len(rows)) for name in names}),
    )


def _require_known(mapping: Mapping[str, Any]) -> None:
    for name in mapping:
        if not isinstance(name, str):
            raise UserError(f"the batch has the field {name!r}: names of fields are text.")
        near = difflib.get_close_matches(name, (*FIELDS, *EXTRAS), n=1, cutoff=0.85)
        if near and name not in (*FIELDS, *EXTRAS):
            raise UserError(f"the batch has a field {name!r}; did you mean {near[0]!r}?")
    texts = [name for name in ("prompt", "completion") if name in mapping]
    if "input_ids" in mapping and texts:
        raise UserError(f"the batch has input_ids and {texts[0]}: give token ids or texts, not both.")
    if "input_ids" not in mapping and len(texts) < 2:
        raise UserError("the batch has neither input_ids nor both prompt and completion: give one or the other.")
    for name in ("attention_mask", "labels"):
        if texts and name in mapping:
            raise UserError(f"the batch has {name} beside texts: they get theirs here, so leave it out.")


Rows = list[list[int]]


def _given_rows(mapping: Mapping[str, Any], vocab_size: int, max_length: int) -> tuple[Rows, Rows, Rows]:
    rows = token_rows("input_ids", mapping["input_ids"])
    if len(rows[0]) > max_length:
        raise UserError(
            f"input_ids: row 0 has {len(rows[0])} tokens, more than the {max_length} allowed: cut or split the rows."
        )
    _require_within("input_ids", rows, range(vocab_size), f"the vocabulary of {vocab_size} tokens")
    mask = [[1] * len(row) for row in rows]
    if mapping.get("attention_mask") is not None:
        mask = token_rows("attention_mask", mapping["attention_mask"], like=rows, allow_bool=True)
        _require_within("attention_mask", mask, range(2), "0 and 1")
    for number, row in enumerate(mask):
        if not any(row):
            raise UserError(f"attention_mask: row {number} has no 1, so nothing to read: drop the row.")
    if mapping.get("labels") is None:
        labels = [
            [token if real else IGNORED for token, real in zip(*pair, strict=True)]
            for pair in zip(rows, mask, strict=True)
        ]
        return rows, mask, labels
    labels = token_rows("labels", mapping["labels"], like=rows)
    _require_within("labels", labels, range(vocab_size), f"the vocabulary of {vocab_size} tokens", also=IGNORED)
    _require_no_label_on_padding(labels, mask)
    return rows, mask, labels


def _text_rows(mapping: Mapping[str, Any], vocab_size: int, max_length: int, tokenizer: Any) -> tuple[Rows, Rows, Rows]:
    if tokenizer is None:
        raise UserError("the batch has prompt and completion, and there is no tokenizer here: give input_ids.")
    pairs = [as_list(mapping[name]) if not isinstance(mapping[name], str) else [mapping[name]] for name in FIELDS[3:]]
    rows, mask, labels = tokenise_texts(*pairs, tokenizer=tokenizer, max_length=max_length)
    _require_within("prompt and completion", rows, range(vocab_size), f"the model's vocabulary of {vocab_size} tokens")
    return rows, mask, labels


def _require_within(
    name: str, rows: Sequence[Sequence[int]], within: range, words: str, also: int | None = None
) -> None:
    for number, row in enumerate(rows):
        for position, value in enumerate(row):
            if value not in within and value != also:
                other = "" if also is None else f", or {also} where nothing is supervised"
                raise UserError(
                    f"{name}: row {number}, position {position} is {value}, outside {words}: give "
                    f"{within.start} to {within.stop - 1}{other}."
                )


def _require_no_label_on_padding(labels: Rows, mask: Rows) -> None:
    for number, (row, real) in enumerate(zip(labels, mask, strict=True)):
        for position, (label, seen) in enumerate(zip(row, real, strict=True)):
            if label != IGNORED and not seen:
                raise UserError(
                    f"labels: row {number}, position {position} is {label}, and attention_mask is 0 there: give "
                    f"{IGNORED} at padding."
                )
