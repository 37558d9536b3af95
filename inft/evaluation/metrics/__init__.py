"""How good captions are: BLEU-4, chrF, CIDEr, exact match, length and script, per language, with intervals."""

from collections.abc import Mapping
from dataclasses import dataclass

ALL = "all"  # in the place of a language: all rows together


@dataclass(frozen=True, slots=True)
class Score:
    """A figure with its bootstrap 95 % interval; low and high equal the value where none was computed."""

    value: float
    low: float
    high: float


Scores = Mapping[str, Mapping[str, Score]]  # language, and ALL last -> metric -> score


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One of the figures."""

    title: str  # "BLEU-4"
    unit: str = ""  # "%" for shares, which are 0 to 100
    decimals: int = 1
    higher_is_better: bool | None = True  # None: neither

    def shown(self, value: float) -> str:
        """A value with its unit: "63.2", "35.0%"."""
        return f"{value:.{self.decimals}f}{self.unit}"


METRICS: Mapping[str, Metric] = {
    "bleu4": Metric(title="BLEU-4"),
    "chrf": Metric(title="chrF"),
    "cider": Metric(title="CIDEr"),  # × 100
    "exact": Metric(title="exact", unit="%"),
    "length_ratio": Metric(title="length ratio", decimals=2, higher_is_better=None),
    "wrong_script": Metric(title="wrong script", unit="%", higher_is_better=False),
}
