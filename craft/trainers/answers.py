"""Answers: the rows of a forward pass whose prompts are contrasted with their own answers (self_align)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from craft.collate import SAMPLE_IDS
from craft.config import CRAFTConfigMixin
from craft.negatives import hash_tokens
from craft.spans import self_align_spans


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Rows of prompt and answer; T positions are those of the forward pass, padding included."""

    input_ids_BT: Tensor
    prompt_BT: Tensor  # true on the prompt's tokens
    answer_BT: Tensor  # true on the answer's
    rows: Tensor | None = None  # which rows of the forward pass these are; None: all of them
    sample_ids_B: Tensor | None = None  # rows of equal ids are no negatives of each other; None: unknown
    prompts_tell: bool = True  # rows of equal prompts are no negatives either; False: images make them different

    @property
    def valid_B(self) -> Tensor:
        """Whether both sides of a row have a token."""
        return self.prompt_BT.any(1) & self.answer_BT.any(1)

    def hidden(self, hidden_BTH: Tensor) -> Tensor:
        """The hidden states of the valid rows [V, T, H]."""
        wanted = self.valid_B.nonzero()[:, 0]
        wanted = wanted if self.rows is None else self.rows.to(wanted.device)[wanted]
        if len(wanted) == len(hidden_BTH) and self.rows is None:
            return hidden_BTH  # all of them as a rule, which spares a copy and its gradient
        return hidden_BTH[wanted.to(hidden_BTH.device)]

    def masks(self) -> tuple[Tensor, Tensor]:
        """Prompt and answer masks of the valid rows, each [V, T]."""
        return self.prompt_BT[self.valid_B], self.answer_BT[self.valid_B]

    def ids(self) -> Tensor:
        """Sample, prompt and answer id of each valid row [V, 3], 0 where unknown."""
        ids_BT = self.input_ids_BT
        unknown_B = torch.zeros(len(ids_BT), dtype=torch.int64, device=ids_BT.device)
        samples_B = unknown_B if self.sample_ids_B is None else self.sample_ids_B.to(ids_BT.device)
        prompts_B = hash_tokens(ids_BT, self.prompt_BT) if self.prompts_tell else unknown_B
        answers_B = hash_tokens(ids_BT, self.answer_BT)
        return torch.stack([samples_B, prompts_B, answers_B], dim=1)[self.valid_B]


def marked_answers(inputs: Mapping[str, Any], args: CRAFTConfigMixin, *, prompts_tell: bool) -> Answers:
    """The prompts and answers of a batch whose mask column or labels mark them (self_align_spans)."""
    spans = self_align_spans(
        inputs,
        strategy=args.craft_assistant_mask_strategy,
        mask_key=args.craft_assistant_mask_key,
        label_key=args.craft_contrastive_keys["anchor_labels"],
    )
    return Answers(
        input_ids_BT=inputs["input_ids"],
        prompt_BT=spans.anchor_BT,
        answer_BT=spans.positive_BT,
        sample_ids_B=inputs.get(SAMPLE_IDS),
        prompts_tell=prompts_tell,
    )
