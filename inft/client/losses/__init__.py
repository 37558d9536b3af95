"""What a training client minimises: losses by name, batches as users write them, seeds. Importing this loads no torch.

`inputs` says what a loss is given and gives back, `registry` finds one by name, and each loss has a file of its own
(the objectives of reinforcement learning share `policy`). `batch` reads a user's rows, `determinism` sets seeds.
"""

from inft.client.losses.registry import loss_names, register_loss, resolve_loss

__all__ = ["loss_names", "register_loss", "resolve_loss"]
