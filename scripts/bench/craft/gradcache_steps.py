"""Contrastive steps over 256 pairs: GradCache in chunks of 8, the full batch at once, and other libraries' GradCache.

GradCache runs every chunk but the last forward twice, so that on rows of equal length it does 8/6 of the full batch's
arithmetic (forward 2, backward 4): no implementation gets below 1.33 there but by smaller tensors staying in the cache,
and the figure has no limit. On rows of many lengths it sorts them, cuts each chunk to its longest row, and saves more
padding than it computes twice.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from compared import Compared, Fact, Ratio
from pair_model import CHUNK, LENGTHS, PAIRS, TEMPERATURE, Side, new_encoder, new_head, random_pairs
from safetensors.torch import load_file
from served import Peer
from torch import Tensor, nn

from craft.gradcache import GradCacheConfig, GradCacheContrastiveLoss
from craft.losses import info_nce
from craft.pooling import pool_hidden_states

SCALE = 1024.0  # of the outer loss: a power of two, so that gradients are equal to the bit

Gradients = dict[str, Tensor]


def mean_pooled(hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    return pool_hidden_states(hidden_BTH, mask_BT, "mean")


class Pairs:
    """Encoder, head and the two ways to take their gradients on a batch of pairs."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.encoder: nn.Module = new_encoder().to(dtype)
        self.head = new_head().to(dtype)
        self.cached = GradCacheContrastiveLoss(
            self.encoder, self.head, mean_pooled, GradCacheConfig(chunk_size=CHUNK, temperature=TEMPERATURE)
        )

    def gradcache(self, sides: list[Side], scale: float = 1.0) -> float:
        """Loss and gradients through the public class."""
        return self._step(lambda: self.cached(*sides[0].values(), *sides[1].values()), scale)

    def full(self, sides: list[Side], scale: float = 1.0) -> float:
        """The same of the whole batch at once, as without GradCache."""
        return self._step(lambda: self._full(sides), scale)

    def _full(self, sides: list[Side]) -> Tensor:
        anchors_BD, positives_BD = (
            F.normalize(self.head(mean_pooled(self.encoder(**side).last_hidden_state, side["attention_mask"])), dim=-1)
            for side in sides
        )
        return info_nce(anchors_BD, positives_BD, temperature=TEMPERATURE).losses_B.mean()

    def _step(self, loss_of: Callable[[], Tensor], scale: float) -> float:
        self.cached.zero_grad(set_to_none=True)
        loss = loss_of()
        (loss * scale).backward()
        return float(loss.detach())

    def gradients(self) -> Gradients:
        """Gradients by the names encoder.… and head.…."""
        parts = (("encoder", self.encoder), ("head", self.head))
        named = {f"{part}.{name}": p for part, module in parts for name, p in module.named_parameters()}
        return {name: weight.grad.clone() for name, weight in named.items() if weight.grad is not None}


def gradcache(directory: Path, peer: Peer | None) -> Compared:
    """GradCache against the full batch and, with ``peer``, against sentence-transformers."""
    pairs = Pairs()
    batches = {name: random_pairs(PAIRS, lengths) for name, lengths in LENGTHS.items()}
    found = Compared(facts=[*errors(batches["ragged"]), *memory()])
    for name, sides in batches.items():
        ours, full, theirs = (f"{library}, {name}" for library in ("GradCache", "full batch", "sentence-transformers"))
        found.variants |= {ours: lambda s=sides: pairs.gradcache(s), full: lambda s=sides: pairs.full(s)}
        ragged = name == "ragged"
        rows = "rows of 4 to 32 tokens" if ragged else "rows of 18 tokens"
        what = f"GradCache over the full batch, {PAIRS} pairs, chunks of {CHUNK}, {rows}"
        found.ratios.append(Ratio(what=what, ours=ours, peer=full, limit=1.30 if ragged else None))
        if peer is not None:
            number = check_peer(pairs, sides, peer, name, directory)
            found.variants[theirs] = lambda n=name: peer.ask("step", batch=n)
            what = f"GradCache over sentence-transformers {number}'s cached loss, {rows}"
            found.ratios.append(Ratio(what=what, ours=ours, peer=theirs, limit=1.0 if ragged else None))
    return found


