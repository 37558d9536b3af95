"""The ranges of the fields, written next to them: ``lr: Positive = 1.5e-4``."""

from typing import Annotated, NamedTuple


class Bounds(NamedTuple):
    """An interval that a number must lie in; NaN lies in none."""

    low: float
    high: float = float("inf")
    low_included: bool = True
    high_included: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value lies in the interval."""
        above = value >= self.low if self.low_included else value > self.low
        below = value <= self.high if self.high_included else value < self.high
        return above and below

    @property
    def words(self) -> str:
        """The interval for a message: "at least 0 and below 1"."""
        low = f"{'at least' if self.low_included else 'above'} {_figure(self.low)}"
        if self.high == float("inf"):
            return low
        return f"{low} and {'at most' if self.high_included else 'below'} {_figure(self.high)}"


def _figure(number: float) -> str:
    """Whole numbers in full: "4,294,967,296"."""
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


Positive = Annotated[float, Bounds(0, low_included=False)]
NonNegative = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, 1, high_included=True)]
PartialShare = Annotated[float, Bounds(0, 1)]
PositiveShare = Annotated[float, Bounds(0, 1, low_included=False, high_included=True)]
Ratio = Annotated[float, Bounds(1)]
Count = Annotated[int, Bounds(1)]
CountOrZero = Annotated[int, Bounds(0)]
TokenLimit = Annotated[int, Bounds(32)]
Seed = Annotated[int, Bounds(0, 2**32)]  # what numpy takes
