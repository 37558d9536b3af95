"""The frozen models that clients share: each loaded once, with its processor, and adapters added and switched."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inft.client.adapters import Adapter, adapter_settings, discard, inject, injected
from inft.client.errors import InvalidRequest
from inft.client.targets import target_layers
from inft.models import MODELS
from inft.models.loading import EMBEDDED, OURS, Source, family_of, hub_source, load_model, load_processor, local_source
from inft.models.spec import ModelSpec
from inft.models.templates import Processor, tokenizer_of
from inft.models.weights import weights_fingerprint
from inft.training.quantise import after_quantised_load, quantization_config
from inft.training.quiet import quietly
from params.basic import BasicParams
from params.client import EngineParams, LoRAConfig
from params.errors import UserError
from params.lora import QLoRAParams

MOST_TOKENS = 4096  # of a row, unless a client asks for more; also where a model does not say what it can take


class Base:
    """A frozen model in evaluation mode, and the adapters in it.

    Adapters are added, used and removed by one thread at a time; the rest only reads.
    """

    def __init__(self, *, name: str, spec: ModelSpec, model: Any, processor: Processor, fingerprint: str) -> None:
        text = model.config.get_text_config()
        self.name = name  # embedded/…, the absolute path of a directory, or a hub id
        self.spec = spec
        self.model = model  # of transformers; with the first adapter its layers become PEFT's, in place
        self.processor = processor
        self.tokenizer = tokenizer_of(processor)
        self.vocab_size: int = text.vocab_size  # tokens that the model predicts
        self.context: int = getattr(text, "max_position_embeddings", None) or MOST_TOKENS  # most tokens of a row
        self.collator = spec.collator(processor, max_length=self.context, over_length="error")
        self.fingerprint = fingerprint  # of the weights
        self.device: torch.device = next(model.parameters()).device
        bits = " in 4 bit" if getattr(model, "is_loaded_in_4bit", False) else ""
        self.placement = f"{self.device.type}, {model.dtype}{bits}".replace("torch.", "")  # what decides the last bits
        self._wrapped: Any = None  # PEFT's model around it, which adds and deletes adapters
        self._adapters: dict[str, Adapter] = {}
        self._active: Adapter | None = None

    def targets(self, lora: LoRAConfig, *, private: bool = False) -> list[str]:
        """Return the names of the layers that a client adapts. Errors: UserError as `target_layers`."""
        return target_layers(self.model, self.spec, lora, private=private)

    def add_adapter(self, name: str, lora: LoRAConfig, *, seed: int, private: bool = False) -> dict[str, nn.Parameter]:
        """Add an adapter and return its float32 weights by their names in adapter_model.safetensors.

        A is drawn from `seed` alone and B is zero, so that the model is at first what it was.
        Errors: UserError for targets as `target_layers`, and a name that is taken.
        """
        if not name or name in self._adapters:
            raise UserError(f"the adapter's name {name!r} is empty or taken: choose another.")
        names = self.targets(lora, private=private)
        settings = adapter_settings(lora, names)
        try:
            self._wrapped = inject(self.model, self._wrapped, name, names, settings)
            adapter = injected(self.model, name, names, settings, seed=seed)
        except BaseException:  # most often a full memory, which the half that was made would keep full
            discard(self.model, self._wrapped, name, names)
            raise
        self._adapters[name] = adapter
        return dict(adapter.parameters)

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter and free its memory."""
        del self._adapters[name]
        self._wrapped.delete_adapter(name)

    @contextmanager
    def using(self, name: str, *, dropout_seed: int | None = None) -> Iterator[None]:
        """Within it the model has that adapter, "" for none; dropout only with a seed, from which its masks follow."""
        adapter = self._adapters[name] if name else None
        if self._active is not None:
            raise RuntimeError(f"the adapter {self._active.name} is in use: one adapter at a time.")
        self._active = adapter
        try:
            if adapter is not None:
                adapter.activate()
                if dropout_seed is not None:
                    adapter.masks.start(dropout_seed)
            yield
        finally:
            self._active = None
            if adapter is not None:
                adapter.masks.stop()
                adapter.deactivate()


