"""The craft_* fields of a trainer's arguments, and the arguments of TRL's trainers with them."""

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, Self

from craft.fields import ContrastiveKeys, checked_fields
from craft.presets import CRAFT_PRESETS, auto_configure, get_preset
from params.bounds import Count, NonNegative, PartialShare, Positive, Ratio, Share
from params.craft import LEARNABLE_TEMPERATURE, Balancing, BetaMode, LengthStrategy, Pooling

Metric = Literal["contrastive_accuracy", "representation_consistency", "temperature", "gradient_norm"]

# Name here -> module and class of the arguments that it extends.
_CONFIGS: Mapping[str, tuple[str, str]] = {
    "CRAFTSFTConfig": ("trl", "SFTConfig"),
    "CRAFTDPOConfig": ("trl", "DPOConfig"),
    "CRAFTGRPOConfig": ("trl", "GRPOConfig"),
    "CRAFTRLOOConfig": ("trl", "RLOOConfig"),
    "CRAFTKTOConfig": ("trl", "KTOConfig"),
    "CRAFTRewardConfig": ("trl", "RewardConfig"),
    "CRAFTORPOConfig": ("trl.experimental.orpo", "ORPOConfig"),
    "CRAFTPPOConfig": ("craft.ppo.config", "PPOConfig"),  # ours: TRL has none any more
}
_TRL_VERSION = "1.16"

__all__ = [
    "CRAFT_PRESETS",
    "CRAFTConfigMixin",
    "auto_configure",
    "craft_settings",
    "get_preset",
    *_CONFIGS,
]


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _default_metrics() -> list[str]:
    return ["contrastive_accuracy", "representation_consistency"]


@dataclass
class CRAFTConfigMixin:
    """The fields of CRAFT, for any dataclass of training arguments: ``class Args(CRAFTConfigMixin, SFTConfig)``.

    Errors: one ValueError that lists every field whose value is not allowed.
    """

    craft_alpha: Share = field(
        default=0.6, metadata=_help("Weight of the SFT loss, 0 to 1; 1 - alpha weighs the contrastive one.")
    )
    craft_beta: Share = field(
        default=0.6, metadata=_help("Share of an accumulation window's micro-batches that are SFT ones.")
    )
    craft_beta_mode: BetaMode = field(
        default="fixed", metadata=_help("auto takes beta from the numbers of batches of both data sets.")
    )
    craft_length_strategy: LengthStrategy = field(
        default="oversample", metadata=_help("What to do when SFT and contrastive batches differ in number.")
    )
    craft_contrastive_batch_size: Count | None = field(
        default=None, metadata=_help("Pairs per device and micro-batch; none: per_device_train_batch_size.")
    )
    craft_temperature: Positive = field(
        default=0.05, metadata=_help("Similarities are divided by it (tau of InfoNCE).")
    )
    craft_learnable_temperature: bool = field(
        default=False, metadata=_help("Train the temperature, kept between 0.01 and 1 (CLIP).")
    )
    craft_projection_dim: Count = field(default=256, metadata=_help("Outputs of the projection head."))
    craft_projection_dropout: PartialShare = field(
        default=0.0, metadata=_help("Dropout inside the projection head, 0 to 1.")
    )
    craft_pooling: Pooling = field(
        default="last_token", metadata=_help("How the hidden states of a text become one vector.")
    )
    craft_symmetric: bool = field(
        default=False, metadata=_help("Mean of the losses anchor to positive and positive to anchor (CLIP).")
    )
    craft_use_gradcache: bool = field(
        default=False, metadata=_help("Contrastive batches in chunks, with the gradient of the whole (GradCache).")
    )
    craft_gradcache_chunk_size: Count = field(default=4, metadata=_help("Rows of a GradCache chunk."))
    craft_use_hidden_state_hook: bool = field(
        default=True, metadata=_help("Catch the last hidden state by a hook, not by output_hidden_states.")
    )
    craft_negative_strategy: Literal["in_batch", "inbatch", "queue", "none"] = field(
        default="in_batch", metadata=_help("Where negatives come from; queue: from earlier batches too (MoCo).")
    )
    craft_negative_queue_size: Count = field(default=65536, metadata=_help("Embeddings that the queue holds."))
    craft_contrastive_keys: ContrastiveKeys = field(
        default_factory=ContrastiveKeys, metadata=_help("Role -> column; roles that are left out keep their column.")
    )
    craft_assistant_mask_strategy: Literal["auto", "provided", "none"] = field(
        default="auto", metadata=_help("Which tokens are the answer in self_align; auto: mask column, else labels.")
    )
    craft_assistant_mask_key: str | None = field(
        default="assistant_masks", metadata=_help("Column with 1 on the answer's tokens.")
    )
    craft_report_metrics: list[Annotated[str, Metric]] = field(
        default_factory=_default_metrics, metadata=_help("Metrics in the log, averaged over the logging window.")
    )
    craft_debug: bool = field(default=False, metadata=_help("Log what each optimizer step holds, and its weights."))
    craft_gradient_balancing: Balancing = field(default="none", metadata=_help("How neither loss drowns the other."))
    craft_gradnorm_alpha: NonNegative = field(
        default=1.5, metadata=_help("Pull of gradnorm towards equal training rates.")
    )
    craft_loss_scale_momentum: PartialShare = field(
        default=0.99, metadata=_help("Of loss_scale's running means, per optimizer step.")
    )
    craft_balancing_max_ratio: Ratio | None = field(
        default=2.0, metadata=_help("loss_scale and gradnorm weigh no loss more than so many times the other.")
    )
    craft_gradient_clip_per_task: bool = field(
        default=False, metadata=_help("Clip the gradient of each loss before they are added.")
    )
    craft_gradient_clip_value: Positive = field(default=1.0, metadata=_help("L2 norm at which it is clipped."))
    craft_allow_packed_contrastive: bool = field(
        default=False, metadata=_help("Accept a collator that packs several texts into one row.")
    )

    def __post_init__(self) -> None:
        checked_fields(self, CRAFTConfigMixin, _across_fields)
        if self.craft_negative_strategy == "inbatch":
            self.craft_negative_strategy = "in_batch"
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    @classmethod
    def from_preset(cls, preset: str, output_dir: str = "./outputs", **overrides: Any) -> Self:
        """Return arguments with a preset's values, replaced by those given; ValueError for an unknown preset."""
        return cls(**{**_directory(cls, output_dir), **get_preset(preset), **overrides})

    @classmethod
    def auto(
        cls,
        output_dir: str = "./outputs",
        model: Any = None,
        sft_dataset: Any = None,
        contrastive_dataset: Any = None,
        available_memory_gb: float | None = None,
        **overrides: Any,
    ) -> Self:
        """Return arguments with the values of auto_configure, replaced by those given."""
        values = auto_configure(model, sft_dataset, contrastive_dataset, available_memory_gb)
        return cls(**{**_directory(cls, output_dir), **values, **overrides})


