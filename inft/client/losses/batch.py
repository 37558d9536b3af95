"""A user's batch, checked: rows of token ids with labels, or prompts and completions to tokenise.

Labels and per-token extras are about the token at their own position, as in transformers; `loss_inputs` shifts them.

Axes: B rows, T positions.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from inft.client.losses.inputs import IGNORED, LossInputs, next_token, next_token_labels
from inft.client.losses.numbers import as_list, number_tensor, shown, token_tensor
from inft.client.losses.texts import tokenise_texts
from params.errors import UserError

FIELDS = ("input_ids", "attention_mask", "labels", "prompt", "completion")
MOST_FIELDS, MOST_NAME = 64, 64  # of a batch, and characters of a field's name
EXTRAS = ("advantages", "old_logprobs", "weights", "targets", "pair_ids", "chosen")  # of the built-in losses


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of equal length on the CPU, ready for a model."""

    input_ids_BT: Tensor  # int64
    attention_mask_BT: Tensor  # int64: 1 real, 0 padding
    labels_BT: Tensor  # int64, about the token at the same position; IGNORED where nothing is supervised
    extras: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))  # float32 or int64, B rows

    @property
    def rows(self) -> int:
        """B, the number of rows."""
        return len(self.input_ids_BT)

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

        An extra of one value for each row stays as it is, and so does a vector for each row unless it is T long.
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
        ids_BT, mask_BT, labels_BT = _given_rows(mapping, vocab_size, max_length)
    else:
        ids_BT, mask_BT, labels_BT = _text_rows(mapping, vocab_size, max_length, tokenizer)
    names = [name for name in mapping if name not in FIELDS]
    return Batch(
        input_ids_BT=ids_BT,
        attention_mask_BT=mask_BT,
        labels_BT=labels_BT,
        extras=MappingProxyType({name: number_tensor(name, mapping[name], rows=len(ids_BT)) for name in names}),
    )


def _require_known(mapping: Mapping[str, Any]) -> None:
    if len(mapping) > MOST_FIELDS:
        raise UserError(f"the batch has {len(mapping)} fields, more than the {MOST_FIELDS} allowed: send fewer.")
    for name in mapping:
        if not isinstance(name, str) or not 0 < len(name) <= MOST_NAME:
            raise UserError(
                f"the batch has the field {shown(name)}: names of fields are text of 1 to {MOST_NAME} characters."
            )
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


def _given_rows(mapping: Mapping[str, Any], vocab_size: int, max_length: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_BT = token_tensor("input_ids", mapping["input_ids"])
    if ids_BT.shape[1] > max_length:
        raise UserError(
            f"input_ids: row 0 has {ids_BT.shape[1]} tokens, more than the {max_length} allowed: cut or split the rows."
        )
    words = f"the vocabulary of {vocab_size} tokens"
    _require_within("input_ids", ids_BT, vocab_size, words)
    mask_BT = torch.ones_like(ids_BT)
    if mapping.get("attention_mask") is not None:
        mask_BT = token_tensor("attention_mask", mapping["attention_mask"], like=ids_BT, allow_bool=True)
        _require_within("attention_mask", mask_BT, 2, "0 and 1")
        empty_B = ~mask_BT.any(1)
        if bool(empty_B.any()):
            raise UserError(
                f"attention_mask: row {int(empty_B.nonzero()[0])} has no 1, so nothing to read: drop the row."
            )
    if mapping.get("labels") is None:
        return ids_BT, mask_BT, ids_BT.masked_fill(mask_BT == 0, IGNORED)
    labels_BT = token_tensor("labels", mapping["labels"], like=ids_BT)
    _require_within("labels", labels_BT, vocab_size, words, also=IGNORED)
    _require_no_label_on_padding(labels_BT, mask_BT)
    return ids_BT, mask_BT, labels_BT


def _text_rows(
    mapping: Mapping[str, Any], vocab_size: int, max_length: int, tokenizer: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if tokenizer is None:
        raise UserError("the batch has prompt and completion, and there is no tokenizer here: give input_ids.")
    given = [mapping[name] for name in ("prompt", "completion")]
    pairs = [[texts] if isinstance(texts, str) else as_list(texts) for texts in given]
    rows = tokenise_texts(*pairs, tokenizer=tokenizer, max_length=max_length)
    ids_BT, mask_BT, labels_BT = (torch.tensor(values, dtype=torch.int64) for values in rows)
    _require_within("prompt and completion", ids_BT, vocab_size, f"the model's vocabulary of {vocab_size} tokens")
    return ids_BT, mask_BT, labels_BT


def _require_within(name: str, values_BT: Tensor, stop: int, words: str, also: int | None = None) -> None:
    wrong_BT = (values_BT < 0) | (values_BT >= stop)
    if also is not None:
        wrong_BT &= values_BT != also
    if bool(wrong_BT.any()):
        row, position = wrong_BT.nonzero()[0].tolist()
        other = "" if also is None else f", or {also} where nothing is supervised"
        raise UserError(
            f"{name}: row {row}, position {position} is {int(values_BT[row, position])}, outside {words}: give 0 to "
            f"{stop - 1}{other}."
        )


def _require_no_label_on_padding(labels_BT: Tensor, mask_BT: Tensor) -> None:
    wrong_BT = (labels_BT != IGNORED) & (mask_BT == 0)
    if bool(wrong_BT.any()):
        row, position = wrong_BT.nonzero()[0].tolist()
        raise UserError(
            f"labels: row {row}, position {position} is {int(labels_BT[row, position])}, and attention_mask is 0 "
            f"there: give {IGNORED} at padding."
        )