def errors(sides: list[Side]) -> list[Fact]:
    """How far GradCache's float32 gradients are from those of the full batch in float64, relative to their norm."""
    exact, pairs = Pairs(torch.float64), Pairs()
    exact.full(sides)
    wanted = exact.gradients()
    pairs.full(sides)
    at_once = pairs.gradients()
    pairs.gradcache(sides)
    once = pairs.gradients()
    pairs.gradcache(sides, SCALE)
    scaled = {name: gradient / SCALE for name, gradient in pairs.gradients().items()}
    found = []
    for part, prefix in (("backbone", "encoder."), ("head", "head.")):
        own = distance(at_once, wanted, prefix)
        what = f"GradCache's gradient error in float32, {part} (the full batch's own is {own:.1g})"
        found.append(Fact(what=what, value=distance(once, wanted, prefix), limit=1e-6))
    change = Fact(
        what=f"change of the gradient under an outer scale of {SCALE:g}", value=distance(scaled, once), limit=0
    )
    return [*found, change]


def distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], prefix: str = "") -> float:
    """‖found - wanted‖ / ‖wanted‖ over all gradients whose name begins with ``prefix``."""
    assert found.keys() == wanted.keys(), "other parameters have gradients"
    names = [name for name in wanted if name.startswith(prefix)]
    off = sum(float((found[name].double() - wanted[name].double()).square().sum()) for name in names)
    return float((off / sum(float(wanted[name].double().square().sum()) for name in names)) ** 0.5)


def memory() -> list[Fact]:
    """Bytes that a step holds at its peak, with 64 and with 256 pairs."""
    from harness import peak_bytes  # cost.py has put it within reach by now

    pairs = Pairs()
    few, many = (random_pairs(count, LENGTHS["ragged"]) for count in (PAIRS // 4, PAIRS))
    steps = {
        "few": lambda: pairs.gradcache(few),
        "many": lambda: pairs.gradcache(many),
        "full": lambda: pairs.full(many),
    }
    peaks = {}
    for name, step in steps.items():
        pairs.cached.zero_grad(set_to_none=True)  # gradients count
        peaks[name] = peak_bytes(step)
    words = f"GradCache {peaks['many'] / 2**20:.0f} MB, full batch {peaks['full'] / 2**20:,.0f} MB"
    what = f"GradCache's peak memory with {PAIRS} pairs over {PAIRS // 4}, gradients included"
    return [
        Fact(what=what, value=peaks["many"] / peaks["few"], limit=1.1),
        Fact(what=f"peak memory with {PAIRS} pairs", value=words),
    ]


def check_peer(pairs: Pairs, sides: list[Side], peer: Peer, name: str, directory: Path) -> str:
    """Loss and gradients of the peer are ours; returns its version."""
    ours = pairs.gradcache(sides)
    file = directory / f"{name}.gradients"
    answer = peer.ask("gradients", batch=name, to=str(file))
    torch.testing.assert_close(ours, answer["loss"], rtol=1e-5, atol=0)
    off = distance(load_file(file), pairs.gradients())
    assert off < 1e-5, f"the peer's gradients differ by {off:.1e}"
    return str(answer["version"])


def published(peer: Peer) -> Compared:
    """contrastive-ft on the ragged pairs: what its backward pass leaves out makes its time no peer."""
    pairs = Pairs()
    pairs.full(random_pairs(PAIRS, LENGTHS["ragged"]))
    encoder = [gradient for name, gradient in pairs.gradients().items() if name.startswith("encoder.")]
    exact = float(torch.stack([gradient.double().norm() for gradient in encoder]).norm())
    norms, queue = peer.ask("norms", batch="ragged"), peer.ask("queue")
    library = f"contrastive-ft {norms['version']}"
    failed = f"step {queue['failed_at']} fails: {queue['error']}" if queue["failed_at"] else "runs"
    return Compared(
        variants={f"{library}'s GradCache, {PAIRS} pairs, ragged": lambda: peer.ask("step", batch="ragged")},
        facts=[
            Fact(
                what=f"{library}: gradient norm that its GradCache brings to the backbone",
                value=f"{norms['backbone']:.2f}; exact {exact:.2f}",
            ),
            Fact(what=f"{library}: InfoNCE with its queue, in the order of its trainer", value=failed),
        ],
    )
