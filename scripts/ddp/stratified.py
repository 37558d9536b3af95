"""Which pairs a run takes: every pair once, and a sample that keeps the shares of its strata."""

import hashlib
import heapq
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
Stratum = tuple[str, str]  # source and language


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPair:
    """Two texts that mean the same, and if there is one a text that does not."""

    source: str
    language: str  # "eng_Latn"; of parallel text "eng_Latn-sin_Sinh"; "" where it is not told
    text: str
    text_tgt: str
    text_neg: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """A row that gives no pair."""

    source: str
    language: str
    reason: str


@dataclass(kw_only=True)
class Selected:
    """The pairs that were taken, in the order in which a run sees them before it shuffles, and how that came."""

    pairs: list[TextPair] = field(default_factory=list)
    usable: Counter[Stratum] = field(default_factory=Counter)
    kept: Counter[Stratum] = field(default_factory=Counter)
    left_out: dict[Stratum, Counter[str]] = field(default_factory=dict)  # by reason


def quotas(sizes: Mapping[K, int], limit: int) -> dict[K, int]:
    """Return how many of ``limit`` rows each stratum gives, in proportion to its size.

    Largest remainder (Hamilton's method): shares are rounded down, and what is missing goes to the largest fractions,
    of equal ones to the first. The quotas add up to min(limit, rows), none exceeds its stratum, and each is within
    one row of its share.
    """
    total = sum(sizes.values())
    if limit >= total:
        return dict(sizes)
    found = {name: size * limit // total for name, size in sizes.items()}
    by_fraction = sorted(sizes, key=lambda name: -(sizes[name] * limit % total))  # stable: ties keep their order
    for name in by_fraction[: limit - sum(found.values())]:
        found[name] += 1
    return found


def select(rows: Iterable[TextPair | LeftOut], *, limit: int | None, seed: int) -> Selected:
    """Return a random sample of the pairs, at most ``limit`` of them, stratified by source and language.

    Empty texts, pairs of one text twice and pairs that were there before are left out. A pair's place is a hash of its
    texts and the seed: the sample does not depend on the order of the rows, and the memory for a stream of any length
    is that of ``limit`` pairs a stratum and of a hash for each pair.
    """
    found = Selected()
    heaps: dict[Stratum, list[_Ranked]] = {}
    seen: set[int] = set()
    for row in rows:
        stratum = row.source, row.language
        reason = row.reason if isinstance(row, LeftOut) else _unusable(row)
        if isinstance(row, TextPair) and reason is None:
            key = _key(row, seed)
            if key not in seen:
                seen.add(key)
                found.usable[stratum] += 1
                _keep(heaps.setdefault(stratum, []), _Ranked(key, row), limit)
                continue
            reason = "seen before"
        found.left_out.setdefault(stratum, Counter())[str(reason)] += 1
    _take(found, heaps, limit)
    return found


class _Ranked:
    """A pair with its place; the smallest of a heap is the one with the highest key, the first to go."""

    __slots__ = ("key", "pair")

    def __init__(self, key: int, pair: TextPair) -> None:
        self.key, self.pair = key, pair

    def __lt__(self, other: "_Ranked") -> bool:
        return self.key > other.key


def _unusable(pair: TextPair) -> str | None:
    if not pair.text.strip() or not pair.text_tgt.strip():
        return "empty text"
    return "equal texts" if pair.text.strip() == pair.text_tgt.strip() else None


def _key(pair: TextPair, seed: int) -> int:
    """A number below 2**128 that depends on the texts and the seed alone, in every process."""
    words = "\x1f".join((str(seed), pair.text, pair.text_tgt)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(words, digest_size=16).digest(), "big")


def _keep(heap: list[_Ranked], ranked: _Ranked, limit: int | None) -> None:
    if limit is None or len(heap) < limit:
        heapq.heappush(heap, ranked)
    else:
        heapq.heappushpop(heap, ranked)


def _take(found: Selected, heaps: Mapping[Stratum, list[_Ranked]], limit: int | None) -> None:
    sizes = {stratum: found.usable[stratum] for stratum in sorted(found.usable)}
    share = quotas(sizes, sum(sizes.values()) if limit is None else limit)
    taken: list[_Ranked] = []
    for stratum, heap in heaps.items():
        taken += sorted(heap, key=lambda ranked: ranked.key)[: share[stratum]]
        found.kept[stratum] = share[stratum]
    found.pairs = [ranked.pair for ranked in sorted(taken, key=lambda ranked: ranked.key)]
