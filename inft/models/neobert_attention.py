"""Bidirectional attention within each document of one flat token stream, and rotary positions.

Axes: T tokens of the stream, N documents, A heads, D features of a head, F = D / 2 rotary pairs.
"""

from functools import lru_cache
from importlib.util import find_spec
from itertools import groupby
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from params.errors import UserError

AttentionBackend = Literal["sdpa", "flash_attn_varlen"]

HALF_PRECISION = (torch.bfloat16, torch.float16)  # what the kernels for ragged documents take
AMPERE = (8, 0)  # the first compute capability with these kernels
WIDEST_HEAD = 256  # features, of these kernels


class Rotary(NamedTuple):
    """Cosine and sine of every token's angles."""

    cos_TF: Tensor
    sin_TF: Tensor


def rotary_angles(position_ids_T: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Return cos and sin of position · θ^(-2i/D) for pair i (Su et al. 2021, RoFormer, eq. 15).

    Computed in float32, or float64 for float64 models: bfloat16 cannot hold the angles of late positions.
    """
    precision = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(0, head_size, 2, device=position_ids_T.device, dtype=precision)
    angles_TF = position_ids_T.to(precision)[:, None] * theta ** (-pairs / head_size)
    return Rotary(angles_TF.cos(), angles_TF.sin())


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the interleaved pairs (x0, x1), (x2, x3), ... of x [T, ..., D] by each token's angles; x's dtype stays."""
    pairs = x.to(rotary.cos_TF.dtype).unflatten(-1, (-1, 2))
    between = (1,) * (x.dim() - 2)  # axes between tokens and features
    cos, sin = (table.view(table.shape[0], *between, table.shape[1]) for table in rotary)
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic and leaves complex numbers alone
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    else:  # one pass over the memory instead of six
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x.dtype)


def check_backend(backend: AttentionBackend, device_type: str, dtype: torch.dtype) -> None:
    """Raise a UserError that names what flash_attn_varlen lacks here; sdpa works everywhere.

    dtype is that of the attention's inputs: under autocast, autocast's.
    """
    if backend == "sdpa":
        return
    missing = []
    if device_type != "cuda":
        missing.append(f"a CUDA device (the model is on {device_type})")
    if find_spec("flash_attn") is None:
        missing.append("the package flash-attn (pip install flash-attn --no-build-isolation)")
    if dtype not in HALF_PRECISION:
        missing.append(f"bfloat16 (the attention's inputs are {str(dtype).removeprefix('torch.')})")
    if missing:
        raise UserError(f"model.attn_backend: {backend} needs {', '.join(missing)}. Set model.attn_backend: sdpa.")


def document_attention(
    q_TAD: Tensor, k_TAD: Tensor, v_TAD: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: AttentionBackend
) -> Tensor:
    """Return softmax(q kᵀ / √D) v within each document, [T, A, D].

    cu_seqlens is int32 [N + 1] from 0 to T; repeated values are empty documents. "sdpa" is torch's varlen_attn on CUDA
    in bfloat16 or float16, elsewhere scaled_dot_product_attention document by document: the same function of the
    inputs. "flash_attn_varlen" is flash-attn's, which check_backend has found.
    """
    if backend == "flash_attn_varlen":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q_TAD, k_TAD, v_TAD, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    if q_TAD.device.type == "cuda" and _kernel_takes(q_TAD.dtype, q_TAD.shape[-1], q_TAD.device.index or 0):
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q_TAD, k_TAD, v_TAD, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _one_by_one(q_TAD, k_TAD, v_TAD, cu_seqlens)


def _kernel_takes(dtype: torch.dtype, head_size: int, device: int) -> bool:
    return dtype in HALF_PRECISION and head_size % 8 == 0 and head_size <= WIDEST_HEAD and _capability(device) >= AMPERE


@lru_cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.disable(reason="the number of documents differs from batch to batch")
def _one_by_one(q_TAD: Tensor, k_TAD: Tensor, v_TAD: Tensor, cu_seqlens: Tensor) -> Tensor:
    """SDPA for each run of neighbouring documents of equal length."""
    runs = [(length, len(list(same))) for length, same in groupby(cu_seqlens.diff().tolist()) if length]
    sizes = [length * documents for length, documents in runs]
    if sum(sizes) != len(q_TAD):
        raise ValueError(f"cu_seqlens ends at {sum(sizes)}, but the stream has {len(q_TAD)} tokens.")
    if not runs:
        return torch.zeros_like(v_TAD) + q_TAD * 0 + k_TAD * 0
    # split, not slices: the gradient of a slice is a tensor as long as the stream, for every document.
    pieces = zip(runs, q_TAD.split(sizes), k_TAD.split(sizes), v_TAD.split(sizes), strict=True)
    return torch.cat([_equally_long(q, k, v, length) for (length, _), q, k, v in pieces])


def _equally_long(q_TAD: Tensor, k_TAD: Tensor, v_TAD: Tensor, length: int) -> Tensor:
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q_TAD, k_TAD, v_TAD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
