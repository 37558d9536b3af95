"""InfoNCE as a module with its head and temperature, and the blend of a contrastive with a supervised loss.

Axes: B pairs, N additional negatives, T tokens, H hidden size, D embedding size.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from craft.head import ProjectionHead
from craft.infonce import InfoNCEOutput, info_nce
from craft.negatives import ID_COLUMNS, duplicates
from craft.pooling import PoolingStrategy, check_strategy, pool_hidden_states
from params.craft import LEARNABLE_TEMPERATURE

__all__ = [
    "CRAFTLossOutputs",
    "InfoNCELoss",
    "InfoNCEOutput",
    "PoolingStrategy",
    "ProjectionHead",
    "combine_craft_losses",
    "info_nce",
    "pool_hidden_states",
]

TEMPERATURE_RANGE = (LEARNABLE_TEMPERATURE.low, LEARNABLE_TEMPERATURE.high)
REDUCTIONS = ("mean", "sum", "none")


class InfoNCELoss(nn.Module):
    """InfoNCE over the pairs of a batch: pooling, projection head, temperature.

    Arguments: `temperature` τ > 0; `reduction` of the losses per anchor (mean, sum or none); `hidden_size` of the
    model, so that the head exists before the optimizer is made (without it the first forward makes the head);
    `projection_dim`, `pooling`, `dropout` of the head; `symmetric` adds positive → anchor (CLIP).
    A learnable temperature is kept as `log_temperature`, within [0.01, 1] by `clamp_temperature` after each step: no
    clamp in the forward, where it would take the gradient away. A fixed one is used exactly as given.
    Errors: ValueError for an argument out of range.
    """

    def __init__(
        self,
        temperature: float = 0.05,
        reduction: str = "mean",
        hidden_size: int | None = None,
        projection_dim: int = 256,
        pooling: PoolingStrategy = "last_token",
        learnable_temperature: bool = False,
        dropout: float = 0.0,
        *,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        check_strategy(pooling)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction {reduction!r} is unknown: choose one of {', '.join(REDUCTIONS)}.")
        _check_temperature(temperature, learnable=learnable_temperature)
        self.reduction = reduction
        self.pooling = pooling
        self.projection_dim = projection_dim
        self.dropout = dropout
        self.symmetric = symmetric
        self.learnable_temperature = learnable_temperature
        self.fixed_temperature = float(temperature)
        log_temperature = torch.tensor(math.log(temperature), dtype=torch.float32)
        if learnable_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)
        self.projector: ProjectionHead | None = None
        if hidden_size is not None:
            self._add_projector(hidden_size)

    @property
    def temperature(self) -> Tensor:
        """The temperature as a float32 scalar, with gradient when it is learnable."""
        if self.learnable_temperature:
            return self.log_temperature.exp()
        return torch.full_like(self.log_temperature, self.fixed_temperature)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Bring a learnable temperature back into [0.01, 1], in place; call it after each optimizer step."""
        if self.learnable_temperature:
            self.log_temperature.clamp_(*map(math.log, TEMPERATURE_RANGE))

    def forward(
        self,
        hidden_states_anchor: Tensor,
        hidden_states_positive: Tensor,
        mask_anchor: Tensor,
        mask_positive: Tensor,
        *,
        return_details: bool = False,
        additional_negatives: Tensor | None = None,
        sample_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of hidden states [B, T, H] under masks [B, T]; the lengths of the two sides may differ.

        `additional_negatives` [N, projection_dim] are unit vectors. Rows that share a `sample_ids` [B] (0: unknown)
        are no negatives of each other. With `return_details` also the detached anchor_embeddings,
        positive_embeddings, logits [B, B + N] and temperature.
        """
        anchor_BH = pool_hidden_states(hidden_states_anchor, mask_anchor, self.pooling)
        positive_BH = pool_hidden_states(hidden_states_positive, mask_positive, self.pooling)
        a_BD, p_BD = self._project_pair(anchor_BH, positive_BH)
        loss = self._loss(a_BD, p_BD, additional_negatives, sample_ids)
        return (loss, self._details(a_BD, p_BD, additional_negatives)) if return_details else loss

    def forward_from_pooled(
        self,
        anchor_pooled: Tensor,
        positive_pooled: Tensor,
        *,
        additional_negatives: Tensor | None = None,
        sample_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of vectors [B, H] that are pooled already; the rest as in forward."""
        a_BD, p_BD = self._project_pair(anchor_pooled, positive_pooled)
        return self._loss(a_BD, p_BD, additional_negatives, sample_ids)

    def _add_projector(self, hidden_size: int) -> None:
        head = ProjectionHead(hidden_size, hidden_size, self.projection_dim, self.dropout)
        self.projector = head.to(self.log_temperature.device)

    def _project(self, pooled: Tensor) -> Tensor:
        """Unit vectors [B, projection_dim] of pooled vectors [B, H]."""
        if self.projector is None:
            raise RuntimeError("there is no projection head yet: give InfoNCELoss the model's hidden_size.")
        unit: Tensor = self.projector(pooled)
        return unit

    def _project_pair(self, anchor_BH: Tensor, positive_BH: Tensor) -> tuple[Tensor, Tensor]:
        if self.projector is None:
            self._add_projector(anchor_BH.shape[-1])
            self.to(anchor_BH.device)
        return self._project(anchor_BH), self._project(positive_BH)

    def _loss(self, a_BD: Tensor, p_BD: Tensor, negatives: Tensor | None, sample_ids: Tensor | None) -> Tensor:
        if len(p_BD) == 1 and (negatives is None or not len(negatives)):
            warnings.warn(
                "InfoNCE of a single pair has nothing to contrast: its loss is 0. Raise the batch size "
                "(craft_contrastive_batch_size) or use a queue (craft_negative_strategy='queue').",
                stacklevel=3,
            )
        trained = negatives is not None and negatives.requires_grad
        losses_B = info_nce(
            a_BD,
            p_BD,
            temperature=self.temperature if self.learnable_temperature else self.fixed_temperature,
            excluded_BM=None if sample_ids is None else _same_sample_id(sample_ids),
            queue_KD=None if trained else negatives,
            negatives_ND=negatives if trained else None,
            all_anchors_MD=a_BD if self.symmetric else None,
        ).losses_B
        if self.reduction == "none":
            return losses_B
        return losses_B.sum() if self.reduction == "sum" else losses_B.mean()

    @torch.no_grad()
    def _details(self, a_BD: Tensor, p_BD: Tensor, negatives: Tensor | None) -> dict[str, Tensor]:
        columns = p_BD if negatives is None else torch.cat([p_BD, negatives.to(p_BD)])
        with torch.autocast(a_BD.device.type, enabled=False):
            logits = a_BD @ columns.T / self.temperature
        return {
            "anchor_embeddings": a_BD.detach(),
            "positive_embeddings": p_BD.detach(),
            "logits": logits,
            "temperature": self.temperature.detach(),
        }


def _check_temperature(temperature: float, *, learnable: bool) -> None:
    low, high = TEMPERATURE_RANGE
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature {temperature} is not a number above 0.")
    if learnable and not low <= temperature <= high:
        raise ValueError(
            f"temperature {temperature} is outside [{low}, {high:g}], where a learnable one is kept: start it there, "
            "or set learnable_temperature=False to use it as given."
        )


def _same_sample_id(sample_ids_B: Tensor) -> Tensor:
    ids_B3 = sample_ids_B.new_zeros(len(sample_ids_B), len(ID_COLUMNS), dtype=torch.int64)
    ids_B3[:, ID_COLUMNS.index("sample")] = sample_ids_B
    return duplicates(ids_B3, ids_B3)


@dataclass
class CRAFTLossOutputs:
    """The weighted sum and its two parts, unweighted."""

    total_loss: Tensor
    sft_loss: Tensor
    contrastive_loss: Tensor


def combine_craft_losses(*, sft_loss: Tensor, contrastive_loss: Tensor, alpha: float) -> CRAFTLossOutputs:
    """Return alpha * SFT + (1 - alpha) * contrastive with its parts; ValueError for an alpha outside [0, 1]."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha} is not the share of a loss: give a number from 0 to 1.")
    total = alpha * sft_loss + (1 - alpha) * contrastive_loss
    return CRAFTLossOutputs(total_loss=total, sft_loss=sft_loss, contrastive_loss=contrastive_loss)
