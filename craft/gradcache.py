"""Contrastive batches of any size in the memory of one chunk: gradients with respect to the embeddings are cached.

With embeddings Z and G = ∂L/∂Z, the chain rule over chunks k gives ∂L/∂θ = Σ_k (∂Z_k/∂θ)ᵀ G_k (Gao et al. 2021,
"Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", eq. 6). `grad_cache` is that sum as one node
of the autograd graph, so that temperature, queue, gathering over ranks and loss scales around it are ordinary autograd.

Axes: B rows, M rows of all chunks, D embedding size, T tokens.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from craft.collate import PER_TOKEN
from craft.distributed import gather_ids, gather_rows
from craft.hooks import last_hidden_state, unwrap
from craft.losses import info_nce
from craft.negatives import CachedEmbeddingBank, duplicates, hash_tokens

__all__ = [
    "CachedEmbeddingBank",
    "GradCacheConfig",
    "GradCacheContrastiveLoss",
    "compute_infonce_with_negatives",
    "grad_cache",
    "split_rows",
]

# Inputs that have one entry per token in their second dimension, padded along with input_ids.
SEQUENCE_KEYS = (*PER_TOKEN, "inputs_embeds", "cross_attention_mask")

Encode = Callable[[Any], Tensor]


def grad_cache(encode: Encode, chunks: Sequence[Any], *, last_encode: Encode | None = None) -> Tensor:
    """Return the embeddings [M, D] of all chunks in order, holding the activations of one chunk at a time.

    `encode` maps a chunk to [rows, D] and must depend on the chunk, the parameters and torch's random state alone.
    The graph of the last chunk is kept; backward uses it, then encodes every other chunk again from the random and
    autocast state that it had, and adds the gradients to `.grad` of the parameters, one chunk after the other. Exact:
    the gradients are those of ``torch.cat([encode(chunk) for chunk in chunks])``, dropout included. Random states are
    afterwards what they were before backward. With ``retain_graph`` a second backward encodes every chunk again.
    Like reentrant checkpointing it fills `.grad` and cannot serve ``torch.autograd.grad`` for the parameters; whether
    anything is to be trained is read off the last chunk. `last_encode` takes the place of `encode` for the chunk that
    is encoded last in backward: with DistributedDataParallel the one pass that synchronises.
    Errors: ValueError without any chunk.
    """
    if not chunks:
        raise ValueError("grad_cache has no chunk to encode: the batch has no rows. Leave empty batches out.")
    last_encode = last_encode or encode
    if len(chunks) == 1:
        return last_encode(chunks[0])
    if not torch.is_grad_enabled():
        return torch.cat([encode(chunk) for chunk in chunks])
    states, embeddings = [], []
    with torch.no_grad():
        for chunk in chunks[:-1]:
            states.append(_RandomState())
            embeddings.append(encode(chunk))
    states.append(_RandomState())
    kept = encode(chunks[-1])
    embeddings.append(kept.detach())
    z_MD = torch.cat(embeddings)
    if not kept.requires_grad:
        return z_MD
    passes = _Passes(encode, last_encode, list(chunks), states, _Autocast(), [len(z) for z in embeddings], kept)
    return _Replay.apply(torch.empty(0, requires_grad=True), z_MD, passes)


class _Replay(torch.autograd.Function):
    """The identity on the cached embeddings, whose backward runs through the encoder; the trigger makes it a node."""

    @staticmethod
    def forward(ctx: Any, trigger: Tensor, z_MD: Tensor, passes: "_Passes") -> Tensor:
        ctx.passes = passes
        return z_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[None, None, None]:
        ctx.passes.backward(grad_MD)
        return None, None, None


@dataclass
class _Passes:
    """What the backward pass of one `grad_cache` call needs to encode its chunks again."""

    encode: Encode
    last_encode: Encode
    chunks: list[Any]
    states: list["_RandomState"]  # before each chunk
    autocast: "_Autocast"
    rows: list[int]  # of each chunk
    kept: Tensor | None  # the last chunk's embeddings with their graph, until the first backward

    def backward(self, grad_MD: Tensor) -> None:
        grads = grad_MD.split(self.rows)
        replayed = len(self.chunks)
        if self.kept is not None:
            kept, self.kept = self.kept, None
            replayed -= 1
            torch.autograd.backward(kept, grads[-1])
            del kept  # and its graph, before the next one is built
        before = _RandomState()
        try:
            with torch.enable_grad(), self.autocast.entered():
                for index in range(replayed):
                    self._replay(index, grads[index], last=index == replayed - 1)
        finally:
            before.restore()

    def _replay(self, index: int, grad: Tensor, *, last: bool) -> None:
        self.states[index].restore()
        z = (self.last_encode if last else self.encode)(self.chunks[index])
        if z.requires_grad:
            # Autocast may choose precisions in a forward pass only; leaving it altogether would drop its cached casts.
            with self.autocast.off():
                torch.autograd.backward(z, grad)


class _RandomState:
    """The states of torch's generators, of the CPU and of every CUDA device in use."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