def _directory(cls: type, output_dir: str) -> dict[str, str]:
    """The output directory as a keyword, where the class has such a field (the mixin alone has none)."""
    return {"output_dir": output_dir} if any(f.name == "output_dir" for f in fields(cls)) else {}


def _across_fields(config: Any) -> list[str]:
    """What is wrong between fields that are each allowed."""
    problems = []
    if config.craft_learnable_temperature and not LEARNABLE_TEMPERATURE.holds(config.craft_temperature):
        problems.append(
            f"craft_temperature={config.craft_temperature!r} with craft_learnable_temperature=True must be "
            f"{LEARNABLE_TEMPERATURE.words}, the range it is kept in. Leave it fixed to use it as given."
        )
    if config.craft_assistant_mask_strategy == "provided" and not config.craft_assistant_mask_key:
        problems.append(
            "craft_assistant_mask_key must name the mask's column with craft_assistant_mask_strategy='provided'."
        )
    return problems


def craft_settings(args: Any) -> CRAFTConfigMixin:
    """Return a checked copy of the craft_* attributes of any arguments object, with defaults where it lacks some.

    Errors: TypeError when it has none; ValueError for values that are not allowed.
    """
    names = [f.name for f in fields(CRAFTConfigMixin)]
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if not values:
        raise TypeError(
            f"{type(args).__name__} has no craft_* fields. Use CRAFTSFTConfig, or add them to your own arguments: "
            f"@dataclass class Args(CRAFTConfigMixin, {type(args).__name__}): pass"
        )
    return CRAFTConfigMixin(**values)


def __getattr__(name: str) -> Any:
    """Make CRAFTSFTConfig and its like when they are asked for: TRL takes seconds to import."""
    if name not in _CONFIGS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, base = _CONFIGS[name]
    try:
        with warnings.catch_warnings():
            if module.startswith("trl.experimental"):
                warnings.simplefilter("ignore")  # that it is experimental, which ImportError below provides for
            parent = getattr(importlib.import_module(module), base)
    except (ImportError, AttributeError) as error:
        if not module.startswith("trl"):
            raise
        raise ImportError(
            f"{name} needs {module}.{base} of TRL {_TRL_VERSION} or newer: pip install 'trl>={_TRL_VERSION}'."
        ) from error
    documented = {"__module__": __name__, "__doc__": f"{base} with the fields of CRAFTConfigMixin."}
    made: type = dataclass(type(name, (CRAFTConfigMixin, parent), documented))
    globals()[name] = made
    return made
