"""The last hidden state of a model, taken by a hook on its decoder instead of asking for the states of all layers."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from transformers import PreTrainedModel

WRAPPED_NAMES = ("module", "_orig_mod", "_fsdp_wrapped_module")  # DDP and DataParallel, torch.compile, FSDP
# For modules that are no transformers model: where the body is, and the norm whose output is the last hidden state.
BODY_NAMES = ("model", "transformer", "backbone", "encoder", "decoder")
NORM_NAMES = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "layer_norm")
SIZE_NAMES = ("word_embed_proj_dim", "hidden_size", "d_model", "n_embd", "dim")  # the first: narrower than the layers


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, DataParallel, FSDP, a compiled module and PEFT, in any order of wrapping."""
    while True:
        inner = _inner(model)
        if inner is None:
            return model
        model = inner


def _inner(model: nn.Module) -> nn.Module | None:
    if isinstance(model, PreTrainedModel):
        return None
    (name, child), *others = [*model.named_children()] or [("", model)]
    if name in WRAPPED_NAMES and not others:  # it runs another module and has nothing of its own
        return child
    if hasattr(model, "get_base_model"):  # PEFT
        base: nn.Module = model.get_base_model()
        return base
    return None


def get_backbone(model: nn.Module) -> nn.Module:
    """Return the body without its head: it takes all inputs, images included, and returns the last hidden state.

    For a transformers model its `base_model`; for any other module its first child named as in BODY_NAMES (that
    child's base model when it is a transformers model), or the module itself when it has none.
    """
    model = unwrap(model)
    if not isinstance(model, PreTrainedModel):
        body = _child(model, BODY_NAMES) or model
        return get_backbone(body) if isinstance(body, PreTrainedModel) else body
    if model.base_model is model and model.get_output_embeddings() is not None:
        # Text decoders of some image models name as their prefix where they sit in those, not their own body.
        return _child(model, ("model", "transformer")) or model
    return model.base_model


def get_decoder(model: nn.Module) -> nn.Module:
    """Return the module whose output is the last hidden state of the text: what LastHiddenStateHook attaches to.

    For a transformers model the decoder stack of its backbone, followed through `get_decoder` as far as it leads; for
    a module with a `get_decoder` of its own what that returns; for any other one the final norm of its body
    (NORM_NAMES in BODY_NAMES), its own final norm, its body, or the module itself, in this order.
    """
    model = unwrap(model)
    if not isinstance(model, PreTrainedModel) and callable(getattr(model, "get_decoder", None)):
        own: nn.Module = model.get_decoder()
        return own
    body = get_backbone(model)
    if not isinstance(body, PreTrainedModel):
        return _child(body, NORM_NAMES) or _child(model, NORM_NAMES) or body
    while isinstance(inner := body.get_decoder(), PreTrainedModel) and inner is not body:
        body = inner
    return body


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    children = dict(module.named_children())
    return next((children[name] for name in names if name in children), None)


def hidden_size_of(model: nn.Module) -> int | None:
    """Return the size of the last hidden state from the model's config; None for a model whose config has none."""
    config = getattr(unwrap(model), "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    sizes = (getattr(config, name, None) for name in SIZE_NAMES)
    return next((size for size in sizes if isinstance(size, int)), None)


def last_hidden_state(output: Any) -> Tensor:
    """Return the last hidden state [B, T, H] in what a module returned.

    It is `last_hidden_state` of an output or mapping, else the last of its `hidden_states`, else the first member of a
    plain tuple, else the tensor itself. Errors: ValueError when the output has none, as one with logits only.
    """
    state = _find_hidden_state(output)
    if state is None:
        raise ValueError(
            f"a model output of type {type(output).__name__} holds no hidden states: call the model with "
            "output_hidden_states=True (a trainer does with craft_use_hidden_state_hook=False), or name the layer to "
            "take them from (LastHiddenStateHook(model, layer_name=…))."
        )
    return state


def _find_hidden_state(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list):
        return output[0] if output and isinstance(output[0], Tensor) else None
    fields = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    state: Tensor | None = fields.get("last_hidden_state")
    if state is None and fields.get("hidden_states"):
        state = fields["hidden_states"][-1]
    return state


class LastHiddenStateHook:
    """Keeps the last hidden state of each forward pass: [B, T, H] with its graph, instead of one per layer.

    Arguments: `model` in any wrapping; `layer_name`, the dotted name of the module to take it from instead of the
    decoder (get_decoder). It equals `last_hidden_state` of the backbone, final norm included. `clear` frees it;
    `remove`, or leaving a `with` block, takes the hook off the model.
    Errors: ValueError for a layer that the model does not have; `get` raises ValueError before the first forward and
    after one that gave no hidden states.
    """

    def __init__(self, model: nn.Module, layer_name: str | None = None) -> None:
        self.hidden_state: Tensor | None = None
        target = get_decoder(model) if layer_name is None else _layer(model, layer_name)
        self._handle: Any = target.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.hidden_state = _find_hidden_state(output)

    def get(self) -> Tensor:
        """Return the hidden state of the last forward pass."""
        if self.hidden_state is None:
            raise ValueError(
                "no hidden state was captured: run the model first, or name the layer to take it from "
                "(LastHiddenStateHook(model, layer_name=…))."
            )
        return self.hidden_state

    def get_optional(self) -> Tensor | None:
        """Return the hidden state of the last forward pass, None when there is none."""
        return self.hidden_state

    def clear(self) -> None:
        """Forget the hidden state, and with it the graph it holds on to."""
        self.hidden_state = None

    def remove(self) -> None:
        """Take the hook off the model."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self.hidden_state = None

    @property
    def is_attached(self) -> bool:
        """Whether the hook is on the model."""
        return self._handle is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _layer(model: nn.Module, name: str) -> nn.Module:
    for root in (model, unwrap(model)):
        if name in (modules := dict(root.named_modules())):
            return modules[name]
    raise ValueError(f"the model has no layer {name!r}: names look like {', '.join(list(modules)[1:6])}.")
