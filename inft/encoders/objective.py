"""The objective of pretraining: the summed cross-entropy of the masked positions of one flat batch.

Axes: T tokens of the stream, M masked positions.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from inft.models.masked_lm import FusedKernel, check_fused, has_liger, has_torch_kernel
from params.errors import UserError

FusedChoice = Literal["auto", "off", "torch", "liger"]


class MaskedBatch(Protocol):
    """What the objective reads of a batch."""

    @property
    def input_ids_T(self) -> Tensor: ...  # noqa: D102
    @property
    def labels_T(self) -> Tensor: ...  # noqa: D102
    @property
    def position_ids_T(self) -> Tensor: ...  # noqa: D102
    @property
    def cu_seqlens(self) -> Tensor: ...  # noqa: D102
    @property
    def max_seqlen(self) -> int: ...  # noqa: D102
    @property
    def masked(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class MaskedLoss:
    """Sums over the masked positions of a batch; whoever adds batches up divides at the end."""

    loss_sum: Tensor  # float32 scalar with a graph, also without any masked position
    count: int  # masked positions
    correct: Tensor  # int64 scalar: positions whose most likely token is the label; no gradient


def masked_lm_loss(
    model: nn.Module, batch: MaskedBatch, *, masked_only: bool = True, fused: FusedChoice = "auto"
) -> MaskedLoss:
    """Return the summed cross-entropy of a batch, through the forward pass of a NeoBERTForMaskedLM.

    The model may be wrapped (DistributedDataParallel, torch.compile): nothing but its forward is called, whose hooks
    synchronise the gradients. `masked_only` gathers the masked positions before the head; without it the logits of all
    positions are made, an ablation with the same loss. `fused` joins head and loss, see `resolve_fused`.
    Errors: UserError for a fused kernel that cannot run here, or with masked_only=False.
    """
    kernel = resolve_fused(fused, model, batch.input_ids_T.device.type) if masked_only else _none(fused)
    output = _forward(model, batch, masked_only=masked_only, fused=kernel, reduction="sum")
    return MaskedLoss(loss_sum=output.loss, count=batch.masked, correct=output.correct)


def masked_token_losses(model: nn.Module, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy [M] of each masked position in the order of the stream, and whether it is predicted."""
    output = _forward(model, batch, masked_only=True, fused="off", reduction="none")
    return output.loss, output.correct


def _forward(model: nn.Module, batch: MaskedBatch, **how: Any) -> Any:
    return model(
        input_ids=batch.input_ids_T,
        labels=batch.labels_T,
        position_ids=batch.position_ids_T,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
        **how,
    )


def resolve_fused(fused: FusedChoice, model: nn.Module, device_type: str) -> FusedKernel:
    """Return the kernel of a setting; "auto": liger where it is installed, else torch's own, on CUDA only.

    On a CPU the kernels save memory and no time, and a head that a low-precision recipe converted must be called as it
    is: "auto" is then off. Errors: UserError when the kernel that was asked for cannot run.
    """
    head = _head(model)
    if fused == "auto":
        if device_type != "cuda" or type(head) is not nn.Linear:
            return "off"
        return "liger" if has_liger() else "torch" if has_torch_kernel() else "off"
    check_fused(fused, head, device_type)
    return fused


def _head(model: nn.Module) -> nn.Module:
    """The decoder below any wrapper."""
    return next(module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "decoder")


def _none(fused: FusedChoice) -> FusedKernel:
    if fused in ("torch", "liger"):
        raise UserError(
            f"trainer.fused_linear_cross_entropy: {fused} needs trainer.masked_logits_only_loss: true; the ablation "
            "makes all logits. Set trainer.fused_linear_cross_entropy: off."
        )
    return "off"
