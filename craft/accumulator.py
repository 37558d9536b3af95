"""How much each micro-batch of an optimizer step weighs, so that alpha is the ratio of the accumulated gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


def compute_batch_distribution(beta: float, gradient_accumulation_steps: int) -> tuple[int, int]:
    """Return (SFT, contrastive) micro-batches of a window: beta of them are SFT ones, at least one of each kind.

    beta 0 or 1 gives one kind alone; a window of one micro-batch holds the kind that beta favours.
    Errors: ValueError for a beta outside [0, 1] or a window without micro-batches.
    """
    window = gradient_accumulation_steps
    if not 0 <= beta <= 1:
        raise ValueError(f"craft_beta={beta!r} must be between 0 and 1.")
    if window < 1:
        raise ValueError(f"gradient_accumulation_steps={window!r} must be at least 1.")
    if window == 1:
        return (1, 0) if beta >= 0.5 else (0, 1)
    n_sft = round(beta * window)
    if 0 < beta < 1:
        n_sft = min(max(n_sft, 1), window - 1)
    return n_sft, window - n_sft


def micro_batch_weights(counts: Sequence[int], share: float) -> list[float]:
    """Return what to multiply each micro-batch's mean loss by, so that they add up to `share` times the mean of all.

    counts: label tokens (SFT) or anchors (contrastive) of each micro-batch of one kind, summed over ranks if several.
    """
    total = sum(counts)
    return [share * count / total if total else 0.0 for count in counts]


@dataclass(frozen=True)
class AccumulationScales:
    """Factors of the micro-batch losses of one window, and the alpha that results from them."""

    sft_scale: float
    contrastive_scale: float
    n_sft: int
    n_contrastive: int
    effective_alpha: float


class CRAFTGradientAccumulator:
    """Scales losses that are means over their micro-batch: alpha / n_sft and (1 - alpha) / n_contrastive.

    The accumulated gradient is then alpha times the mean SFT gradient plus 1 - alpha times the mean contrastive one,
    whatever share of the window either kind has. Exact where micro-batches hold equally many tokens or anchors;
    micro_batch_weights is exact for any.
    Errors: ValueError for an alpha outside [0, 1], negative counts, an empty window or one above
    gradient_accumulation_steps.
    """

    def __init__(self, alpha: float, gradient_accumulation_steps: int, n_sft: int, n_contrastive: int) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"craft_alpha={alpha!r} must be between 0 and 1.")
        if gradient_accumulation_steps < 1:
            raise ValueError(f"gradient_accumulation_steps={gradient_accumulation_steps!r} must be at least 1.")
        self.alpha = float(alpha)
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.update_batch_counts(n_sft, n_contrastive)

    @property
    def scales(self) -> AccumulationScales:
        """The factors of the current counts."""
        return self._scales

    def scale_sft_loss(self, loss: Tensor) -> Tensor:
        """Return the SFT loss of a micro-batch as it enters the window's sum."""
        return loss * self._scales.sft_scale

    def scale_contrastive_loss(self, loss: Tensor) -> Tensor:
        """Return the contrastive loss of a micro-batch as it enters the window's sum."""
        return loss * self._scales.contrastive_scale

    def update_batch_counts(self, n_sft: int, n_contrastive: int) -> None:
        """Take the counts of another window, such as the short one at the end of an epoch."""
        if min(n_sft, n_contrastive) < 0 or not 1 <= n_sft + n_contrastive <= self.gradient_accumulation_steps:
            raise ValueError(
                f"n_sft={n_sft} and n_contrastive={n_contrastive} must be at least 0 and together between 1 and "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}."
            )
        self.n_sft, self.n_contrastive = n_sft, n_contrastive
        sft_scale = self.alpha / n_sft if n_sft else 0.0
        contrastive_scale = (1 - self.alpha) / n_contrastive if n_contrastive else 0.0
        effective = self.alpha if n_sft and n_contrastive else float(n_sft > 0)
        self._scales = AccumulationScales(sft_scale, contrastive_scale, n_sft, n_contrastive, effective)

    def __repr__(self) -> str:
        return (
            f"CRAFTGradientAccumulator(alpha={self.alpha}, n_sft={self.n_sft}, n_contrastive={self.n_contrastive}, "
            f"sft_scale={self._scales.sft_scale:.3f}, contrastive_scale={self._scales.contrastive_scale:.3f})"
        )
