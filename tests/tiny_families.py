"""The embedded tiny models and their processors."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedModel

from inft.models import load_spec
from inft.models.collate import CaptionCollator
from inft.models.loading import load_model, load_processor
from inft.models.spec import ModelSpec
from params import BasicParams


@dataclass(frozen=True, kw_only=True)
class TinyFamily:
    """A model family with its embedded processor; models are loaded afresh, so that a test may change them."""

    spec: ModelSpec
    processor: Any

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def model(self, *, quantization_config: Any = None, **basic: Any) -> PreTrainedModel:
        basic = {"dtype": "float32", **basic}
        return load_model(self.spec, "", basic=BasicParams(**basic), quantization_config=quantization_config)

    def collator(self, **options: Any) -> CaptionCollator:
        collator: CaptionCollator = self.spec.collator(self.processor, **options)
        return collator


@lru_cache
def tiny_family(name: str) -> TinyFamily:
    spec = load_spec(name)
    return TinyFamily(spec=spec, processor=load_processor(spec, ""))