class _Autocast:
    """The autocast settings at one moment, to be entered again in backward, which runs outside of the region."""

    def __init__(self) -> None:
        accelerator = torch.accelerator.current_accelerator()
        devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
        self.settings = {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices}
        self.cache = torch.is_autocast_cache_enabled()

    @contextmanager
    def entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            for device, (enabled, dtype) in self.settings.items():
                stack.enter_context(torch.autocast(device, dtype, enabled, self.cache))
            yield

    @contextmanager
    def off(self) -> Iterator[None]:
        with ExitStack() as stack:
            for device in self.settings:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield


def split_rows(
    inputs: Mapping[str, Tensor], chunk_size: int, *, lengths_B: Tensor | None = None
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Part a batch into chunks of at most `chunk_size` rows of similar length, each without its trailing padding.

    Returns the chunks, shortest rows first, and the index [B] that puts their concatenated outputs into the order of
    the rows: ``torch.cat(outputs)[index]``. The length of a row is where its last real token ends: `lengths_B`, or
    read off a two-dimensional ``attention_mask``; without either nothing is sorted or cut. Only the tensors that
    SEQUENCE_KEYS names are cut, in their second dimension. Leading padding stays: positions count from there.
    Errors: ValueError for a tensor that does not have one entry per row, and for a chunk size below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"craft_gradcache_chunk_size is {chunk_size}: give at least 1 row per chunk.")
    mask = inputs.get("attention_mask")
    rows = _count_rows(inputs, lengths_B)
    if lengths_B is None and mask is not None and mask.ndim == 2:
        positions_T = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        lengths_B = (positions_T * (mask != 0)).amax(1)
    # The incomplete chunk comes first, because the last one is the one that is not encoded twice.
    ends = range((rows - 1) % chunk_size + 1, rows + 1, chunk_size)
    spans = [slice(max(end - chunk_size, 0), end) for end in ends]
    if lengths_B is None:
        return [_take(inputs, span) for span in spans], torch.arange(rows, device=next(iter(inputs.values())).device)
    lengths_B, order_B = lengths_B.sort(stable=True)
    widths = lengths_B.clamp(min=1).tolist()
    chunks = [_trim(_take(inputs, order_B[span]), widths[span.stop - 1]) for span in spans]
    return chunks, order_B.argsort()


def _count_rows(inputs: Mapping[str, Tensor], lengths_B: Tensor | None) -> int:
    texts = (inputs[key] for key in SEQUENCE_KEYS if key in inputs)
    rows = len(lengths_B if lengths_B is not None else next(texts, next(iter(inputs.values()))))
    for name, value in inputs.items():
        if value.ndim == 0 or len(value) != rows:
            raise ValueError(
                f"{name} {list(value.shape)} does not have one entry for each of the {rows} rows, so the batch cannot "
                "be cut into chunks of rows. Set craft_use_gradcache=False for such inputs."
            )
    return rows


def _take(inputs: Mapping[str, Tensor], rows: slice | Tensor) -> dict[str, Tensor]:
    return {name: value[rows if isinstance(rows, slice) else rows.to(value.device)] for name, value in inputs.items()}


def _trim(chunk: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    cut = {name: chunk[name][:, :width] for name in SEQUENCE_KEYS if name in chunk and chunk[name].ndim > 1}
    return {**chunk, **cut}


@dataclass(frozen=True)
class GradCacheConfig:
    """Settings of `GradCacheContrastiveLoss`."""

    chunk_size: int = 4  # rows encoded at a time
    temperature: float = 0.05  # similarities are divided by it
    use_amp: bool = True  # False: the encoder leaves the autocast region that surrounds the call
    sync_gradients: bool = True  # under DistributedDataParallel: one all-reduce per backward; False: none

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size is {self.chunk_size}: give at least 1 row per chunk.")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: give a number above 0.")


