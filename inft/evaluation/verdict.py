"""What the figures of forgetting amount to: lost, worse or kept, by one rule and in one wording."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from inft.evaluation.metrics import ALL, METRICS, Metric, Score, Scores
from inft.evaluation.records import Forgetting

JUDGE = "chrf"  # the metric by which a language counts as lost, worse or kept
MINUS = "−"
UNKNOWN = "–"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one adapter forgot of what its base could do."""

    label: str  # of the adapter
    forgetting: Forgetting

    @property
    def languages(self) -> Sequence[str]:
        """Codes in the order of the scores, without ALL."""
        return [language for language in self.forgetting.base if language != ALL]

    @property
    def lost(self) -> Sequence[str]:
        """Languages that the base could do and the adapter cannot: it scores no more than with others' inputs."""
        adapter, shuffled = self.forgetting.adapter, self.forgetting.adapter_shuffled
        return [
            language
            for language in self.worse_or_lost
            if adapter[language][JUDGE].value <= shuffled[language][JUDGE].high
        ]

    @property
    def worse(self) -> Sequence[str]:
        """Languages that the base could do, which the adapter still can, but not as well."""
        return [language for language in self.worse_or_lost if language not in self.lost]

    @property
    def kept(self) -> Sequence[str]:
        """Languages that the base could do and in which no fall shows beyond chance."""
        return [language for language in self.forgetting.could_do if language not in self.worse_or_lost]

    @property
    def worse_or_lost(self) -> Sequence[str]:
        """Languages that the base could do and in which the whole interval of the difference is below zero."""
        difference = self.forgetting.difference
        return [language for language in self.forgetting.could_do if difference[language][JUDGE].high < 0]

    @property
    def sentences(self) -> Sequence[str]:
        """The finding in plain words, the losses first."""
        could = len(self.forgetting.could_do)
        if could == 0:
            return [
                f"{self.label}: in no language do the base's captions of these {self.forgetting.rows:,} rows follow "
                "the input beyond chance, so nothing can be said to be forgotten."
            ]
        counted = f"{len(self.lost)} of the {could} languages that the base could do"
        if could == 1:
            counted = "the one language that the base could do" if self.lost else "no language that the base could do"
        found = [f"{self.label} lost {counted}{self._figures(self.lost)}."]
        if self.worse:
            found.append(f"It is worse than the base in {len(self.worse)}{self._figures(self.worse)}.")
        if self.kept:
            found.append(f"It kept {len(self.kept)}{self._figures(self.kept)}.")
        return found

    def _figures(self, languages: Sequence[str]) -> str:
        """ ": chrF en 99.1 → 2.3 (−96.8, −97.5 to −96.0); fr …"; nothing without languages."""
        metric, of = METRICS[JUDGE], self.forgetting
        found = []
        for language in languages:
            before, after, by = (scores[language][JUDGE] for scores in (of.base, of.adapter, of.difference))
            values = f"{figure(before.value, metric)} → {figure(after.value, metric)}"
            found.append(f"{language} {values} ({_difference(by, metric)})")
        return f": {metric.title} {'; '.join(found)}" if found else ""


def could_do(base: Scores, shuffled: Scores) -> tuple[str, ...]:
    """The languages in which the base's captions follow the input."""
    return tuple(language for language in base if language != ALL and follows(base, shuffled, language))


def follows(scores: Scores, shuffled: Scores, language: str) -> bool:
    """Whether captions follow the input: above what they score with other rows' inputs, intervals and all."""
    return scores[language][JUDGE].low > shuffled[language][JUDGE].high


def figure(value: float, metric: Metric, *, signed: bool = False) -> str:
    """A value as its metric is shown, with a real minus; a dash where it is not a number."""
    if math.isnan(value):
        return UNKNOWN
    text = metric.shown(abs(value))
    sign = MINUS if value < 0 and text.strip("0.%") else "+" if signed and text.strip("0.%") else ""
    return f"{sign}{text}"


def interval(score: Score, metric: Metric, *, signed: bool = False) -> str:
    """The 95 % interval of a score, "43.1 to 47.0"; nothing where none was computed."""
    if score.low == score.high or math.isnan(score.low):
        return ""
    return f"{figure(score.low, metric, signed=signed)} to {figure(score.high, metric, signed=signed)}"


def _difference(score: Score, metric: Metric) -> str:
    """ "−96.8, −97.5 to −96.0"."""
    between = interval(score, metric)
    return figure(score.value, metric) + (f", {between}" if between else "")
