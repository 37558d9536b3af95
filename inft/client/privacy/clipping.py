"""Exact per-example gradients of linear layers (LoRA's A and B), clipped and summed in the one backward pass.

For y = x Wᵀ the gradient of example b is Σ_t g_bt x_btᵀ, with g = ∂L/∂y (Goodfellow 2015). `PerExample` takes the
place of the layers' forward passes; in backward each layer keeps what is smaller of the gradients [B, O, I] and the
pair (x, g), whose norm follows without the gradients ("ghost norm", Li et al. 2022, section 4). The choice is the same
by memory and by time: T (I + O) against I·O.

Convention: an example's loss is `LossOutput.per_example_B` of a separable loss (token_ce: the mean over the example's
own supervised tokens), and what is differentiated is the sum of these over the batch. So neither another row's length
nor the size of the batch enters.

Axes: B examples, T tokens, I and O the layer's inputs and outputs.
"""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from params.errors import UserError


class NonFiniteGradient(UserError):
    """The gradient of an example is infinite or not a number; no gradient was changed."""


class PerExample:
    """Within the context, `backward` adds the sum of clipped per-example gradients to `.grad`.

    `trainable` are the parameters to train, by default all that require a gradient; each must be the weight of an
    ``nn.Linear`` without bias that sees [B, T, I], with the batch's examples as rows. The layers behave as before, and
    dropout, autocast and gradient checkpointing work. A loss that mixes examples (contrastive ones, batch norm)
    has no per-example gradient: its clipping would bound nothing.
    Errors: UserError for trainable parameters that are not covered, by name.
    """

    def __init__(self, model: nn.Module, trainable: Iterable[nn.Parameter] | None = None, *, clip_norm: float) -> None:
        if not clip_norm > 0:
            raise UserError(f"max_grad_norm is {clip_norm}: privacy needs a clipping norm above 0.")
        required = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.parameters = list(required if trainable is None else trainable)
        self.clip_norm = clip_norm
        self._layers = _covered(model, {id(parameter) for parameter in (*required, *self.parameters)})
        _check_listed(model, required, self.parameters)
        self._kept: dict[int, _Kept] = {}
        self._forwards: list[tuple[nn.Linear, Any]] = []  # the layers and what stood in their __dict__

    def __enter__(self) -> "PerExample":
        for name, layer in self._layers:
            self._forwards.append((layer, layer.__dict__.get("forward")))
            layer.forward = _Recorder(name, layer, self._keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, before in self._forwards:
            del layer.forward
            if before is not None:
                layer.forward = before
        self._forwards.clear()
        self._kept.clear()

    def backward(self, losses_B: Tensor) -> Tensor:
        """Add Σ_b min(1, C / ‖grad_b‖) · grad_b to `.grad`; return the norms [B] before clipping, in float32 or finer.

        Norms are over all trainable parameters jointly. Micro-batches of a logical batch add up.
        Errors: UserError where a layer's rows are not the examples; NonFiniteGradient names the rows.
        """
        if losses_B.ndim != 1:
            raise UserError(f"the losses have the shape {list(losses_B.shape)}: one loss per example, [B], is needed.")
        self._kept.clear()
        losses_B.sum().backward()
        try:
            return self._add_clipped(len(losses_B), losses_B)
        finally:
            self._kept.clear()

    @torch.no_grad()
    def _add_clipped(self, rows: int, losses_B: Tensor) -> Tensor:
        squares_B = losses_B.new_zeros(rows, dtype=torch.promote_types(losses_B.dtype, torch.float32))
        for kept in self._kept.values():
            kept.check_rows(rows)
            squares_B += kept.squares().to(squares_B)
        norms_B = squares_B.sqrt()
        if not norms_B.isfinite().all():
            bad = (~norms_B.isfinite()).nonzero().flatten().tolist()
            raise NonFiniteGradient(f"the gradients of rows {bad} are not finite: lower the learning rate.")
        scale_B = self.clip_norm / norms_B.clamp(min=self.clip_norm)
        for parameter in self.parameters:
            if id(parameter) not in self._kept:
                continue  # not part of this forward pass
            total = self._kept[id(parameter)].weighted_sum(scale_B).to(parameter.device, parameter.dtype)
            parameter.grad = total if parameter.grad is None else parameter.grad + total
        return norms_B

    def _keep(self, name: str, weight: Tensor, x: Tensor, g: Tensor) -> None:
        self._kept.setdefault(id(weight), _Kept(name)).add(x, g)


class _Kept:
    """What backward has left of one parameter: gradients [B, O, I], or the pairs (x, g) where these are smaller."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: set[int] = set()  # of the calls in this pass
        self.gradients_BOI: Tensor | None = None
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def add(self, x_BTI: Tensor, g_BTO: Tensor) -> None:
        self.rows.add(len(x_BTI))
        self.pairs.append((x_BTI, g_BTO))
        tokens = sum(x.shape[1] for x, _ in self.pairs)
        inputs, outputs = x_BTI.shape[2], g_BTO.shape[2]
        # Calls with other rows than the first are refused later, by name; they are only left alone here.
        if len(self.rows) == 1 and (self.gradients_BOI is not None or tokens * (inputs + outputs) >= inputs * outputs):
            x, g = self._joined()
            fresh = torch.einsum("bto,bti->boi", g, x)
            self.gradients_BOI = fresh if self.gradients_BOI is None else self.gradients_BOI + fresh
            self.pairs.clear()

    def check_rows(self, rows: int) -> None:
        if self.rows != {rows}:
            raise UserError(
                f"{self.name} sees {sorted(self.rows)} rows for {rows} examples, so its gradients cannot be told apart "
                "by example. Do not pack rows, and leave layers that see images or experts' tokens out of the adapter."
            )

    def squares(self) -> Tensor:
        """Squared norms [B]; without gradients Σ_{t,s} (x_t·x_s)(g_t·g_s)."""
        if self.gradients_BOI is not None:
            return self.gradients_BOI.square().sum((1, 2))
        x, g = self._joined()
        # Rounding can push a norm of 0 below it.
        return ((x @ x.mT) * (g @ g.mT)).sum((1, 2)).clamp(min=0)

    def weighted_sum(self, weights_B: Tensor) -> Tensor:
        """Σ_b weight_b · gradient_b [O, I]."""
        if self.gradients_BOI is not None:
            return torch.einsum("b,boi->oi", weights_B.to(self.gradients_BOI), self.gradients_BOI)
        x, g = self._joined()
        return torch.einsum("bto,bti->oi", g * weights_B.to(g)[:, None, None], x)

    def _joined(self) -> tuple[Tensor, Tensor]:
        # Calls of one weight add up, as their tokens do. float32: what is summed must be what was measured.
        fine = torch.promote_types(self.pairs[0][1].dtype, torch.float32)
        x, g = zip(*self.pairs, strict=True)
        if len(x) == 1:  # nearly always, and to join one would copy it
            return x[0].to(fine), g[0].to(fine)
        return torch.cat(x, 1).to(fine), torch.cat(g, 1).to(fine)


class _Recorder:
    """The forward pass of one layer that hands its input and output gradient on in backward."""

    def __init__(self, name: str, layer: nn.Linear, keep: Callable[[str, Tensor, Tensor, Tensor], None]) -> None:
        self.name, self.layer, self.keep = name, layer, keep

    def __call__(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return F.linear(input, self.layer.weight)
        if input.ndim != 3:
            raise UserError(
                f"{self.name} sees an input of shape {list(input.shape)}, not [examples, tokens, features]: its "
                "gradients cannot be told apart by example. Leave it out of the adapter."
            )
        output: Tensor = _Linear.apply(input, self.layer.weight, self)
        return output


class _Linear(torch.autograd.Function):
    """x Wᵀ whose backward gives no gradient to W: the recorder keeps what the clipped one is made of."""

    @staticmethod
    def forward(ctx: Any, x_BTI: Tensor, weight_OI: Tensor, recorder: _Recorder) -> Tensor:
        ctx.save_for_backward(x_BTI, weight_OI)
        ctx.recorder = recorder
        return F.linear(x_BTI, weight_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BTO: Tensor) -> tuple[Tensor | None, None, None]:
        x_BTI, weight_OI = ctx.saved_tensors
        recorder = ctx.recorder
        recorder.keep(recorder.name, recorder.layer.weight, x_BTI, g_BTO)
        grad_x = (g_BTO @ weight_OI.to(g_BTO.dtype)).to(x_BTI.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, None


def _covered(model: nn.Module, trainable: set[int]) -> list[tuple[str, nn.Linear]]:
    """Return the layers that own the trainable parameters; UserError names the parameters of other kinds of module."""
    layers, refused, found = [], [], set()
    for module_name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise UserError(f"{module_name} is a batch norm in training: it mixes examples, so none can be clipped.")
        for name, parameter in module.named_parameters(module_name, recurse=False):
            if id(parameter) not in trainable:
                continue
            found.add(id(parameter))
            if type(module) is nn.Linear and module.bias is None:
                layers.append((module_name, module))
            else:
                refused.append(name)
    if refused:
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise UserError(
            f"{', '.join(refused[:3])}{more} cannot be trained privately: only weights of linear layers without bias "
            "can (LoRA's A and B). Freeze them, or take them out of the adapter (bias, DoRA, modules_to_save, "
            "embeddings)."
        )
    if not layers or found != trainable:
        raise UserError("trainable parameters are none, or not of this model: nothing private could be trained.")
    return layers


def _check_listed(model: nn.Module, required: list[nn.Parameter], listed: list[nn.Parameter]) -> None:
    unlisted = {id(p) for p in required} - {id(p) for p in listed}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in unlisted]
    frozen = [name for name, p in model.named_parameters() if any(p is q for q in listed) and not p.requires_grad]
    if names:
        raise UserError(f"{names[0]} requires a gradient and is not among the trainable parameters: freeze it.")
    if frozen:
        raise UserError(f"{frozen[0]} is to be trained and does not require a gradient: set requires_grad.")
