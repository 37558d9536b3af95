"""CRAFTCollator: rows of any length into one padded batch, both texts of a pair alike."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from craft.fields import ContrastiveKeys
from craft.spans import MASK_KEYS

IGNORED = -100  # label of a position without supervision, as torch's cross entropy reads it
SAMPLE_IDS = "craft_sample_ids"
SAMPLE_ID_COLUMNS = (SAMPLE_IDS, "craft_sample_id", "sample_id", "id")
POOLING_MASK = "craft_pooling_mask"
SUFFIX = re.compile(r"(_tgt|_neg(_\d+)?)$")  # of the columns of a positive or a hard negative; anchors have none
# Columns with one value for each token, as long as the text's input_ids.
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids")
TOKEN_MARKS = ("labels", "special_tokens_mask", "completion_mask", *MASK_KEYS, POOLING_MASK)  # not for the model
PER_TOKEN = (*TOKEN_INPUTS, *TOKEN_MARKS)


class CRAFTCollator:
    """Pads rows of token lists or tensors and stacks them; anchors, ``_tgt`` and ``_neg`` columns alike.

    Arguments: `pad_token_id` fills input_ids (None: 0; padding is masked and never a label, so that its value has no
    effect); labels are filled with -100 and masks with 0; `padding_side`; `contrastive_keys` names columns that go by
    other names (craft_contrastive_keys).

    Batch: every column of numbers as a tensor [rows, tokens]; ``attention_mask`` with the suffix of each input_ids
    column, made from the lengths where there is none; ``craft_sample_ids`` int64 [rows] from a column
    craft_sample_id, sample_id or id (texts are hashed, 0 is "unknown"); anything else as a list. Labels are never
    made up: which tokens are learned is for the data set, or TRL's preparation of it, to say.
    Errors: ValueError naming the row and column that is missing, or of another length or shape than its fellows, and
    for rows without tokens.
    """

    def __init__(
        self,
        pad_token_id: int | None = None,
        padding_side: Literal["right", "left"] = "right",
        *,
        contrastive_keys: Mapping[str, str] | None = None,
    ) -> None:
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side={padding_side!r} must be 'right' or 'left'.")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        keys = ContrastiveKeys(contrastive_keys or {})
        self._masks = {
            keys.anchor_input_ids: keys.anchor_attention_mask,
            keys.positive_input_ids: keys.positive_attention_mask,
        }
        self._labels = keys.anchor_labels

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of some rows."""
        if not features:
            return {}
        columns = _columns(features)
        texts = [name for name in columns if self._is_input_ids(name)]
        lengths = {name: [len(row) for row in columns[name]] for name in texts}
        for name in texts:
            self._complete(name, columns, lengths[name])
        self._check_lengths(columns, lengths)
        ids = sample_ids(columns)
        batch = {name: self._collated(name, rows) for name, rows in columns.items() if name not in SAMPLE_ID_COLUMNS}
        if not texts:
            raise ValueError(
                f"the rows have no column of tokens: found {', '.join(map(str, columns)) or 'no column'}. Tokenise "
                "them first (pairs of texts with craft.pairs.tokenize_pairs), or name their input_ids in "
                "craft_contrastive_keys."
            )
        if ids is not None:
            batch[SAMPLE_IDS] = ids
        # accelerate reads the number of rows of a stream's batch off its first value.
        return dict(sorted(batch.items(), key=lambda item: not isinstance(item[1], Tensor)))

    def _is_input_ids(self, name: str) -> bool:
        return name in self._masks or SUFFIX.sub("", name) == "input_ids"

    def _complete(self, name: str, columns: dict[str, list[Any]], lengths: list[int]) -> None:
        """Add the mask of a text where the data set has none: every token that a row has is real."""
        suffix = SUFFIX.search(name)
        mask = self._masks.get(name, "attention_mask" + (suffix.group() if suffix else ""))
        if mask not in columns:
            columns[mask] = [torch.ones(length, dtype=torch.int64) for length in lengths]

    def _check_lengths(self, columns: Mapping[str, list[Any]], lengths: Mapping[str, list[int]]) -> None:
        for name, rows in columns.items():
            suffix = SUFFIX.search(name)
            text = "input_ids" + (suffix.group() if suffix else "")
            if SUFFIX.sub("", name) not in PER_TOKEN or text not in lengths:
                continue
            for row, (values, length) in enumerate(zip(rows, lengths[text], strict=True)):
                if is_array(values) and len(values) != length:
                    raise ValueError(
                        f"row {row} of the batch: {name} has {len(values)} entries and {text} has {length}. Each token "
                        "needs one: cut or pad both columns together."
                    )

    def _collated(self, name: str, rows: list[Any]) -> Any:
        """A column as one tensor where its rows are tensors or lists of numbers, else as the list of its values."""
        if not all(is_array(row) for row in rows):
            return rows
        tensors = [torch.as_tensor(row) for row in rows]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) == 1:
            return torch.stack(tensors)
        if any(tensor.dim() != 1 for tensor in tensors):
            raise ValueError(
                f"column {name} has rows of shapes {', '.join(map(str, sorted(shapes)))}: only lists of numbers are "
                "padded. Bring them to one shape, or drop the column."
            )
        return self._padded(tensors, self._fill_of(name))

    def _fill_of(self, name: str) -> int:
        if self._is_input_ids(name):
            return self.pad_token_id or 0
        is_labels = name == self._labels or SUFFIX.sub("", name) == "labels"
        return IGNORED if is_labels else 0

    def _padded(self, rows: list[Tensor], fill: int) -> Tensor:
        dtype = max((row.dtype for row in rows if row.numel()), key=lambda dtype: dtype.is_floating_point)
        batch = torch.full((len(rows), max(map(len, rows))), fill, dtype=dtype)
        for target, row in zip(batch, rows, strict=True):
            if self.padding_side == "left":
                target[len(target) - len(row) :] = row
            else:
                target[: len(row)] = row
        return batch


