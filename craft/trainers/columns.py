"""Columns of self-aligned rows that the trainer's own collator does not know: what marks the answer, and sample ids."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from craft.collate import IGNORED, SAMPLE_ID_COLUMNS, SAMPLE_IDS, sample_ids
from craft.config import CRAFTConfigMixin
from craft.spans import MASK_KEYS

Collator = Callable[[list[Any]], Any]


def own_columns(args: CRAFTConfigMixin) -> list[str]:
    """Names of the columns that self_align reads and a trainer does not know as inputs of its model."""
    named = (args.craft_assistant_mask_key, args.craft_contrastive_keys["anchor_labels"])
    return list(dict.fromkeys([*(name for name in named if name and name != "labels"), *MASK_KEYS, *SAMPLE_ID_COLUMNS]))


class KeepingCollator:
    """Collates with another collator, which sees none of ``columns``, and adds them to its batch.

    ``columns`` are masks and the column ``label_key`` with an entry for each token, and sample ids; ``keep_end`` says
    which end of a text was kept where a trainer has cut it to its maximal length.
    Errors: ValueError naming the row whose column does not fit its tokens.
    """

    def __init__(self, collator: Collator, columns: Sequence[str], *, label_key: str, keep_end: bool) -> None:
        self.collator = collator
        self.columns = columns
        self.label_key = label_key
        self.keep_end = keep_end

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Return the batch of some rows."""
        batch = self.collator([{name: row[name] for name in row if name not in self.columns} for row in rows])
        present = [name for name in self.columns if name in rows[0]]
        for name in present:
            if name not in SAMPLE_ID_COLUMNS:
                batch[name] = self._padded(name, rows, batch)
        ids = sample_ids({name: [row[name] for row in rows] for name in present})
        if ids is not None:
            batch[SAMPLE_IDS] = ids
        return batch

    def _padded(self, name: str, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Tensor]) -> Tensor:
        """The column [rows, tokens] at the places of the tokens, on whichever side the batch is padded."""
        ids_BT = batch["input_ids"]
        real_BT = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids_BT).bool()
        padded_BT = torch.full_like(ids_BT, IGNORED if name == self.label_key else 0)
        for number, row in enumerate(rows):
            length, values = int(real_BT[number].sum()), torch.as_tensor(row[name]).to(padded_BT.dtype)
            if len(values) < length:
                raise ValueError(
                    f"row {number} of the batch: {name} has {len(values)} entries for {length} tokens. Each token "
                    "needs one: make the column together with input_ids, or drop it."
                )
            padded_BT[number, real_BT[number]] = values[len(values) - length :] if self.keep_end else values[:length]
        return padded_BT
