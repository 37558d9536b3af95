"""The projection head between pooled hidden states and the space in which similarities are taken."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Two linear layers with a GELU between them, then unit length (Chen et al. 2020, SimCLR, section 2.1).

    Arguments: sizes of input, hidden layer (None: as the input) and output; dropout probability after the GELU.
    Input [..., input_dim] in any float dtype, output [..., output_dim] in the head's own (float32): autocast around it
    changes nothing, because bfloat16 similarities would be off by more than one part in ten at temperature 0.05.
    """

    def __init__(
        self, input_dim: int, hidden_dim: int | None = None, output_dim: int = 256, dropout: float = 0.0
    ) -> None:
        super().__init__()
        hidden_dim = hidden_dim or input_dim
        self.net = nn.Sequential(
            nn.Linear(input_dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout) if dropout else nn.Identity(),
            nn.Linear(hidden_dim, output_dim),
        )
        for layer in (self.net[0], self.net[3]):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the unit vectors of `x`."""
        weight = self.net[0].weight  # on another GPU, maybe, than the one that a model over several ends on
        with torch.autocast(weight.device.type, enabled=False):
            return F.normalize(self.net(x.to(weight.device, weight.dtype)), dim=-1)
