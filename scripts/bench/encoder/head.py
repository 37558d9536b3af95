"""The masked-LM head: logits of the masked positions alone against logits of all, in time and in memory.

    python scripts/bench/encoder/head.py

One thread, a step (forward and backward) of 6 layers of 384 over 16 x 256 tokens of which 15 % are predicted, with a
vocabulary of 30,528. Losses and gradients must agree before the ways are timed. Memory is what torch's allocator holds
at most during forward and backward of the head alone, gradients included, beyond what it held before.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from documents import CONTEXT, ROWS, draw, neobert
from rich.console import Console
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import interleave, parser, peak_bytes, report

from inft.encoders.data.flat import FlatBatch, flatten
from inft.encoders.objective import masked_lm_loss
from inft.models.masked_lm import full_loss, masked_loss
from inft.models.neobert import NeoBERTForMaskedLM

TIME_LIMIT, MEMORY_LIMIT = 1 / 1.7, 1 / 5
WAYS = {
    "full logits": {"masked_only": False, "fused": "off"},
    "masked only": {"fused": "off"},
    "fused, torch": {"fused": "torch"},
}


def body(model: NeoBERTForMaskedLM, batch: FlatBatch) -> None:
    """A step without any head, for the share that the head has."""
    model.zero_grad(set_to_none=True)
    model.model(batch.input_ids_T, cu_seqlens=batch.cu_seqlens).last_hidden_state.sum().backward()


def step(model: NeoBERTForMaskedLM, batch: FlatBatch, way: str) -> float:
    model.zero_grad(set_to_none=True)
    loss = masked_lm_loss(model, batch, **WAYS[way]).loss_sum
    loss.backward()
    return float(loss.detach())


def check_equal(model: NeoBERTForMaskedLM, batch: FlatBatch) -> None:
    losses, gradients = {}, {}
    for way in WAYS:
        losses[way] = step(model, batch, way)
        gradients[way] = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    for way in WAYS:
        torch.testing.assert_close(losses[way], losses["full logits"], rtol=1e-5, atol=0)
        distance = (gradients[way] - gradients["full logits"]).norm() / gradients["full logits"].norm()
        assert distance < 1e-5, f"gradients, {way}: {distance}"


def head_bytes(model: NeoBERTForMaskedLM, batch: FlatBatch, way: str) -> int:
    hidden_TH = torch.randn(batch.tokens, model.config.hidden_size, requires_grad=True)
    masked_M = (batch.labels_T != -100).nonzero().squeeze(1)
    options = WAYS[way]

    def run() -> Tensor:
        if not options.get("masked_only", True):
            return full_loss(model.decoder(hidden_TH), batch.labels_T, masked_M, reduction="sum")[0]
        return masked_loss(model.decoder, hidden_TH, batch.labels_T, masked_M, fused=options["fused"], reduction="sum")[
            0
        ]

    model.zero_grad(set_to_none=True)
    return peak_bytes(lambda: run().backward())


def main() -> None:
    """Check equality, then measure memory and time."""
    chosen = parser(__doc__, repetitions=5).parse_args()
    torch.set_num_threads(1)
    model, batch = neobert(), flatten(draw(ROWS, CONTEXT))
    check_equal(model, batch)
    peaks = {way: head_bytes(model, batch, way) for way in WAYS}
    for way, peak in peaks.items():
        Console().print(f"head memory, {way}: {peak / 2**20:,.0f} MB, {peak / peaks['full logits']:.3f} of full logits")
    calls: dict[str, Callable[[], object]] = {"no head": lambda: body(model, batch)}
    calls |= {way: lambda way=way: step(model, batch, way) for way in WAYS}
    seconds = interleave(calls, repetitions=chosen.repetitions)
    if peaks["masked only"] > MEMORY_LIMIT * peaks["full logits"]:
        raise SystemExit(f"head memory, masked only: above {MEMORY_LIMIT:.2f} of full logits")
    title = f"encoder step, {ROWS} x {CONTEXT} tokens, {batch.masked} predicted"
    report(title, seconds, ours="masked only", peer="full logits", limit=TIME_LIMIT, out=chosen.out)


if __name__ == "__main__":
    main()
