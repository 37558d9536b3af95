"""From a batch to the embeddings of its two sides: by one forward for self-aligned rows, by one a side for pairs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from craft.collate import PER_TOKEN, POOLING_MASK, SAMPLE_IDS, SUFFIX, TOKEN_MARKS
from craft.gradcache import grad_cache, split_rows
from craft.hooks import get_backbone, get_decoder, last_hidden_state, unwrap
from craft.mixing import BATCH_TYPE
from craft.negatives import hash_tokens
from craft.spans import MASK_KEYS

# Keys of a batch that are about its rows and not for the model.
OWN_KEYS = (BATCH_TYPE, SAMPLE_IDS, POOLING_MASK, f"{POOLING_MASK}_tgt", *MASK_KEYS)
TEXT_KEYS = PER_TOKEN  # a side with other keys has more than its text

Inputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a batch of pairs."""

    inputs: Inputs  # of the backbone
    mask_BT: Tensor  # positions that are pooled

    @property
    def ids_B(self) -> Tensor:
        """Content hash of each row; 0 where an image makes equal texts different."""
        if any(key not in TEXT_KEYS for key in self.inputs):
            return torch.zeros(len(self.mask_BT), dtype=torch.int64, device=self.mask_BT.device)
        return hash_tokens(self.inputs["input_ids"], self.mask_BT)


class HiddenStateRecorder:
    """Keeps the last hidden state of a forward pass that someone else makes.

    Some losses run the model a second time without gradient for their metrics: the first state that carries a gradient
    is the one. ``through_hook`` False reads the last of all hidden states, which the model must then be asked for
    (``extra_inputs``); it costs their memory and serves models whose decoder a hook does not find.
    """

    def __init__(self, model: nn.Module, *, through_hook: bool) -> None:
        self.extra_inputs = {} if through_hook else {"output_hidden_states": True}
        self._through_hook = through_hook
        # TRL's fused head returns no hidden states: they are then in the output of the body alone.
        self._modules = [get_decoder(model)] if through_hook else [get_backbone(model), unwrap(model)]
        self._seen: list[Tensor] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what is put out inside the context."""
        handles = [module.register_forward_hook(self._record) for module in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> Tensor:
        """Return the hidden state [B, T, H]; ValueError when none was put out."""
        if not self._seen:
            names = " or ".join(type(module).__name__ for module in self._modules)
            raise ValueError(
                f"no hidden state came out of {names}, so there is nothing to contrast. "
                + (
                    "Set craft_use_hidden_state_hook=False to read output_hidden_states instead."
                    if self._through_hook
                    else "The model must return hidden_states when asked for output_hidden_states=True."
                )
            )
        return next((state for state in self._seen if state.requires_grad), self._seen[0])

    def _record(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._through_hook:
            self._seen.append(last_hidden_state(output))
        elif states := getattr(output, "hidden_states", None):
            self._seen.append(states[-1])


class Encoder:
    """Embeds one side of pairs with the backbone, pooling and head of a trainer."""

    def __init__(
        self,
        *,
        embed: Callable[[Tensor, Tensor], Tensor],  # hidden states [B, T, H] and mask [B, T] to unit vectors [B, D]
        autocast: Callable[[], AbstractContextManager[Any]],
        chunk_size: int | None,  # rows per chunk of GradCache; None: without it
        through_hook: bool,  # False: output_hidden_states of the whole model
    ) -> None:
        self.embed = embed
        self.autocast = autocast
        self.chunk_size = chunk_size
        self.through_hook = through_hook

    def __call__(self, model: nn.Module, side: Side) -> Tensor:
        """Return the embeddings [B, D] of a side's rows."""

        def encode(chunk: Mapping[str, Tensor]) -> Tensor:
            inputs = dict(chunk)
            mask_BT = inputs.pop(POOLING_MASK)
            return self.embed(self._hidden(model, inputs), mask_BT)

        rows = {**side.inputs, POOLING_MASK: side.mask_BT}
        if self.chunk_size is None:
            return encode(rows)
        chunks, order_B = split_rows(rows, self.chunk_size)
        return grad_cache(encode, chunks)[order_B]

    def _hidden(self, model: nn.Module, inputs: Inputs) -> Tensor:
        own = unwrap(model)
        without_cache = {"use_cache": False} if isinstance(own, PreTrainedModel) else {}
        with self.autocast():
            if self.through_hook:
                return last_hidden_state(get_backbone(model)(**inputs, **without_cache))
            return last_hidden_state(own(**inputs, **without_cache, output_hidden_states=True))


