"""What a cost benchmark compares: variants that are timed, ratios with their limits, figures and words beside them."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The median time of one variant over that of another."""

    what: str
    ours: str  # names of variants
    peer: str
    limit: float | None = None  # the largest acceptable ratio; None: informative


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A figure or a sentence that is not a ratio of times, found before the timing."""

    what: str
    value: float | str
    limit: float | None = None  # the largest acceptable value


@dataclass
class Compared:
    """One part of the benchmark, or several together."""

    variants: dict[str, Callable[[], object]] = field(default_factory=dict)
    ratios: list[Ratio] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)

    def add(self, other: "Compared") -> None:
        """Take over another part."""
        self.variants |= other.variants
        self.ratios += other.ratios
        self.facts += other.facts