def _columns(features: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The rows' values by column, in the order of the first row."""
    for row, feature in enumerate(features):
        if not isinstance(feature, Mapping):
            raise ValueError(
                f"row {row} of the batch is a {type(feature).__name__}: a mapping of column names to values is needed. "
                "Give such rows, or a collator of your own."
            )
        if different := feature.keys() ^ features[0].keys():
            raise ValueError(
                f"row {row} of the batch and row 0 differ in the columns {', '.join(sorted(different))}. Every row of "
                "a data set needs the same columns."
            )
    columns = {name: [feature[name] for feature in features] for name in features[0]}
    for name, values in columns.items():
        missing = [row for row, value in enumerate(values) if value is None]
        if 0 < len(missing) < len(values) and any(is_array(value) for value in values):
            raise ValueError(f"row {missing[0]} of the batch has no {name}, others have. Fill it in, or drop the row.")
    return {name: values for name, values in columns.items() if not all(value is None for value in values)}


def is_array(value: Any) -> bool:
    """Whether a value is a tensor, an array, or a list of numbers (of any depth)."""
    if isinstance(value, list | tuple):
        return not value or is_array(value[0]) or isinstance(value[0], int | float)
    return isinstance(value, Tensor) or getattr(value, "ndim", 0) > 0


def sample_ids(columns: Mapping[str, list[Any]]) -> Tensor | None:
    """Return which sample each row is of, int64 [rows], 0 where a row does not say; None without such a column."""
    name = next((name for name in SAMPLE_ID_COLUMNS if name in columns), None)
    return None if name is None else torch.tensor([_sample_id(value) for value in columns[name]], dtype=torch.int64)


def _sample_id(value: Any) -> int:
    if value is None:
        return 0
    number = 0 if isinstance(value, str) else int(value)
    if number and abs(number) < 1 << 63:
        return number
    digest = hashlib.blake2b(str(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) or 1
