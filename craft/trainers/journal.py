"""The figures of a CRAFT run: what is logged under which key, averaged over the logging window and all ranks."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from craft.distributed import rank
from craft.infonce import InfoNCEOutput
from craft.metrics import compute_representation_consistency, update_representation_reference
from craft.trainers.meter import Meter
from craft.trainers.window import SFT

SFT_LOSS, CONTRASTIVE_LOSS, TOTAL_LOSS = "loss/craft_sft", "loss/craft_contrast", "loss/craft_total"
ACCURACY = "metrics/craft_contrastive_accuracy"
CONSISTENCY = "metrics/craft_representation_consistency"
TEMPERATURE = "metrics/craft_temperature"
GRADIENT_NORM = "metrics/craft_gradient_norm"
CONTRASTED = "contrasted"  # share of the anchors that had a negative; not logged
NAMES = (
    CONTRASTED,
    SFT_LOSS,
    CONTRASTIVE_LOSS,
    ACCURACY,
    CONSISTENCY,
    TEMPERATURE,
    f"{GRADIENT_NORM}_sft",
    f"{GRADIENT_NORM}_contrast",
)
NOTHING_TO_CONTRAST = (
    "InfoNCE has nothing to contrast: no anchor of this logging window had a negative, so that the contrastive loss is "
    "0 and no accuracy is reported. The batch holds one pair, or copies of one (equal texts and equal sample ids are "
    "no negatives). Give more different pairs, raise the batch size (craft_contrastive_batch_size for pairs), use "
    "craft_negative_strategy='queue', or give the pairs columns input_ids_neg."
)


class Journal:
    """Sums of the window and the reference that consistency is measured against."""

    def __init__(self, device: torch.device, *, wanted: Sequence[str], alpha: float) -> None:
        self.wanted = wanted  # craft_report_metrics
        self.alpha = alpha
        self.latest: dict[str, float] = {}  # what was logged last
        self.reference: Tensor | None = None  # running mean of the anchors
        self.meter = Meter(device)
        self._warned = False

    def note_sft(self, total: Tensor, weight: Tensor | float) -> None:
        """Add a micro-batch's SFT loss: the sum over its tokens and their number, or a mean that weighs 1."""
        self.meter.add(SFT_LOSS, total, weight)

    def note_contrast(
        self, found: InfoNCEOutput | Tensor, losses_B: Tensor, anchors_BD: Tensor, temperature: Tensor | None
    ) -> None:
        """Add a contrastive micro-batch; a ``temperature`` that is None is not logged."""
        self.meter.add(CONTRASTIVE_LOSS, losses_B.detach().sum(), float(len(losses_B)))
        if isinstance(found, InfoNCEOutput):
            self.meter.add(CONTRASTED, found.contrasted_B.sum(), float(len(losses_B)))
        if "contrastive_accuracy" in self.wanted and isinstance(found, InfoNCEOutput):
            right_B = found.correct_B & found.contrasted_B  # an anchor without negatives proves nothing
            self.meter.add(ACCURACY, right_B.sum(), found.contrasted_B.sum())
        if temperature is not None:
            self.meter.add(TEMPERATURE, temperature.detach(), 1.0)
        # One rank's reference is enough: what drifts is the same model everywhere.
        if "representation_consistency" in self.wanted and rank() == 0 and len(anchors_BD):
            if self.reference is not None:
                self.meter.add(
                    CONSISTENCY, compute_representation_consistency(anchors_BD.detach(), self.reference), 1.0
                )
            self.reference = update_representation_reference(self.reference, anchors_BD)

    def note_norm(self, task: str, norm: float) -> None:
        """Add the norm of a task's gradient."""
        self.meter.add(f"{GRADIENT_NORM}_{'sft' if task == SFT else 'contrast'}", norm, 1.0)

    def flush(self) -> dict[str, float]:
        """The means since the last flush; all ranks take part."""
        found = self.meter.flush(NAMES)
        weighted = ((SFT_LOSS, self.alpha), (CONTRASTIVE_LOSS, 1 - self.alpha))
        if all(name in found for name, _ in weighted):  # a window may hold one kind alone: its part is no total
            found[TOTAL_LOSS] = sum(weight * found[name] for name, weight in weighted)
        contrasted = found.pop(CONTRASTED, None)
        if contrasted == 0 and not self._warned:
            self._warned = True
            warnings.warn(NOTHING_TO_CONTRAST, stacklevel=2)
        self.latest = found
        return dict(found)

    def sums(self) -> dict[str, tuple[float, float]]:
        """The sums since the last flush over all ranks, for a checkpoint; all ranks take part."""
        return self.meter.totals(NAMES)

    def restore(self, sums: Mapping[str, tuple[float, float]], reference: Tensor | None) -> None:
        """Go on from a checkpoint; the sums are those of all ranks, so that one rank takes them."""
        if rank() == 0:
            self.meter.load(sums)
        self.reference = None if reference is None else reference.to(self.meter.device)
