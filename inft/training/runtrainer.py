"""RunTrainer: what a run adds to any trainer: whole checkpoints, exact resume, its own evaluation, a stop at a NaN."""

import json
import math
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from inft.training.best import save_adapter
from inft.training.callbacks import BestCallback
from inft.training.captions import CAPTIONS, HeldoutCaptions
from inft.training.processes import agreed, gather, is_main, process_count, rank
from inft.training.resume import STATE_FILE, checkpoints, read_state, write_manifest
from inft.training.rows import PairRows, RowCollator
from inft.training.storage import remove, staged
from params import UserError


class RunTrainer(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]  # stands before a Trainer
    """Stands before a trainer with CRAFT: ``class T(RunTrainer, CRAFTSFTTrainer)``; that one's loss and loop stay.

    A subclass says in ``score_heldout`` what an evaluation measures, and in ``judged`` which of its figures must be
    finite. Adapters stay float32, and nothing is reported to the hub.
    """

    judged = "loss"  # the figure of an evaluation that is told, without its prefix

    def __init__(
        self,
        *,
        model: PeftModel,
        args: TrainingArguments,
        rows: RowCollator,
        pairs: PairRows | None = None,  # of CRAFT; None: rows are aligned with themselves, if alpha is below 1
        processor: Any,
        best: BestCallback,
        keep_checkpoints: int,  # checkpoints that are not removed when another is saved
        fingerprint: str,  # of the rows, kept in every checkpoint
        captions: HeldoutCaptions | None = None,  # what is generated at each evaluation
        callbacks: Sequence[TrainerCallback] = (),
        **needed: Any,  # by the trainer that stands after this one, such as its data_collator
    ) -> None:
        # Non-reentrant checkpointing needs no gradient of its input. Asked for one, transformers hooks the patch
        # embedding too, and every backward pass would run through the whole frozen vision tower.
        model.get_base_model().enable_input_require_grads = lambda: None
        # TRL rounds the adapters of a 4-bit model to bfloat16, in which an update of less than 1/256 of a weight is
        # lost. They are a small share of the memory: float32 they stay.
        weights = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
        self.rows = rows
        super().__init__(
            model=model,
            args=args,
            processing_class=processor,
            callbacks=[*callbacks, best],
            contrastive_dataset=pairs,
            craft_collator=pairs.collate if pairs is not None else None,
            **{"train_dataset": rows.train_dataset(), "eval_dataset": rows.heldout_dataset(), **needed},
        )
        for parameter, data in weights.items():
            parameter.data = data.to(parameter.device)
        if args.activation_checkpointing:  # train() does so too; the guards before it need the memory as well
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.best = best
        self.keep_checkpoints = keep_checkpoints
        self.fingerprint = fingerprint
        self.captions = captions
        self._staging: Path | None = None  # where a checkpoint is being written
        self._restored: dict[str, Any] | None = None  # STATE_FILE of the checkpoint the run goes on from
        self.remove_callback(PrinterCallback)  # prints dictionaries
        self.add_callback(_RestoreWindow(self))

    def score(self, batch: Mapping[str, torch.Tensor]) -> Any:
        """TRL's FusedCausalLMOutput of a batch of the family's collator, in the precision of training."""
        inputs = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
        with self.accelerator.autocast():
            return self.model(**inputs, use_cache=False, fused_lm_head=True)

    @abstractmethod
    def score_heldout(self, eval_dataset: Any, prefix: str) -> dict[str, float]:
        """The figures of the held-out rows, the same in all processes."""

    def fit(self, checkpoint: Path | None) -> float | None:
        """Train, from a checkpoint or from step 0; the mean loss over all steps, None when no step was made."""
        if checkpoint is None:
            return self._mean_loss(self.train())
        self._restored = read_state(checkpoint)
        for name, value in self._restored["best"].items():
            setattr(self.best.so_far, name, value)
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        finished = state.global_step >= self.args.max_steps
        self.best.stopped_early = self.best.patience_is_over and not finished
        if finished or self.best.stopped_early:
            # Nothing is left to do; the loop would make one more step before it looked.
            self._load_from_checkpoint(str(checkpoint))
            self.state = state
            window = self._restored["window"]
            total: float = window["total_loss"] + sum(window["loss"]) / len(window["loss"])
            return total / state.global_step
        return self._mean_loss(self.train(resume_from_checkpoint=str(checkpoint)))

    @staticmethod
    def _mean_loss(trained: TrainOutput) -> float | None:
        losses = gather(trained.training_loss)  # since the last log each process has summed its own rows
        return sum(losses) / len(losses) if trained.global_step else None

    def _send_telemetry(self) -> None:
        """TRL reports each run to the hub; this project reports nothing."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; UserError when its loss is not finite, before the weights have changed."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        losses = self.accelerator.gather(loss)  # all processes stop at the same step, whosever rows they were
        if not torch.isfinite(losses).all():
            worst = losses[~torch.isfinite(losses)][0].item()
            raise self._diverged(self.state.global_step + 1, f"the loss is {worst}")
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)) and not self.args.fp16:
            raise self._diverged(self.state.global_step + 1, f"the gradient norm is {float(norm)}")
        return norm

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The figures of ``score_heldout`` and, where some are generated, of captions: ``eval_chrf`` and so on."""
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed: how often one evaluates must not matter
            metrics = self.score_heldout(eval_dataset, metric_key_prefix)
        judged, captioned = metrics[f"{metric_key_prefix}_{self.judged}"], None
        if self.captions is not None and math.isfinite(judged):
            with self.accelerator.autocast():
                captioned = self.captions.score(self.model)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in captioned.figures.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - began
        self.log(metrics)
        if not math.isfinite(judged):
            raise self._diverged(self.state.global_step, f"the evaluation {self.judged} is {judged}")
        told = {**metrics, CAPTIONS: captioned}  # trackers, which have been told the metrics, take numbers only
        self.callback_handler.on_evaluate(self.args, self.state, self.control, told)  # changes control in place
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write checkpoint-N whole, with its manifest, and only then remove the oldest."""
        if not all(torch.isfinite(weights).all() for weights in model.parameters() if weights.requires_grad):
            raise self._diverged(self.state.global_step, "an adapter weight is not finite")
        run_dir, step = Path(self.args.output_dir), self.state.global_step
        final = run_dir / f"checkpoint-{step}"
        with staged(final, what=final.name) if is_main() else nullcontext() as staging:
            self._staging = gather(staging)[0]
            Trainer._save_checkpoint(self, model, trial)  # past TRL's, which writes a model card each time
            state = self._own_state()
            gather(None)  # each process has written its random state
            if staging is not None:
                self._finish_checkpoint(staging, state)
        self._staging = None
        if is_main():
            for _, old in checkpoints(run_dir)[self.keep_checkpoints :]:
                remove(old)

    def _finish_checkpoint(self, staging: Path, state: Mapping[str, Any]) -> None:
        """Add our own state to a checkpoint that transformers wrote into ``staging``, and the manifest."""
        step = self.state.global_step
        inner = staging / f"checkpoint-{step}"
        (inner / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
        for path in inner.iterdir():
            path.rename(staging / path.name)
        inner.rmdir()
        write_manifest(staging, step=step)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapter alone: the processor is in best/, and the arguments (a pickle) are in params.yaml."""
        assert output_dir is not None
        if self.args.should_save:  # transformers calls this in every process
            save_adapter(self.model, Path(output_dir))

    def _init_training_state(self, max_steps: int, *rest: Any) -> tuple[int, int]:
        position: tuple[int, int] = super()._init_training_state(max_steps, *rest)
        # A resumed run logs, evaluates and saves as it is told now, not as it was told when the checkpoint was saved.
        self.state.compute_steps(self.args, max_steps)
        return position

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _own_state(self) -> dict[str, Any]:
        """What a resumed run needs to log the same figures: the best so far and sums since the last log."""
        window = {
            "loss": gather(self._tr_loss.item()),  # of each process
            "total_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            **self.window_sums(),
        }
        return {
            "rows": self.fingerprint,
            "processes": process_count(),
            "best": asdict(self.best.so_far),
            "window": window,
        }

    def restore_window(self) -> None:
        """Put back the sums since the last log of the checkpoint that was loaded, if one was."""
        if self._restored is None:
            return
        window = self._restored["window"]
        self._tr_loss += window["loss"][rank()]
        self._total_loss_scalar = window["total_loss"]
        self._globalstep_last_logged = window["logged_step"]
        self.restore_sums(window)
        self._initial_global_step = 0  # the mean loss is over the whole run, as the total above

    def window_sums(self) -> dict[str, Any]:
        """What the trainer itself has added up since the last log, for a checkpoint; here as TRL's trainers keep it."""
        return {"tokens": self._total_train_tokens, "metrics": dict(self._metrics["train"])}

    def restore_sums(self, window: Mapping[str, Any]) -> None:
        """Put back what ``window_sums`` gave."""
        self._total_train_tokens = window["tokens"]
        self._metrics["train"].update(window["metrics"])

    def _diverged(self, step: int, what: str) -> UserError:
        whole = [path for _, path in checkpoints(Path(self.args.output_dir))]
        kept = f"The last good checkpoint is {whole[0]}." if whole else "No checkpoint had been saved yet."
        message = (
            f"step {step}: {what}; the run is stopped and nothing of this step is kept. {kept} "
            "Start again, with --overwrite or another --output-dir, and lower sft.lr or sft.max_grad_norm, lengthen "
            "sft.warmup_ratio, or use bfloat16 or float32 instead of float16."
        )
        return agreed(UserError(message))  # losses, gradients and weights are those of all processes


class _RestoreWindow(TrainerCallback):
    """Calls restore_window at the one moment when the loop has set its sums to zero and not yet added to them."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.restore_window()
