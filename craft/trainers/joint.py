"""CRAFTJointMixin: InfoNCE in each micro-batch of a trainer whose own loss is a mean over it (DPO, ORPO, GRPO, PPO).

Over the micro-batches s of one optimizer step and all ranks: L = alpha · mean_s l_s + (1 − alpha) · Σ_i l_i / N, with
l_s the trainer's own loss of a micro-batch and N the anchors of all of them.
"""

import hashlib
import logging
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from craft.distributed import sum_over_ranks
from craft.ppo.prompts import images_of
from craft.trainers.answers import Answers
from craft.trainers.mixin import CRAFTTrainerMixin
from craft.trainers.pairstream import JointLoaders, PairStream
from craft.trainers.window import CONTRASTIVE, Window

logger = logging.getLogger(__name__)

__all__ = ["Answers", "CRAFTJointMixin", "answers_of", "has_images", "sample_id"]


class CRAFTJointMixin(CRAFTTrainerMixin):
    """Adds the contrastive objective to each micro-batch of the Trainer class that stands after it.

    With self_align both losses come from one forward pass: a row's prompt is to find its own answer. With
    paired_dataset a batch of pairs stands beside each micro-batch; the trainer's own loader is untouched. Keywords and
    alpha are those of CRAFTTrainerMixin. A class that mixes this in says by ``_craft_answers`` where prompts and
    answers are, and by ``_craft_generates`` whether they are known only in the micro-batch itself.
    """

    _craft_loaders_class = JointLoaders
    _craft_generates = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._craft_waiting: deque[Mapping[str, Any]] = deque()  # pairs of this step's micro-batches
        self._craft_stream: PairStream | None = None
        if self.craft_enabled:
            self._refuse_balancing()
            assert isinstance(self._craft_loaders, JointLoaders)
            self._craft_stream = self._craft_loaders.stream()

    def _refuse_balancing(self) -> None:
        """ValueError where losses would be weighed by their size, which says nothing of a policy's."""
        balancing = self.craft_args.craft_gradient_balancing
        if self._craft_generates and balancing in ("gradnorm", "uncertainty"):
            raise ValueError(
                f"craft_gradient_balancing={balancing!r} weighs losses by their size, and the loss of "
                f"{type(self).__name__} is a mean of advantages, around 0 and below it. Use 'pcgrad', or "
                "craft_gradient_clip_per_task=True, which look at the gradients alone."
            )

    @abstractmethod
    def _craft_answers(self, inputs: Mapping[str, Any]) -> Answers:
        """The prompts and answers in a micro-batch as the trainer's loss is given it."""

    @property
    def craft_pairs_taken(self) -> int:
        """Batches of pairs that this process has taken so far, kept in checkpoints."""
        return 0 if self._craft_stream is None else self._craft_stream.position

    @craft_pairs_taken.setter
    def craft_pairs_taken(self, number: int) -> None:
        if self._craft_stream is not None:
            self._craft_stream.position = number

    def _craft_forget(self) -> None:
        super()._craft_forget()
        self._craft_waiting.clear()
        if self._craft_stream is not None and self.state.global_step == 0:  # a run from its beginning
            self._craft_stream.position = 0

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count the anchors of an optimizer step, and fetch its pairs."""
        if not self.craft_enabled:
            return super()._get_num_items_in_batch(batch_samples, device)
        anchors = None
        if self._craft_stream is not None:
            self._craft_waiting = deque(self._craft_stream.take(len(batch_samples)))
        if self._craft_stream is not None or not self._craft_generates:
            held = self._craft_waiting if self._craft_stream is not None else batch_samples
            own = sum(self._craft_anchors(batch) for batch in held)
            anchors = int(sum_over_ranks(torch.tensor(own, device=device)))
        count = len(batch_samples)
        self._craft_balance.window = Window(sft_batches=count, anchors=anchors, contrastive_batches=count)
        if self.craft_args.craft_debug:
            logger.warning("CRAFT step: %s, weights %s", self._craft_balance.window, self._craft_balance.weights)
        return None

    def _craft_sample_ids(self, rows: Sequence[Mapping[str, Any]], *, with_images: bool = False) -> list[int]:
        """A number for what each row of prompts asks; 0, unknown, where its images are the caller's and not in it."""
        return [0 if with_images and not images_of(row) else sample_id(row) for row in rows]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Both losses of a micro-batch in training; the trainer's own, unscaled, in evaluation."""
        if not (self.craft_enabled and model.training and self._craft_waiting):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        contrastive = self._craft_pair_loss(self._craft_waiting.popleft())
        with self._craft_balance.running(CONTRASTIVE):  # at once: its activations are free before the next pass
            self.accelerator.backward(contrastive)
        own, outputs = self._craft_base_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = own + contrastive.detach().to(own.device)
        return (loss, outputs) if return_outputs else loss


def answers_of(
    inputs: Mapping[str, Any],
    *,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    completion_mask_BT: Tensor,
    rows: Tensor,
    sample_ids_B: Tensor | None,
) -> Answers:
    """The answers that ``completion_mask_BT`` marks in some ``rows`` of a batch; their prompts are what is before."""
    real_BT = attention_mask_BT.bool()
    answer_BT = completion_mask_BT.bool() & real_BT
    return Answers(
        input_ids_BT=input_ids_BT,
        prompt_BT=real_BT & (answer_BT.cumsum(1) == 0),
        answer_BT=answer_BT,
        rows=rows,
        sample_ids_B=sample_ids_B,
        prompts_tell=not has_images(inputs),
    )


def has_images(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch carries pixels, so that equal prompts may ask of different images."""
    return any(isinstance(value, Tensor) and name.startswith("pixel_values") for name, value in inputs.items())


def sample_id(row: Mapping[str, Any]) -> int:
    """A number of 63 bits for what a row asks: its prompt and its images."""
    digest = hashlib.blake2b(repr(row.get("prompt")).encode(), digest_size=8)
    for image in images_of(row):
        digest.update(image.tobytes() if hasattr(image, "tobytes") else repr(image).encode())
    return int.from_bytes(digest.digest(), "big") >> 1 or 1
