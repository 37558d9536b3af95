"""What a CRAFT run is going to do, in figures."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CRAFTPlan:
    """The figures of one optimizer step of a full accumulation window."""

    strategy: str  # self_align or paired_dataset
    n_sft: int  # micro-batches with the trainer's own loss
    n_contrastive: int  # micro-batches with pairs; with self_align the same ones
    effective_alpha: float  # share of the trainer's own loss in the gradient, whatever the micro-batches
    negatives_per_anchor: int  # when every batch, and the queue, is full
    queue_size: int  # of these, the most that come from the queue
    steps_per_epoch: int | None  # None: a loader without length

    def __str__(self) -> str:
        """One line for a console or a log."""
        kinds = (
            f"{self.n_sft} micro-batches a step, both losses from one forward pass"
            if self.strategy == "self_align"
            else f"{self.n_sft} SFT and {self.n_contrastive} contrastive micro-batches a step"
        )
        queue = f" ({self.queue_size:,} of them from the queue)" if self.queue_size else ""
        return (
            f"{self.strategy}: {kinds}; effective alpha {self.effective_alpha:g}; "
            f"{self.negatives_per_anchor:,} negatives per anchor{queue}"
        )
