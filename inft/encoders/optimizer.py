"""How a step is made: AdamW, Adam, or Muon of the blocks' matrices with AdamW of the rest.

Axes: R rows and C columns of a weight matrix.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Adam, AdamW, Optimizer
from torch.optim._muon import muon

from params.encoder import OptimizerParams
from params.errors import UserError

_FUSED_DEVICES = ("cpu", "cuda")  # where torch has one kernel for the step of all parameters


def make_optimizers(model: nn.Module, params: OptimizerParams) -> list[Optimizer]:
    """Return the optimizers of all trainable parameters, each parameter in one of them and in one group.

    adamw and adam: one optimizer. muon: SplitMuon of the matrices inside the blocks, then AdamW of the embeddings, the
    head and the norms; one learning rate serves both. Norms, biases and embeddings of positions are not decayed. Tied
    weights count once.
    Errors: UserError when the betas are not two, or muon finds no matrix.
    """
    if len(params.betas) != 2:
        raise UserError(f"optimizer.betas are two numbers, such as 0.9,0.95; got {len(params.betas)}.")
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if params.name != "muon":
        return [_adam(Adam if params.name == "adam" else AdamW, model, named, params)]
    matrices = dict(_block_matrices(model, named))
    if not matrices:
        raise UserError(
            "optimizer.name: muon is for the matrices of a model's blocks, and this model has none to train: set adamw."
        )
    rest = {name: weight for name, weight in named.items() if name not in matrices}
    first = SplitMuon(matrices.values(), lr=params.lr, weight_decay=params.weight_decay, momentum=params.momentum)
    return [first, *([_adam(AdamW, model, rest, params)] if rest else [])]


def _adam(
    kind: type[Adam] | type[AdamW], model: nn.Module, named: dict[str, Parameter], params: OptimizerParams
) -> Optimizer:
    decayed = _decayed(model)
    groups = [
        {"params": [weight for name, weight in named.items() if (name in decayed) == decay], "weight_decay": amount}
        for decay, amount in ((True, params.weight_decay), (False, 0.0))
    ]
    fused = all(weight.device.type in _FUSED_DEVICES and weight.is_floating_point() for weight in named.values())
    beta1, beta2 = params.betas
    return kind(
        [group for group in groups if group["params"]],
        lr=params.lr,
        betas=(beta1, beta2),
        eps=params.eps,
        fused=fused or None,  # None lets torch choose
    )


def _decayed(model: nn.Module) -> set[str]:
    """Names of the weights that decay: those of linear layers and of embeddings of tokens."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if not (isinstance(module, nn.Embedding) and "position" in path)
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() >= 2
    }


class Matrix(NamedTuple):
    """A weight matrix [R, C] and what its rows are: `heads` times `parts` blocks of equal size, parts innermost."""

    weight: Parameter
    heads: int = 1
    parts: int = 1


def _block_matrices(model: nn.Module, named: dict[str, Parameter]) -> Iterator[tuple[str, Matrix]]:
    """The matrices of linear layers within lists of blocks; how q, k, v and SwiGLU's halves share one is known by name.

    qkv: the rows of each head are its q, its k and its v. w12: the first half of the rows, then the second.
    """
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if not isinstance(module, nn.Linear) or name not in named or not any(map(str.isdigit, path.split("."))):
            continue
        own = path.rpartition(".")[2]
        heads = model.config.num_attention_heads if own == "qkv" else 1
        yield name, Matrix(named[name], heads=heads, parts={"qkv": 3, "w12": 2}.get(own, 1))


class SplitMuon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) that orthogonalises each part of a fused matrix for itself.

    Of a matrix that holds q, k and v the update would otherwise be orthogonal as a whole: its singular values are 1
    over the three together, and where v's gradient is the largest, q and k hardly move. Taken apart, each has the
    update that it would have as a weight of its own, to the bit. The step, with Nesterov momentum and the RMS of AdamW
    (Liu et al. 2025), is torch's.
    """

    def __init__(self, matrices: Iterable[Matrix], *, lr: float, weight_decay: float, momentum: float) -> None:
        groups: dict[tuple[int, int], list[Parameter]] = {}
        for matrix in matrices:
            groups.setdefault((matrix.heads, matrix.parts), []).append(matrix.weight)
        super().__init__(
            [{"params": weights, "heads": heads, "parts": parts} for (heads, parts), weights in groups.items()],
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=True,
            adjust_lr_fn="match_rms_adamw",
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change every matrix that has a gradient; return the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight_RC in group["params"]:
                if weight_RC.grad is not None:
                    self._step_matrix(weight_RC, group)
        return loss

    def _step_matrix(self, weight_RC: Parameter, group: dict[str, Any]) -> None:
        state = self.state[weight_RC]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight_RC.grad)
        whole = (weight_RC, weight_RC.grad, state["momentum_buffer"])
        parts = [_parts(tensor_RC, group["heads"], group["parts"]) for tensor_RC in whole]
        names = ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "ns_steps", "eps", "adjust_lr_fn")
        muon(*parts, **{name: group[name] for name in names}, has_complex=False)
        if group["parts"] > 1:
            for tensor_RC, changed in ((whole[0], parts[0]), (whole[2], parts[2])):
                tensor_RC.copy_(_joined(changed, group["heads"]))


def _parts(tensor_RC: Tensor, heads: int, parts: int) -> list[Tensor]:
    """The parts [R / parts, C] of a matrix: itself when it is but one, otherwise copies or views."""
    if parts == 1:
        return [tensor_RC]
    return [part.flatten(0, 1) for part in tensor_RC.unflatten(0, (heads, parts, -1)).unbind(1)]


def _joined(parts: list[Tensor], heads: int) -> Tensor:
    return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 2)
