"""Learning from pairs of answers, a better and a worse one: DPO and ORPO."""

from dataclasses import dataclass
from typing import Annotated, Literal

from params.bounds import Bounds, Positive

# The losses of TRL's DPOTrainer that read nothing but the two answers' log-probabilities and the fields below.
DPOLossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "sigmoid_norm",
]
FlipShare = Annotated[float, Bounds(0, 0.5)]


@dataclass(frozen=True, kw_only=True)
class PreferenceParams:
    """Hyperparameters of the preference methods, dpo (Rafailov et al. 2023) and orpo (Hong et al. 2024)."""

    dpo_beta: Positive = 0.1  # dpo: how much a step away from the base model costs; higher stays nearer (tau of ipo)
    dpo_loss_type: DPOLossType = "sigmoid"  # dpo: the loss of a pair, by TRL's name
    label_smoothing: FlipShare = 0.0  # dpo with robust or exo_pair: share of the pairs that may be the wrong way round
    orpo_beta: Positive = 0.1  # orpo: weight of the odds ratio beside the loss of the chosen answer (lambda)
