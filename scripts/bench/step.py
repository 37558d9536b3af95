"""Training step: forward and backward of inft's trainer against plain TRL's SFTTrainer, same model and batch.

    python scripts/bench/step.py [--model llama32|aya|text] [--rows 16] [--checkpointing]

The peer is SFTTrainer as it comes, given the same adapters and the same collated batch. Loss and every gradient must
agree before the two are timed.
"""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from harness import interleave, parser, report
from trl import SFTConfig, SFTTrainer

from inft.data.batches import load_samples
from inft.models import load_spec
from inft.models.loading import load_model, load_processor
from inft.sample import Sample
from inft.training.adapters import add_adapters
from inft.training.callbacks import BestCallback, BestSoFar
from inft.training.plan import Steps
from inft.training.rows import RowCollator
from inft.training.sft import sft_config
from inft.training.trainer import CaptionTrainer
from params import TrainParams
from params.presets import lora_targets
from params.resolve import resolve_train

Gradients = dict[str, torch.Tensor]


class Fixture:
    """One model with adapters, in one trainer, with the batch it steps on."""

    def __init__(self, params: TrainParams, samples: list[Sample], directory: Path, *, ours: bool) -> None:
        spec = load_spec(params.model)
        processor = load_processor(spec, params.processor_name)
        collator = spec.collator(processor, max_length=params.basic.max_length)
        base = load_model(spec, params.model_name, basic=params.basic)
        targets = lora_targets(params.model, params.training_mode, params.lora)
        model = add_adapters(base, spec, params.lora, targets, seed=params.basic.seed)
        steps = Steps(per_epoch=1, total=1, warmup=0, effective_batch=len(samples))
        if ours:
            rows = RowCollator(samples, [], collator)
            best = BestCallback(BestSoFar(), keep=None, patience=0, threshold=0.0)
            self.trainer: SFTTrainer = CaptionTrainer(
                model=model,
                args=sft_config(params, output_dir=directory, steps=steps, evaluate=False),
                rows=rows,
                processor=processor,
                best=best,
                keep_checkpoints=1,
                fingerprint="",
                callbacks=[],
            )
        else:
            config = SFTConfig(
                output_dir=str(directory),
                max_length=None,
                remove_unused_columns=False,
                dataset_kwargs={"skip_prepare_dataset": True},
                report_to="none",
                use_cpu=not torch.cuda.is_available(),
                bf16=False,
                activation_checkpointing=params.sft.gradient_checkpointing,
            )
            self.trainer = SFTTrainer(
                model=model,
                args=config,
                data_collator=lambda rows: rows,
                train_dataset=Dataset.from_dict({"row": [0]}),
                processing_class=processor,
            )
            if params.sft.gradient_checkpointing:  # as its train() does before the first step
                self.trainer.model.activation_checkpointing_enable()
        self.batch = collator(samples)
        self.supervised = (self.batch["labels"] != -100).sum()  # what the training loop counts before a step
        self.trainer.model.train()

    def step(self) -> float:
        """Forward and backward; the gradients are replaced, not added to."""
        self.trainer.model.zero_grad(set_to_none=True)
        return float(self.trainer.training_step(self.trainer.model, dict(self.batch), self.supervised))

    def gradients(self) -> Gradients:
        """The gradient of every trainable parameter."""
        named = self.trainer.model.named_parameters()
        return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


def check_equal(ours: Fixture, peer: Fixture) -> None:
    """Loss and gradients of both trainers agree to rounding."""
    losses, gradients = [], []
    for fixture in (ours, peer):
        losses.append(fixture.step())
        gradients.append(fixture.gradients())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    assert gradients[0].keys() == gradients[1].keys(), "other trainable parameters"
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6, msg=name)


def main() -> None:
    """Check equality, then time both."""
    options = parser(__doc__, repetitions=21)
    options.add_argument("--model", default="llama32", choices=["llama32", "aya", "text"])
    options.add_argument("--rows", type=int, default=16, help="rows of the batch")
    options.add_argument("--checkpointing", action="store_true", help="recompute activations, as released models do")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    params = resolve_train(
        chosen.model,
        training_mode="advanced",
        demo=True,
        overrides=(
            "lora.dropout=0",
            "data.max_rows_per_lang=32",
            f"sft.gradient_checkpointing={chosen.checkpointing}",
        ),
    )
    spec = load_spec(chosen.model)
    samples = load_samples(params.data, quarantine_file=None, with_images=spec.takes_images).train[: chosen.rows]
    with tempfile.TemporaryDirectory() as directory:
        ours = Fixture(params, samples, Path(directory), ours=True)
        peer = Fixture(params, samples, Path(directory), ours=False)
        check_equal(ours, peer)
        seconds = interleave({"inft": ours.step, "TRL": peer.step}, repetitions=chosen.repetitions)
    checkpointing = ", activations recomputed" * chosen.checkpointing
    title = f"training step, {chosen.model}, {chosen.rows} rows{checkpointing}"
    report(title, seconds, ours="inft", peer="TRL", limit=1.03, out=chosen.out)


if __name__ == "__main__":
    main()
