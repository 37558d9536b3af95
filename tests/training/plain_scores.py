"""What a stored adapter says of answers, by plain transformers and peft."""

from typing import Any

import torch
from peft import PeftModel

from inft.models import load_spec
from inft.models.loading import load_model, load_processor
from params import TrainParams


def tuned(params: TrainParams) -> tuple[Any, Any, Any]:
    """The base of a text run, the model with its stored adapter, and the collator."""
    spec = load_spec("text")
    collator = spec.collator(load_processor(spec, params.processor_name), max_length=params.basic.max_length)
    base, other = (load_model(spec, params.model_name, basic=params.basic).eval() for _ in range(2))
    return base, PeftModel.from_pretrained(other, params.best_model_dir).eval(), collator


def log_probs(model: Any, collator: Any, sample: Any) -> tuple[float, int]:
    """Log-probability of a sample's answer, and its tokens."""
    batch = collator([sample])
    labels = batch.pop("labels")[0, 1:]
    with torch.no_grad():
        log_p = model(**batch).logits[0, :-1].double().log_softmax(-1)
    kept = labels != -100
    return float(log_p[kept].gather(1, labels[kept, None]).sum()), int(kept.sum())
