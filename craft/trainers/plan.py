"""What a CRAFT run is going to do, in figures."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CRAFTPlan:
    """The figures of one optimizer step of a full accumulation window."""

    strategy: str  # self_align or paired_dataset
    n_sft: int  # micro-batches with the trainer's own loss
    n_contrastive: int  # micro-batches with pairs; with self_align the same ones
    shares: tuple[float, float]  # of the optimizer steps that hold SFT and contrastive micro-batches
    effective_alpha: float  # share of the trainer's own loss in the gradient, before any balancing
    balancing: str  # what weighs the losses further, or "none"
    negatives_per_anchor: int  # when every batch, and the queue, is full
    queue_size: int  # of these, the most that come from the queue
    steps_per_epoch: int | None  # None: it takes a loader to know

    def __str__(self) -> str:
        """One line for a console or a log."""
        weighed = "" if self.balancing == "none" else f", weighed further by {self.balancing}"
        queue = f" ({self.queue_size:,} of them from the queue)" if self.queue_size else ""
        return (
            f"{self.strategy}: {self._kinds()}; effective alpha {self.effective_alpha:g}{weighed}; "
            f"{self.negatives_per_anchor:,} negatives per anchor{queue}"
        )

    def _kinds(self) -> str:
        if self.strategy == "self_align":
            return f"{self.n_sft} micro-batches a step, both losses from one forward pass"
        if min(self.shares) < 1:
            sft, contrastive = self.shares
            return f"SFT in {sft:.0%} of the steps, contrast in {contrastive:.0%}"
        return f"{self.n_sft} SFT and {self.n_contrastive} contrastive micro-batches a step"
