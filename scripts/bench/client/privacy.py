"""What differential privacy costs: per-example clipping against a plain backward pass, and against Opacus.

    python scripts/bench/client/privacy.py [--rows 8] [--tokens 168] [--repetitions 40]

One LoRA model in one process and on one thread; Opacus works on a copy of it. "pass" is forward, backward and, where
private, clipping; "step" is that with noise and the optimizer. Before the timing, our sum of clipped gradients must
equal Opacus'. The client's own steps, with accountant and a snapshot after each private one, are shown beside.
"""

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measured import Ratio, finish
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from plain_loop import CONFIG, lora_model, rows_of
from step import client_step
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import interleave, parser

from inft.client import NoiseSource, ServiceClient
from inft.client.losses.inputs import LossInputs, next_token_labels
from inft.client.losses.token_ce import token_ce
from inft.client.privacy.clipping import PerExample
from inft.client.privacy.noise import add_noise

CLIP, NOISE, RATE = 0.5, 1.0, 1e-4
RATIOS = [
    Ratio(ours="clipped pass", peer="plain pass", limit=1.10),
    Ratio(ours="Opacus pass", peer="plain pass"),
    Ratio(ours="private step", peer="plain step"),
    Ratio(ours="Opacus step", peer="plain step"),
    Ratio(ours="client, private", peer="client, plain"),
]


class Steps:
    """The same model three times, with what each needs for a pass and for a step."""

    def __init__(self, rows: dict[str, list[list[int]]]) -> None:
        self.batch = {name: torch.tensor(values) for name, values in rows.items()}
        self.count = len(self.batch["input_ids"])
        self.plain = lora_model(dropout=0.0)
        self.plain_optimizer = optimizer_of(self.plain)
        self.ours = copy.deepcopy(self.plain)
        self.ours_optimizer = optimizer_of(self.ours)
        self.source = NoiseSource()
        self.opacus = GradSampleModule(copy.deepcopy(self.plain), loss_reduction="sum")
        self.opacus_optimizer = DPOptimizer(
            optimizer_of(self.opacus),
            noise_multiplier=NOISE,
            max_grad_norm=CLIP,
            expected_batch_size=self.count,
            loss_reduction="sum",
        )

    def losses(self, model: nn.Module) -> Tensor:
        """Each row's own loss [B]."""
        logits = model(
            input_ids=self.batch["input_ids"], attention_mask=self.batch["attention_mask"], use_cache=False
        ).logits
        inputs = LossInputs(
            logits_BTV=logits,
            labels_BT=next_token_labels(self.batch["labels"]),
            attention_mask_BT=self.batch["attention_mask"],
        )
        found = token_ce(inputs).per_example_B
        assert found is not None
        return found

    def plain_pass(self) -> None:
        self.plain_optimizer.zero_grad()
        self.losses(self.plain).mean().backward()

    def clipped_pass(self) -> None:
        self.ours_optimizer.zero_grad()
        with PerExample(self.ours, clip_norm=CLIP) as clipping:
            clipping.backward(self.losses(self.ours))

    def opacus_pass(self) -> None:
        self.opacus_optimizer.zero_grad()
        self.losses(self.opacus).sum().backward()
        self.opacus_optimizer.clip_and_accumulate()

    def plain_step(self) -> None:
        self.plain_pass()
        self.plain_optimizer.step()

    def private_step(self) -> None:
        self.clipped_pass()
        add_noise(
            trained(self.ours),
            noise_multiplier=NOISE,
            clip_norm=CLIP,
            expected_batch_size=self.count,
            source=self.source,
        )
        self.ours_optimizer.step()

    def opacus_step(self) -> None:
        self.opacus_optimizer.zero_grad()
        self.losses(self.opacus).sum().backward()
        self.opacus_optimizer.step()

    def check(self) -> None:
        """Refuse to time what does not compute the same: Opacus adds 1e-6 to each norm, and sums in its own order."""
        self.clipped_pass()
        self.opacus_pass()
        for ours, peer in zip(trained(self.ours), trained(self.opacus), strict=True):
            assert ours.grad is not None
            torch.testing.assert_close(ours.grad, peer.summed_grad, rtol=1e-3, atol=1e-6)


def trained(model: nn.Module) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=RATE)


def main() -> None:
    """Check, time, print; the exit code is 1 when the limit is missed."""
    options = parser(__doc__, repetitions=40)
    options.add_argument("--rows", type=int, default=8, help="rows of a batch")
    options.add_argument("--tokens", type=int, default=168, help="tokens of a row")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="(opacus|torch)")  # about hooks, once for each layer
    rows = rows_of(chosen.rows, chosen.tokens)
    steps = Steps(rows)
    steps.check()
    variants: dict[str, Callable[[], object]] = {
        "plain pass": steps.plain_pass,
        "clipped pass": steps.clipped_pass,
        "Opacus pass": steps.opacus_pass,
        "plain step": steps.plain_step,
        "private step": steps.private_step,
        "Opacus step": steps.opacus_step,
    }
    dp_config = {"dataset_size": 10_000, "noise_multiplier": NOISE, "target_epsilon": 100.0, "max_grad_norm": CLIP}
    with (
        tempfile.TemporaryDirectory() as folder,
        ServiceClient({"state_dir": f"{folder}/state", "device": "cpu"}) as service,
    ):
        config = CONFIG | {"batch_size": chosen.rows}
        plain, private = (service.create_training_client(config | more) for more in ({}, {"dp_config": dp_config}))
        variants |= {"client, plain": lambda: client_step(plain, rows)}
        variants |= {"client, private": lambda: client_step(private, rows)}
        seconds = interleave(variants, repetitions=chosen.repetitions)
    finish(f"Privacy on {chosen.rows} x {chosen.tokens} tokens", seconds, RATIOS, out=chosen.out)


if __name__ == "__main__":
    main()
