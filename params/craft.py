"""The contrastive term: how much of it, over which pairs, and what it costs (CRAFT)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from params.bounds import Bounds, Count, NonNegative, PartialShare, Positive, Ratio, Share

Preset = Literal["minimal", "balanced", "memory_efficient", "large_batch", "aggressive"]
BetaMode = Literal["fixed", "auto"]
LengthStrategy = Literal["oversample", "cap", "auto_beta", "error"]
Pooling = Literal["last_token", "mean", "cls", "weighted_mean"]
NegativeStrategy = Literal["in_batch", "queue"]  # rows and pairs here bring no negatives of their own
Balancing = Literal["none", "loss_scale", "uncertainty", "gradnorm", "pcgrad"]

LEARNABLE_TEMPERATURE = Bounds(0.01, 1.0, high_included=True)  # where one is kept; CLIP (Radford et al. 2021)

_SHARED: Mapping[str, Any] = {
    "gradient_balancing": "loss_scale",
    "learnable_temperature": True,
    "beta_mode": "auto",
    "length_strategy": "auto_beta",
}

# Values that replace the defaults of CraftParams; a user's own value replaces theirs.
CRAFT_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "minimal": {
        "alpha": 0.8,
        "gradient_balancing": "none",
        "learnable_temperature": False,
        "use_gradcache": False,
        "beta_mode": "fixed",
        "length_strategy": "oversample",
    },
    "balanced": {"alpha": 0.6, **_SHARED, "loss_scale_momentum": 0.99},
    "memory_efficient": {
        "alpha": 0.6,
        **_SHARED,
        "use_gradcache": True,
        "gradcache_chunk_size": 4,
        "projection_dim": 128,
    },
    "large_batch": {
        "alpha": 0.5,
        **_SHARED,
        "use_gradcache": True,
        "gradcache_chunk_size": 8,
        "negative_strategy": "queue",
        "negative_queue_size": 65536,
    },
    "aggressive": {
        "alpha": 0.4,
        **_SHARED,
        "gradient_balancing": "gradnorm",
        "gradnorm_alpha": 1.5,
        "use_gradcache": True,
        "negative_strategy": "queue",
        "negative_queue_size": 32768,
    },
}


@dataclass(frozen=True, kw_only=True)
class CraftParams:
    """Hyperparameters of the contrastive term (InfoNCE; van den Oord et al. 2018) beside the fine-tuning loss."""

    enabled: bool = False  # False: plain fine-tuning; any other setting of CRAFT is then an error
    preset: Preset | None = None  # starting values of the other fields; none: their defaults
    pairs: str = ""  # empty: prompt against answer; translations: captions of one image; a path or hub:ID with _tgt
    alpha: Share = 0.6  # weight of the fine-tuning loss; 1 - alpha weighs the contrastive one
    beta: Share = 0.6  # share of the micro-batches that are fine-tuning ones, when there are pairs
    beta_mode: BetaMode = "fixed"  # auto: beta is the share of the fine-tuning batches among all
    length_strategy: LengthStrategy = "oversample"  # what to do when the pairs are more or fewer than beta asks for
    contrastive_batch_size: Count | None = None  # pairs a device sees per forward; none: per_device_train_batch_size
    temperature: Positive = 0.05  # similarities are divided by it
    learnable_temperature: bool = False  # train it, between 0.01 and 1 (CLIP; Radford et al. 2021)
    projection_dim: Count = 256  # outputs of the projection head
    projection_dropout: PartialShare = 0.0  # inside the projection head
    pooling: Pooling | None = None  # of hidden states to one vector; none: last_token, but for pairs the answer's mean
    symmetric: bool = False  # also contrast each positive with all anchors, and take the mean (CLIP)
    use_gradcache: bool = False  # large contrastive batches in the memory of a chunk (Gao et al. 2021)
    gradcache_chunk_size: Count = 4  # rows of such a chunk
    negative_strategy: NegativeStrategy = "in_batch"  # queue: embeddings of earlier batches too (He et al. 2020)
    negative_queue_size: Count = 65536  # embeddings in the queue
    gradient_balancing: Balancing = "none"  # how neither loss drowns the other
    gradnorm_alpha: NonNegative = 1.5  # pull of gradnorm towards equal training rates (Chen et al. 2018)
    loss_scale_momentum: PartialShare = 0.99  # of loss_scale's running means, per optimizer step
    balancing_max_ratio: Ratio | None = 2.0  # loss_scale and gradnorm weigh no loss so many times the other; none: any
    gradient_clip_per_task: bool = False  # clip the gradient of each loss before they are added
    gradient_clip_value: Positive = 1.0  # L2 norm at which it is clipped
