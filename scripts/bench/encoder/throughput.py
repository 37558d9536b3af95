"""Training throughput in real tokens: padded, bucketed, packed and flat, against transformers' ModernBERT.

    python scripts/bench/encoder/throughput.py [--lengths short medium] [--documents 64] [--sparse]

One thread, forward and backward of a masked-LM loss over the same documents in micro-batches of 16. NeoBERT takes
padding out by itself; in "padded" and "bucketed" it gets padding as if it were text, which costs what it would in an
encoder that does not. ModernBERT is as it comes, with a batch padded to its longest document and logits of all
positions; --sparse lets it make those of the masked positions alone. Before anything is timed, losses and gradients
of the flat, packed and padded layouts must agree.
"""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from documents import CONTEXT, LENGTHS, draw, modernbert, neobert, packed, padded, rows_of
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import interleave, parser, report

from inft.encoders.data.flat import flatten
from inft.encoders.data.packing import Piece
from inft.encoders.objective import masked_lm_loss

LIMITS = {"short": 1 / 3, "medium": 1 / 1.7}
PEER = "ModernBERT"

Step = Callable[[], float]


def step_of(model: nn.Module, batches: Sequence[Any], loss_of: Callable[[Any], Tensor]) -> Step:
    """Forward and backward of all batches, the gradients added up; returns the summed loss."""

    def step() -> float:
        model.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches:
            loss = loss_of(batch)
            loss.backward()
            total += float(loss.detach())
        return total

    return step


def variants(model: nn.Module, peer: nn.Module, pieces: Sequence[Piece]) -> dict[str, Step]:
    def of_rows(rows: Mapping[str, Tensor]) -> Tensor:
        return model(rows["input_ids"], labels=rows["labels"], masked_only=True, reduction="sum").loss

    def of_stream(batch: Any) -> Tensor:
        return masked_lm_loss(model, batch).loss_sum

    by_length = sorted(pieces, key=len)
    return {
        f"padded to {CONTEXT}": step_of(model, [padded(rows, CONTEXT) for rows in rows_of(pieces)], of_rows),
        "bucketed": step_of(model, [padded(rows) for rows in rows_of(by_length)], of_rows),
        "packed": step_of(model, packed(pieces), of_stream),
        "flat": step_of(model, [flatten(rows) for rows in rows_of(pieces)], of_stream),
        PEER: step_of(peer, [padded(rows) for rows in rows_of(pieces)], lambda rows: peer(**rows).loss),
    }


def check_equal(model: nn.Module, pieces: Sequence[Piece]) -> None:
    """Loss and gradients are the same in the flat, the packed and the padded layout."""
    pieces = pieces[:32]
    masked = {
        "flat": step_of(
            model, [flatten(rows) for rows in rows_of(pieces)], lambda x: masked_lm_loss(model, x).loss_sum
        ),
        "packed": step_of(model, packed(pieces), lambda x: masked_lm_loss(model, x).loss_sum),
        "padded": step_of(
            model,
            [padded(rows) for rows in rows_of(pieces)],
            lambda x: model(**x, masked_only=True, reduction="sum").loss,
        ),
    }
    losses, gradients = {}, {}
    for name, step in masked.items():
        losses[name] = step()
        gradients[name] = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    for name in ("packed", "padded"):
        torch.testing.assert_close(losses[name], losses["flat"], rtol=1e-5, atol=0)
        distance = (gradients[name] - gradients["flat"]).norm() / gradients["flat"].norm()
        assert distance < 1e-5, f"gradients, {name}: {distance}"


def main() -> None:
    """Check equality, then time every layout of each distribution of lengths."""
    options = parser(__doc__, repetitions=3)
    options.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    options.add_argument("--documents", type=int, default=64, help="documents that a timed run goes over")
    options.add_argument("--sparse", action="store_true", help="ModernBERT makes logits of masked positions alone")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    model, peer = neobert(), modernbert()
    peer.sparse_prediction = chosen.sparse
    sizes = [network.num_parameters() for network in (model, peer)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02, f"other sizes: {sizes}"
    for lengths in chosen.lengths:
        pieces = draw(chosen.documents, lengths)
        tokens = sum(map(len, pieces))
        check_equal(model, pieces)
        seconds = interleave(variants(model, peer, pieces), repetitions=chosen.repetitions)
        for name, values in seconds.items():
            print(f"{lengths}, {name}: {tokens / statistics.median(values):.0f} real tokens per CPU-second")
        title = f"encoder training, {lengths} documents (mean {tokens / len(pieces):.0f} tokens)"
        title += ", ModernBERT with sparse prediction" * chosen.sparse
        report(title, seconds, ours="flat", peer=PEER, limit=1.0 if chosen.sparse else LIMITS[lengths], out=chosen.out)


if __name__ == "__main__":
    main()
