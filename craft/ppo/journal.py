"""The figures of a PPO run in the log: means over the logging window and all processes, never NaN."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from craft.trainers.meter import Meter

REWARD, REWARD_SQUARED, REWARD_STD = "reward", "reward squared", "reward_std"  # the second is not logged
KL, LENGTH, ENDED = "kl", "completions/mean_length", "completions/ended"
ENTROPY, POLICY_LOSS, VALUE_LOSS = "entropy", "policy_loss", "value_loss"
CLIPPED, VALUE_CLIPPED = "clip_fraction", "value_clip_fraction"
FIGURES = ("advantages", "explained_variance")
PER_TOKEN = (ENTROPY, POLICY_LOSS, VALUE_LOSS, CLIPPED, VALUE_CLIPPED)


class Journal:
    """Sums of the window: rewards and lengths by completion, the rest by token.

    A window without a new rollout shows the figures of the one that it trained on.
    """

    def __init__(self, reward_names: Sequence[str], device: torch.device) -> None:
        self.rewards = [f"rewards/{name}/mean" for name in reward_names]
        self.names = (REWARD, REWARD_SQUARED, *self.rewards, KL, LENGTH, ENDED, *PER_TOKEN, *FIGURES)
        self.meter = Meter(device)
        self._rollout: dict[str, float] = {}  # figures of the last rollouts

    def note_completions(self, rewards_NF: Tensor, scores_N: Tensor, lengths_N: Tensor, ended_N: Tensor) -> None:
        """Add a rollout's rewards, NaN where there is none, their weighted sums, and its lengths in tokens."""
        rows = float(len(scores_N))
        for name, rewards_N in zip(self.rewards, rewards_NF.T, strict=True):
            self.meter.add(name, rewards_N.nan_to_num(0.0).double().sum(), (~rewards_N.isnan()).sum())
        self.meter.add(REWARD, scores_N.double().sum(), rows)
        self.meter.add(REWARD_SQUARED, scores_N.double().square().sum(), rows)
        self.meter.add(LENGTH, lengths_N.sum(), rows)
        self.meter.add(ENDED, ended_N.sum(), rows)

    def note_kl(self, kl_BC: Tensor, mask_BC: Tensor) -> None:
        """Add the KL of each token to the reference."""
        self.meter.add(KL, kl_BC.sum(), mask_BC.sum())

    def note_rollout(self, figures: Mapping[str, float]) -> None:
        """Add figures that weigh the same in each rollout."""
        for name, value in figures.items():
            self.meter.add(name, value, 1.0)

    def note_loss(self, found: Mapping[str, Tensor], mask_BC: Tensor) -> None:
        """Add what a micro-batch's forward pass gave for each token (PER_TOKEN)."""
        for name, value_BC in found.items():
            self.meter.add(name, torch.where(mask_BC, value_BC.detach(), 0).sum(), mask_BC.sum())

    def flush(self) -> dict[str, float]:
        """The means since the last flush; all processes take part."""
        found = self.meter.flush(self.names)
        if (squared := found.pop(REWARD_SQUARED, None)) is not None:
            found[REWARD_STD] = max(squared - found[REWARD] ** 2, 0.0) ** 0.5
            self._rollout = {name: value for name, value in found.items() if name not in PER_TOKEN}
        return {**self._rollout, **found}
