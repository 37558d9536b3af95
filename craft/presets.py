"""Values of the craft_* fields by name, or suggested from a model, its data and the free memory."""

from collections.abc import Mapping
from typing import Any

from craft.fields import did_you_mean
from params.craft import CRAFT_PRESETS as _PRESETS

CRAFT_PRESETS: Mapping[str, Mapping[str, Any]] = {
    name: {f"craft_{key}": value for key, value in values.items()} for name, values in _PRESETS.items()
}


def get_preset(name: str) -> dict[str, Any]:
    """Return a preset's values by field name, free to change; ValueError for an unknown preset."""
    if name not in CRAFT_PRESETS:
        raise ValueError(
            f"there is no CRAFT preset {name!r}{did_you_mean(name, CRAFT_PRESETS)}. "
            f"Presets: {', '.join(CRAFT_PRESETS)}."
        )
    return dict(CRAFT_PRESETS[name])


def auto_configure(
    model: Any = None,
    sft_dataset: Any = None,
    contrastive_dataset: Any = None,
    available_memory_gb: float | None = None,
) -> dict[str, Any]:
    """Return the balanced preset, adapted to the model's width, the sizes of the data sets and the free memory.

    Memory is in GB (1e9 bytes) and measured when not given; a data set without a length leaves beta as it is.
    """
    values = get_preset("balanced")
    width = _hidden_size(model)
    if width is not None:
        values["craft_projection_dim"] = min(256, max(64, width // 4))
    sft = _rows(sft_dataset)
    pairs = sft if contrastive_dataset is None else _rows(contrastive_dataset)
    if sft and pairs:
        values["craft_beta"] = min(0.8, max(0.3, sft / (sft + pairs)))
    memory = _free_memory_gb() if available_memory_gb is None else available_memory_gb
    if not memory > 0:
        raise ValueError(f"available_memory_gb={available_memory_gb!r} must be above 0, in GB.")
    if memory < 24:
        values |= {"craft_use_gradcache": True, "craft_gradcache_chunk_size": 4}
    if memory < 16:
        narrow = min(values.get("craft_projection_dim", 256), 128)
        values |= {"craft_gradcache_chunk_size": 2, "craft_projection_dim": narrow}
    if pairs is not None and pairs > 100_000:
        values |= {"craft_negative_strategy": "queue", "craft_negative_queue_size": min(65536, pairs // 2)}
    return values


def _hidden_size(model: Any) -> int | None:
    from craft.hooks import hidden_size_of

    return None if model is None else hidden_size_of(model)


def _rows(dataset: Any) -> int | None:
    """How many rows a data set has; None where it does not say (streams)."""
    try:
        return len(dataset)
    except TypeError:
        return None


def _free_memory_gb() -> float:
    """Free memory of the current GPU, else of the machine, in GB."""
    import psutil
    import torch

    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    # Decimal: an idle card sold as 24 GB has more than that free, and is not taken for a smaller one.
    return float(free) / 1e9
