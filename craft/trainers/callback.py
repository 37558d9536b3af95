"""What happens beside the training loop of a CRAFT trainer."""

from typing import Any

from transformers import TrainerCallback


class BesideTheLoop(TrainerCallback):
    """What the training loop does for the model and its own loader, done for the head and for mixed loaders."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forget what a step that was interrupted left behind."""
        self.trainer._craft_forget()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Let go of the workers that read pairs beside the loop."""
        if (stream := getattr(self.trainer, "_craft_stream", None)) is not None:
            stream.close()

    def on_epoch_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        """Tell a mixed loader its epoch, which a resumed run begins in the middle of."""
        self.trainer._craft_loaders.begin_epoch(state.global_step)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Keep a learnable temperature in its range; drop the gradients that model.zero_grad() does not reach."""
        self.trainer.craft_loss.clamp_temperature()
        for parameter in self.trainer.craft_parameters():
            parameter.grad = None
