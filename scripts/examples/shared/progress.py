"""What is printed while an example trains: some figures of the log, ten times a run, instead of all at every step."""

from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def follow(trainer: Trainer, *keys: str) -> None:
    """Print these entries of the log as the trainer runs; trainer.state.log_history has all of them."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Lines(keys))


class _Lines(TrainerCallback):
    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys
        self.tenth = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        found = {key: (logs or {})[key] for key in self.keys if key in (logs or {})}
        tenth = 10 * state.global_step // max(1, state.max_steps)  # 0: evaluated before it was trained
        if found and tenth > self.tenth:
            self.tenth = tenth
            figures = "  ".join(f"{key.split('/')[-1]} {float(value):.4g}" for key, value in found.items())
            print(f"step {state.global_step:>4}/{state.max_steps}  {figures}")