class GradCacheContrastiveLoss(nn.Module):
    """InfoNCE (van den Oord 2018, eq. 4) between texts and their positives, in the memory of one chunk.

    `backbone` maps input_ids and attention_mask [B, T] to an output with hidden states [B, T, H], `pooling_fn` those
    and the mask to [B, H], `projector` that to [B, D]; embeddings are brought to unit length here. ``loss.backward()``
    fills the gradients of backbone and projector, equal to those of the whole batch at once. Rows with a text in common
    are no negatives of each other. With several processes the positives of all are contrasted, so that the mean of the
    losses over the processes is the loss of the whole batch. `backbone` and `projector` (never this module itself) may
    be wrapped in DistributedDataParallel: their gradients are then averaged in one all-reduce each per backward.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        pooling_fn: Callable[[Tensor, Tensor], Tensor],
        config: GradCacheConfig | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.pooling_fn = pooling_fn
        self.config = config or GradCacheConfig()
        takes_cache = "use_cache" in signature(unwrap(backbone).forward).parameters
        self._options: dict[str, Any] = {"use_cache": False} if takes_cache else {}

    def forward(
        self,
        anchor_ids: Tensor,
        anchor_mask: Tensor,
        positive_ids: Tensor,
        positive_mask: Tensor,
        return_embeddings: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Return the mean loss of the rows (ids and masks [B, T]), with the detached embeddings [B, D] if asked."""
        size = self.config.chunk_size
        anchors, anchor_order_B = split_rows({"input_ids": anchor_ids, "attention_mask": anchor_mask}, size)
        positives, positive_order_B = split_rows({"input_ids": positive_ids, "attention_mask": positive_mask}, size)
        z_MD = grad_cache(self._encode_locally, [*anchors, *positives], last_encode=self._encode_last)
        anchor_BD = z_MD[: len(anchor_ids)][anchor_order_B]
        positive_BD = z_MD[len(anchor_ids) :][positive_order_B]
        columns_MD, offset = gather_rows(positive_BD)
        if len(columns_MD) == 1:
            warnings.warn(
                "InfoNCE of a single pair has nothing to contrast: its loss is 0. Give more rows.", stacklevel=2
            )
        texts = (hash_tokens(anchor_ids, anchor_mask), hash_tokens(positive_ids, positive_mask))
        ids_B3 = torch.stack([torch.zeros_like(texts[0]), *texts], dim=1)
        loss = info_nce(
            anchor_BD,
            columns_MD,
            temperature=self.config.temperature,
            offset=offset,
            excluded_BM=duplicates(ids_B3, gather_ids(ids_B3)),
        ).losses_B.mean()
        return (loss, anchor_BD.detach(), positive_BD.detach()) if return_embeddings else loss

    def _encode(self, chunk: Mapping[str, Tensor]) -> Tensor:
        device = chunk["input_ids"].device.type
        with nullcontext() if self.config.use_amp else torch.autocast(device, enabled=False):
            hidden_CTH = last_hidden_state(self.backbone(**chunk, **self._options))
            pooled_CH = self.pooling_fn(hidden_CTH, chunk["attention_mask"])
        with torch.autocast(device, enabled=False):
            dtype = next((p.dtype for p in self.projector.parameters()), pooled_CH.dtype)
            z_CD = self.projector(pooled_CH.to(dtype))
            return F.normalize(z_CD.to(torch.promote_types(z_CD.dtype, torch.float32)), dim=-1)

    def _encode_locally(self, chunk: Mapping[str, Tensor]) -> Tensor:
        with ExitStack() as stack:
            for context in self._without_synchronisation():
                stack.enter_context(context)
            return self._encode(chunk)

    def _encode_last(self, chunk: Mapping[str, Tensor]) -> Tensor:
        return self._encode(chunk) if self.config.sync_gradients else self._encode_locally(chunk)

    def _without_synchronisation(self) -> list[AbstractContextManager[None]]:
        wrapped = (self.backbone, self.projector)
        return [module.no_sync() for module in wrapped if isinstance(module, DistributedDataParallel)]


def compute_infonce_with_negatives(
    anchor: Tensor, positive: Tensor, negatives: Tensor | None = None, temperature: float = 0.05
) -> Tensor:
    """Return the mean InfoNCE of unit vectors [B, D] against their positives [B, D] and `negatives` [N, D]."""
    return info_nce(anchor, positive, temperature=temperature, negatives_ND=negatives).losses_B.mean()
