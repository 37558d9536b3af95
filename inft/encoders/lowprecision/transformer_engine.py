"""Linear layers through NVIDIA Transformer Engine; written to its documented interface (2.x) and not run here.

It needs a GPU of Ada or later: fp8_* from compute capability 8.9, mxfp8 and nvfp4 from 10.0.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

from torch import nn

from inft.encoders.lowprecision.layers import replace_linears
from params.errors import UserError
from params.lowprecision import TransformerEngineParams

RESTARTS = (
    "fp8_delayed starts its history of largest values anew in a resumed run: the first losses after a resume differ in "
    "the last digits."
)


def convert_transformer_engine(
    model: nn.Module, names: Sequence[str], params: TransformerEngineParams
) -> tuple[str, ...]:
    """Replace the linear layers of these names in place and put autocast around the encoder's forward pass in training.

    accelerate's convert_model knows no filter and would convert layer norms too; its wrapper of the forward pass is
    used where it is at hand. Returns notes for the user.
    """
    te = _transformer_engine()

    class PlainStateLinear(te.Linear):  # type: ignore[name-defined]
        """A layer that stores its weight alone: Transformer Engine's extra state is a pickle."""

        get_extra_state = nn.Module.get_extra_state
        set_extra_state = nn.Module.set_extra_state

    def made(linear: nn.Linear) -> nn.Module:
        layer = PlainStateLinear(
            linear.in_features, linear.out_features, bias=linear.bias is not None, params_dtype=linear.weight.dtype
        )
        layer.load_state_dict(linear.state_dict())
        return layer

    replace_linears(model, names, made)
    encoder = getattr(model, "model", model)
    encoder.forward = MethodType(_wrapped(encoder.forward, params), encoder)
    return (RESTARTS,) if params.recipe == "fp8_delayed" else ()


def _wrapped(forward: Callable[..., Any], params: TransformerEngineParams) -> Callable[..., Any]:
    """The forward pass under autocast while its module trains: evaluation is more accurate without."""
    try:
        from accelerate.utils.transformer_engine import contextual_fp8_autocast

        wrapped: Callable[..., Any] = contextual_fp8_autocast(forward, make_recipe(params))
    except ImportError:  # no such helper, or one that looks for a name which this Transformer Engine no longer has
        return _wrapped_here(forward, params)
    return wrapped


def _wrapped_here(forward: Callable[..., Any], params: TransformerEngineParams) -> Callable[..., Any]:
    def in_autocast(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return forward(*args, **kwargs)
        with autocast(params):
            return forward(*args, **kwargs)

    return in_autocast


def autocast(params: TransformerEngineParams) -> AbstractContextManager[None]:
    """The context in which converted layers compute in the recipe's precision."""
    te = _transformer_engine()
    if hasattr(te, "autocast"):
        context: AbstractContextManager[None] = te.autocast(enabled=True, recipe=make_recipe(params))
    else:  # before 2.9
        context = te.fp8_autocast(enabled=True, fp8_recipe=make_recipe(params))
    return context


def make_recipe(params: TransformerEngineParams) -> Any:
    """Transformer Engine's recipe object."""
    try:
        from transformer_engine.common import recipe
    except ImportError as error:
        raise _not_installed(error) from error
    name, arguments = recipe_arguments(params)
    if not hasattr(recipe, name):
        raise UserError(
            f"transformer_engine.recipe: {params.recipe} is {name}, which this Transformer Engine does not have: "
            "install 2.9 or later."
        )
    if "fp8_format" in arguments:
        arguments["fp8_format"] = getattr(recipe.Format, arguments["fp8_format"])
    return getattr(recipe, name)(**arguments)


def recipe_arguments(params: TransformerEngineParams) -> tuple[str, dict[str, Any]]:
    """The name of the recipe's class and its arguments; fp8_format by its name."""
    default = "E4M3" if params.recipe == "mxfp8" else "HYBRID"
    fp8_format = {"fp8_format": params.fp8_format or default}
    if params.recipe == "fp8_delayed":
        history = {name: getattr(params, name) for name in ("margin", "amax_history_len", "amax_compute_algo")}
        return "DelayedScaling", {**fp8_format, **history}
    if params.recipe == "fp8_current":
        return "Float8CurrentScaling", fp8_format
    if params.recipe == "mxfp8":
        return "MXFP8BlockScaling", fp8_format
    switches = ("disable_rht", "disable_stochastic_rounding", "disable_2d_quantization")
    return "NVFP4BlockScaling", {name: getattr(params, name) for name in switches}


def _transformer_engine() -> Any:
    try:
        import transformer_engine.pytorch as te
    except ImportError as error:
        raise _not_installed(error) from error
    return te


def _not_installed(error: ImportError) -> UserError:
    return UserError(
        f"Transformer Engine cannot be loaded ({error}): pip install --no-build-isolation 'inft[transformer_engine]'."
    )