class Bases:
    """The models that an engine offers, each loaded when it is first asked for."""

    def __init__(self, params: EngineParams) -> None:
        self._params = params
        self._loaded: dict[str, Base] = {}
        self._loading = threading.Lock()

    def names(self) -> list[str]:
        """Return the names that are offered: those of `models`, and the embedded ones where any model is allowed."""
        ours = [f"{OURS}{name}" for name in MODELS] if self._params.any_model else []
        return list(dict.fromkeys([*self._params.models, *ours]))

    def get(self, model_ref: str) -> Base:
        """Return the base that a client names, loaded at the first call; two names of one model share it.

        Errors: InvalidRequest for a name that is not offered; UserError for a model that cannot be loaded.
        """
        target = self._target(model_ref)
        found = self._loaded.get(target)
        if found is not None:
            return found
        with self._loading:
            if target not in self._loaded:
                self._loaded[target] = load_base(target, self._params)
            return self._loaded[target]

    def loaded(self, model_ref: str) -> Base | None:
        """Return the base where it has been loaded, else None. Errors: InvalidRequest for a name not offered."""
        return self._loaded.get(self._target(model_ref))

    def _target(self, model_ref: str) -> str:
        """What a name stands for: embedded/…, the absolute path of a directory, or a hub id."""
        if model_ref in self._params.models:
            return _place(self._params.models[model_ref])
        if not self._params.any_model:
            offered = ", ".join(self.names()) or "none"
            raise InvalidRequest(f"model_ref {model_ref!r} is not offered here. Offered: {offered}.")
        return _place(model_ref)


def load_base(name: str, params: EngineParams) -> Base:
    """Return the model at embedded/…, a directory or a hub id, frozen, on the device and in the precision asked for.

    Errors: UserError for a model that is not there, cannot be loaded or is of no family, and for a missing device.
    """
    device, dtype = _placement(params)
    source = _source(name)
    with quietly(progress_bars=not name.startswith(OURS) and sys.stderr.isatty()):
        import peft  # noqa: F401 - here, where what it says at its import is kept back

        return _loaded(name, source, params, device=device, dtype=dtype)


def _loaded(name: str, source: Source, params: EngineParams, *, device: str, dtype: str) -> Base:
    spec = family_of(source)
    processor = load_processor(spec, source.name)
    # On CUDA its backward pass adds in no fixed order, unless torch.use_deterministic_algorithms is on.
    basic = BasicParams(attn_impl="sdpa", dtype=dtype, device_map=device)  # type: ignore[arg-type]
    qlora = QLoRAParams(load_in_4bit=params.quantize, bnb_4bit_compute_dtype=dtype)  # type: ignore[arg-type]
    model: Any = load_model(spec, source.name, basic=basic, quantization_config=quantization_config(qlora, spec))
    if params.quantize:
        after_quantised_load(model)
    fingerprint = weights_fingerprint(source.name)
    if fingerprint is None:
        raise UserError(
            f"the weights of {name} were loaded and cannot be found again: give a directory that holds them."
        )
    return Base(name=name, spec=spec, model=model.requires_grad_(False), processor=processor, fingerprint=fingerprint)


def _placement(params: EngineParams) -> tuple[str, str]:
    """The device and the dtype of the base."""
    there = torch.cuda.is_available()
    if params.device == "cuda" and not there:
        raise UserError("device is cuda, and there is no CUDA device here: use device=cpu, or auto.")
    device = ("cuda" if there else "cpu") if params.device == "auto" else params.device
    if params.dtype != "auto":
        return device, params.dtype
    return device, "bfloat16" if device == "cuda" else "float32"


def _place(target: str) -> str:
    """The same with a directory's path absolute: it is written beside adapters, which are used from elsewhere."""
    path = Path(target).expanduser()
    return str(path.resolve()) if not target.startswith(OURS) and path.is_dir() else target


def _source(name: str) -> Source:
    if name.startswith(OURS):
        if name.removeprefix(OURS) not in MODELS:
            known = ", ".join(f"{OURS}{family}" for family in MODELS)
            raise InvalidRequest(f"there is no embedded model {name!r}. Embedded: {known}.")
        return Source(name=str(EMBEDDED / name.removeprefix(OURS)), local_files_only=True)
    elsewhere = "give model_ref a directory with a saved model, or embedded/text"
    return local_source(name) or hub_source(name, elsewhere=elsewhere)
