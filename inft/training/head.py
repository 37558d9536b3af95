"""A language-model head that scores only the supervised positions, for devices on which TRL's scores them all."""

import functools
import importlib.util
import types
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

POSITIONS_AT_ONCE = 1024  # supervised positions whose logits exist at the same time


def add_compact_head(model: PreTrainedModel, *, temperature: float = 1.0) -> None:
    """Replace the ``fused_lm_head=True`` path that TRL's add_fused_lm_head gave ``model``, where there is no Triton.

    TRL compacts to the supervised positions on Triton devices only; elsewhere it projects every position and throws
    most of them away. The contract of the output is TRL's: ``log_probs``, ``entropy``, ``is_top1`` and ``mean_logits``
    are (batch, seq_len - 1), zero where the label is -100, of logits divided by ``temperature``. Every other call goes
    on to the forward that was there, pre-shifted labels (sequence parallelism) included. Add it after TRL's head.
    """
    trl_forward = model.forward
    scale, softcap = logit_scale(model.config), _softcap(model.config)
    own = {"scale": scale, "softcap": softcap, "temperature": temperature}

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head") or kwargs.get("shift_labels") is not None or _has_experts(model):
            return trl_forward(*args, **kwargs)
        kwargs.pop("fused_lm_head")
        items = kwargs.pop("num_items_in_batch", None)
        labels_BT = kwargs.pop("labels")[:, 1:]
        hidden_BTH = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1]
        mask_BT = labels_BT != -100
        # Boolean indexing keeps an empty selection connected to the graph: a batch without labels has a zero gradient.
        scores = _score(hidden_BTH[mask_BT], labels_BT[mask_BT], self.get_output_embeddings(), **own)
        spread = [values_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values_N) for values_N in scores]
        log_probs_BT, entropy_BT, is_top1_BT, mean_logits_BT = spread
        count = mask_BT.sum().clamp(min=1) if items is None else items
        return FusedCausalLMOutput(
            loss=-log_probs_BT.sum() / count,
            log_probs=log_probs_BT,
            entropy=entropy_BT,
            is_top1=is_top1_BT,
            mean_logits=mean_logits_BT,
            label_mask=mask_BT,
        )

    model.forward = types.MethodType(forward, model)


def scores_compactly(device: torch.device) -> bool:
    """Whether TRL's own head projects only the supervised positions on ``device``: where Triton runs."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def logit_scale(config: PretrainedConfig) -> float:
    """The factor a model's own definition puts on its logits, read from its config as TRL reads it; 1 without one."""
    text = config.get_text_config()
    for field in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(text, field, None)
        if value is not None:
            return float(value)
    divisor = getattr(text, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if text.model_type == "hyperclovax" else 1.0 / divisor


def _softcap(config: PretrainedConfig) -> float | None:
    return getattr(config.get_text_config(), "final_logit_softcapping", None)


def _has_experts(model: PreTrainedModel) -> bool:
    """Mixture-of-experts models have a loss term of their own, which TRL's head computes."""
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def _score(hidden_NH: torch.Tensor, labels_N: torch.Tensor, lm_head: torch.nn.Module, **own: Any) -> list[torch.Tensor]:
    """Log-probability of each label, entropy of its distribution, whether the label is its maximum, mean logit."""
    chunks = [
        _score_chunk(hidden, labels, lm_head.weight, lm_head.bias, **own)
        for hidden, labels in zip(hidden_NH.split(POSITIONS_AT_ONCE), labels_N.split(POSITIONS_AT_ONCE), strict=True)
    ]
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


def _score_chunk(
    hidden_NH: torch.Tensor,
    labels_N: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    # The weight itself, not the module: a model whose lm_head was mended to scale its output is scaled once, here.
    logits_NV = F.linear(hidden_NH, weight_VH, bias_V)
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    logits_NV = logits_NV * scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    log_p_NV = F.log_softmax(logits_NV, dim=-1)
    log_probs_N = log_p_NV.gather(1, labels_N[:, None])[:, 0]
    with torch.no_grad():  # figures for the log: nothing trains on them
        entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1)
        # As TRL counts it: a label that ties with an earlier token of the vocabulary is not the top one.
        is_top1_N = log_p_NV.argmax(-1) == labels_N
        mean_logits_N = logits_NV.mean(-1)
    return log_probs_N, entropy_N, is_top1_N, mean_logits_N
