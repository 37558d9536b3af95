"""The reward functions of REWARDS: each of one row alone, so that a batch changes nothing; values in [0, 1]."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from inft.evaluation.metrics.libraries import load_library
from inft.evaluation.metrics.script import expected_scripts, script_counts
from params.errors import UserError


def chrf(completions: Sequence[str], *, references: Sequence[str], **columns: Any) -> list[float]:
    """Return sacrebleu's sentence chrF with its defaults (Popović 2015), as a share of 100; 0 for an empty answer."""
    metric = _chrf_metric()
    return [
        float(metric.sentence_score(completion, [reference]).score) / 100
        for completion, reference in zip(completions, references, strict=True)
    ]


@cache
def _chrf_metric() -> Any:
    return load_library("sacrebleu.metrics").CHRF()


def exact(completions: Sequence[str], *, references: Sequence[str], **columns: Any) -> list[float]:
    """Return 1 where the answer is the reference but for spaces around it, else 0."""
    return [
        float(completion.strip() == reference.strip())
        for completion, reference in zip(completions, references, strict=True)
    ]


def length(completions: Sequence[str], *, references: Sequence[str], **columns: Any) -> list[float]:
    """Return the characters of the shorter of answer and reference, divided by those of the longer; 1 when both are 0.

    Spaces around a text do not count.
    """
    pairs = zip(completions, references, strict=True)
    sizes = [sorted((len(completion.strip()), len(reference.strip()))) for completion, reference in pairs]
    return [shorter / longer if longer else 1.0 for shorter, longer in sizes]


def language(
    completions: Sequence[str], *, languages: Sequence[str], references: Sequence[str] = (), **columns: Any
) -> list[float]:
    """Return the share of an answer's letters that are of a script of its language; 0 without letters.

    Languages of one script, such as en and fr, are not told apart. A language of unknown script has those of the
    row's reference. Errors: UserError when it has none either.
    """
    texts = references or [""] * len(completions)
    return [
        _in_script(completion, code, reference)
        for completion, code, reference in zip(completions, languages, texts, strict=True)
    ]


def _in_script(text: str, code: str, reference: str) -> float:
    expected = expected_scripts(code, [reference])
    if not expected:
        raise UserError(
            f"rl.rewards=language: the script of the language {code!r} is not known, and a row in it has no caption "
            "to see it from. Leave the language or the reward out."
        )
    counts = script_counts(text)
    return sum(counts[script] for script in expected) / counts.total() if counts else 0.0


def valid_json(completions: Sequence[str], **columns: Any) -> list[float]:
    """Return 1 where the whole answer is a JSON text (RFC 8259: NaN is none), else 0; spaces around it do not count."""
    return [float(_is_json(completion)) for completion in completions]


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(name)
