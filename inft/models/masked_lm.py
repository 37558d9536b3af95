"""The head of masked language modelling and its loss, at the masked positions alone or at all of them.

Axes: T positions, M masked positions, H hidden size, V vocabulary.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from params.errors import UserError

FusedKernel = Literal["off", "torch", "liger"]
Reduction = Literal["mean", "sum", "none"]  # none: of each masked position

ROWS = 2048  # positions whose logits exist at a time in the fused loss: 125 MB in bfloat16 for 30,522 tokens


@dataclass
class MaskedLMLossOutput(MaskedLMOutput):
    """MaskedLMOutput, and how many masked positions the most likely token fills correctly."""

    correct: Tensor | None = None


def has_torch_kernel() -> bool:
    """Whether this torch has a linear_cross_entropy that works in chunks."""
    return hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")


def has_liger() -> bool:
    """Whether liger-kernel is installed."""
    return find_spec("liger_kernel") is not None


def masked_loss(
    head: nn.Linear,
    hidden: Tensor,
    labels: Tensor,
    masked_M: Tensor,
    *,
    fused: FusedKernel,
    reduction: Reduction,
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and the number of correct predictions of hidden [..., H] at the positions masked_M.

    Positions without a label are left out before the head, which is what makes it cheap. Computed in float32 (float64
    stays). A fused kernel never holds all logits; correct predictions are then found in chunks, without gradient.
    reduction "none" gives the loss and the correctness of each masked position, unfused.
    Errors: UserError where the kernel cannot run.
    """
    hidden_MH = hidden.flatten(0, -2)[masked_M]
    labels_M = labels.flatten()[masked_M]
    if reduction == "none":
        return _each(head(hidden_MH), labels_M)
    if fused == "off" or not len(masked_M):  # no kernel takes nothing
        logits_MV = head(hidden_MH)
        loss, correct = _cross_entropy(logits_MV, labels_M), _correct(logits_MV, labels_M)
    else:
        check_fused(fused, head, hidden.device.type)
        loss = _torch_loss(head, hidden_MH, labels_M) if fused == "torch" else _liger_loss(head, hidden_MH, labels_M)
        correct = _correct_in_chunks(head, hidden_MH, labels_M)
    return _reduced(loss, len(masked_M), reduction), correct


def full_loss(logits: Tensor, labels: Tensor, masked_M: Tensor, *, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """Return the same of the logits [..., V] of every position."""
    logits_TV, labels_T = logits.flatten(0, -2), labels.flatten()
    if reduction == "none":
        return _each(logits_TV[masked_M], labels_T[masked_M])
    with torch.no_grad():
        correct = (logits_TV.argmax(-1) == labels_T).sum()
    return _reduced(_cross_entropy(logits_TV, labels_T), len(masked_M), reduction), correct


def check_fused(fused: FusedKernel, head: nn.Module, device_type: str) -> None:
    """Raise a UserError that names what the kernel lacks."""
    missing = []
    if fused == "torch" and not has_torch_kernel():
        missing.append(f"torch 2.13 (this is {torch.__version__})")
    if fused == "liger" and not has_liger():
        missing.append("the package liger-kernel (pip install liger-kernel)")
    if fused == "liger" and device_type != "cuda":
        missing.append(f"a CUDA device (the model is on {device_type})")
    if fused != "off" and type(head) is not nn.Linear:
        missing.append(f"a plain linear head (it was converted to {type(head).__name__}: filter_fqns keeps decoder)")
    if missing:
        raise UserError(
            f"trainer.fused_linear_cross_entropy: {fused} needs {', '.join(missing)}. "
            "Set trainer.fused_linear_cross_entropy: off."
        )


def _torch_loss(head: nn.Linear, hidden_MH: Tensor, labels_M: Tensor) -> Tensor:
    hidden_MH, weight_VH, bias_V = _in_autocast_dtype(head, hidden_MH)
    # Chunks of torch's own choice are a few rows for a vocabulary this size: many small products.
    # Compiled code cannot use the gradients up in place.
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=ROWS, allow_retain_graph=torch.compiler.is_compiling())
    return F.linear_cross_entropy(
        hidden_MH, weight_VH, labels_M, linear_bias=bias_V, reduction="sum", options=options
    ).to(torch.promote_types(hidden_MH.dtype, torch.float32))


def _liger_loss(head: nn.Linear, hidden_MH: Tensor, labels_M: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    hidden_MH, weight_VH, bias_V = _in_autocast_dtype(head, hidden_MH)
    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight_VH, hidden_MH, labels_M, bias_V).float()


def _in_autocast_dtype(head: nn.Linear, hidden_MH: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast would do for a linear layer: the kernels are outside its list."""
    device = hidden_MH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    bias_V = None if head.bias is None else head.bias.to(dtype)
    return hidden_MH.to(dtype), head.weight.to(dtype), bias_V


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def _each(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the correctness of each position."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return (logits.argmax(-1) == labels).sum()


def _correct_in_chunks(head: nn.Linear, hidden_MH: Tensor, labels_M: Tensor) -> Tensor:
    with torch.no_grad():
        pieces = zip(hidden_MH.split(ROWS), labels_M.split(ROWS), strict=True)
        return torch.stack([_correct(head(hidden), labels) for hidden, labels in pieces]).sum()


def _reduced(loss_sum: Tensor, count: int, reduction: Reduction) -> Tensor:
    return loss_sum / max(count, 1) if reduction == "mean" else loss_sum