def anchor_rows(batch: Mapping[str, Any], keys: Mapping[str, str]) -> int:
    """Return the number of anchors of a batch of pairs; ValueError as split_sides raises it where there are none."""
    ids_BT = batch.get(keys["anchor_input_ids"])
    if isinstance(ids_BT, Tensor):
        return len(ids_BT)
    return len(split_sides(batch, keys)[0].mask_BT)


def split_sides(batch: Mapping[str, Any], keys: Mapping[str, str]) -> tuple[Side, Side, list[Side]]:
    """Part a batch of pairs into its anchors, its positives and its hard negatives.

    ``keys`` are craft_contrastive_keys. Every tensor whose name ends in ``_tgt`` is an input of the positives, in
    ``_neg`` or ``_neg_N`` of hard negatives, any other of the anchors; labels and masks that no model reads are left
    out. ValueError names the columns that are missing.
    """
    sides: dict[str, Inputs] = {"": {}, "_tgt": {}}
    renamed = {
        keys["positive_input_ids"]: "input_ids_tgt",
        keys["positive_attention_mask"]: "attention_mask_tgt",
        keys["anchor_input_ids"]: "input_ids",
        keys["anchor_attention_mask"]: "attention_mask",
    }
    displaced = {name for column, name in renamed.items() if column in batch} - renamed.keys()
    for column, value in batch.items():
        name = renamed.get(column, column)
        suffix = match.group() if (match := SUFFIX.search(name)) else ""
        stem = name.removesuffix(suffix)
        if not isinstance(value, Tensor) or column in displaced or name in (SAMPLE_IDS, keys["anchor_labels"]):
            continue
        if stem not in TOKEN_MARKS or stem == POOLING_MASK:
            sides.setdefault(suffix, {})[stem] = value
    named = {"": keys["anchor_input_ids"], "_tgt": keys["positive_input_ids"]}
    for suffix, inputs in sides.items():
        if "input_ids" not in inputs:
            raise ValueError(_without_tokens(batch, named.get(suffix, f"input_ids{suffix}")))
    anchor, positive, *negatives = map(_side, sides.values())
    return anchor, positive, negatives


def _without_tokens(batch: Mapping[str, Any], column: str) -> str:
    """The message for a batch of pairs without the tokens of a side."""
    if column in batch:
        return (
            f"column {column!r} of a contrastive batch is a {type(batch[column]).__name__}: a tensor [rows, tokens] is "
            "needed. Collate the pairs with CRAFTCollator()."
        )
    return (
        f"a contrastive batch has no column {column!r}; it has {', '.join(map(str, batch))}. Give the pairs input_ids "
        "and input_ids_tgt (texts become such with craft.pairs.tokenize_pairs), or map your names with "
        "craft_contrastive_keys."
    )


def _side(inputs: Inputs) -> Side:
    inputs = dict(inputs)
    mask_BT = inputs.pop(POOLING_MASK, None)
    if mask_BT is None:
        mask_BT = inputs.get("attention_mask")
    if mask_BT is None:
        mask_BT = torch.ones_like(inputs["input_ids"])
    return Side(inputs=inputs, mask_BT=mask_BT)


def pair_ids(batch: Mapping[str, Any], anchors_B: Tensor, positives_B: Tensor) -> Tensor:
    """Sample, anchor and positive id of each pair [B, 3], 0 where unknown."""
    samples_B = batch.get(SAMPLE_IDS)
    if samples_B is None:
        samples_B = torch.zeros_like(anchors_B)
    return torch.stack([samples_B.to(anchors_B.device), anchors_B, positives_B.to(anchors_B.device)], dim=1)


def negative_ids(negatives: Sequence[Side]) -> Tensor:
    """Ids of hard negatives [N, 3]: known by their texts alone."""
    ids_N = torch.cat([side.ids_B for side in negatives])
    unknown_N = torch.zeros_like(ids_N)
    return torch.stack([unknown_N, unknown_N, ids_N], dim=1)
