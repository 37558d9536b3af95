"""Linear layers of Quartet II (Panferov et al. 2026, NVFP4); written to its interface and not run here.

It needs CUDA, a GPU of compute capability 12.0 (sm120a) and bf16 autocast.
Axes: T tokens, I inputs, O outputs.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from inft.encoders.lowprecision.layers import replace_linears
from params.errors import UserError
from params.lowprecision import Quartet2Params


def convert_quartet2(model: nn.Module, names: Sequence[str], params: Quartet2Params) -> tuple[str, ...]:
    """Replace the linear layers of these names in place; return notes for the user, of which there are none."""
    try:
        from quartet2.linear import Quartet_II_linear
    except ImportError as error:
        raise UserError(
            f"Quartet II cannot be loaded ({error}): pip install --no-build-isolation 'inft[quant_quartet]'."
        ) from error

    class StreamLinear(Quartet_II_linear):
        """The layer for a flat stream: its own takes [batch, T, I]."""

        def forward(self, x_TI: Tensor) -> Tensor:
            """Return [T, O]; a padded batch goes through as it is."""
            if x_TI.dim() == 2:
                return super().forward(x_TI.unsqueeze(0)).squeeze(0)
            return super().forward(x_TI)

    def made(linear: nn.Linear) -> nn.Module:
        sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": False}
        layer = StreamLinear(**sizes, four_over_six=params.four_over_six, device="cuda", dtype=linear.weight.dtype)
        layer.load_state_dict(linear.state_dict())
        return layer

    replace_linears(model, names, made)
    return ()
