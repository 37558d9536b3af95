"""A model ready to caption: the base, with or without a stored adapter, its processor and its collator."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inft.evaluation.generate import Search
from inft.models import load_spec
from inft.models.collate import CaptionCollator
from inft.models.loading import load_model, load_processor
from inft.models.spec import ModelSpec
from inft.training.quantise import after_quantised_load, quantization_config
from inft.training.quiet import quiet_libraries
from inft.training.stored import StoredAdapter, load_adapter
from params.basic import BasicParams
from params.evaluation import EvalParams


@dataclass(frozen=True, kw_only=True)
class Captioner:
    """What captions rows."""

    spec: ModelSpec
    processor: Any
    collator: CaptionCollator
    model: Any  # PeftModel, or the base model without an adapter
    adapted: bool

    @contextmanager
    def base(self) -> Iterator[Any]:
        """The model without its adapter, for as long as the block runs."""
        with self.model.disable_adapter() if self.adapted else nullcontext():
            yield self.model


def load_captioner(params: EvalParams, stored: StoredAdapter | None) -> Captioner:
    """Load what the parameters say; the processor is the one beside the adapter, where it has one.

    Errors: UserError as for load_model, load_processor and load_adapter.
    """
    quiet_libraries(progress_bars=bool(params.model_name) and sys.stderr.isatty())
    set_threads(params)
    spec = load_spec(params.model)
    processor = load_processor(spec, processor_place(params), max_image_tiles=params.basic.max_image_tiles)
    collator = spec.collator(processor, max_length=params.basic.max_length)
    quantisation = quantization_config(params.qlora, spec)
    model: Any = load_model(spec, params.model_name, basic=params.basic, quantization_config=quantisation)
    if quantisation is not None:
        after_quantised_load(model)
    if stored is not None:
        model = load_adapter(model, stored, spec=spec)
    return Captioner(spec=spec, processor=processor, collator=collator, model=model.eval(), adapted=stored is not None)


def processor_place(params: EvalParams) -> str:
    """The adapter's directory when a processor was stored in it, else the base model's name."""
    if params.adapter is not None and (Path(params.adapter) / "tokenizer_config.json").is_file():
        return params.adapter
    return params.processor_name


def set_threads(params: EvalParams) -> None:
    """One CPU thread for the embedded models, whose layers are too small to share; else as basic.num_threads says."""
    threads = params.basic.num_threads or (1 if params.model_name == "" else None)
    if threads is not None:
        torch.set_num_threads(threads)


def search_of(basic: BasicParams) -> Search:
    """How captions are searched for, from the parameters."""
    return Search(
        do_sample=basic.gen_do_sample,
        temperature=basic.gen_temperature,
        top_p=basic.gen_top_p,
        num_beams=basic.gen_num_beams,
        seed=basic.seed,
    )
