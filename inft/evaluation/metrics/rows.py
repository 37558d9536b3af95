"""What each row contributes to the figures: sacrebleu's statistics, CIDEr's score, exact match and script."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inft.evaluation.metrics import ALL
from inft.evaluation.metrics.libraries import load_library
from inft.evaluation.metrics.script import expected_scripts, in_wrong_script
from inft.evaluation.metrics.segment import check_segmenters, check_spaces, segmenter
from params.errors import UserError

# Columns of a matrix of row statistics. Everything in them is counted or averaged over rows.
BLEU = slice(0, 10)  # words of the caption, words of the closest reference, matching 1- to 4-grams, all 1- to 4-grams
CHRF = slice(10, 28)  # for n = 1 to 6: character n-grams of the caption, of the reference, matching ones
CIDER, EXACT, WRONG_SCRIPT = 28, 29, 30


@dataclass(frozen=True, kw_only=True)
class ScoredRows:
    """Captions with their references, segmented and counted; (N,) rows."""

    captions: list[str]  # segmented
    references: list[list[str]]  # segmented
    languages: list[str]
    statistics: np.ndarray  # (N, 31) float64; the column CIDER is filled for the rows that are scored together

    def groups(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each language, in order of first appearance, and ALL, with the indices of its rows."""
        codes = np.asarray(self.languages)
        for language in dict.fromkeys(self.languages):
            yield language, np.flatnonzero(codes == language)
        yield ALL, np.arange(len(codes))


def score_rows(
    captions: Sequence[str], references: Sequence[Sequence[str]], languages: Sequence[str], cjk_tokens: Sequence[str]
) -> ScoredRows:
    """Segment and count each row; blank references are none. Errors: as score_captions says."""
    texts = _with_text(captions, references, languages)
    check_languages(texts, languages, cjk_tokens)
    cut = {language: segmenter(language, cjk_tokens) for language in dict.fromkeys(languages)}
    words = [cut[language](caption) for language, caption in zip(languages, captions, strict=True)]
    reference_words = [
        [cut[language](text) for text in of_row] for language, of_row in zip(languages, texts, strict=True)
    ]
    bleu, chrf = sacrebleu_metrics()
    statistics = np.zeros((len(captions), WRONG_SCRIPT + 1))
    statistics[:, BLEU] = bleu._extract_corpus_statistics(words, _streams(reference_words))
    statistics[:, CHRF] = chrf._extract_corpus_statistics(captions, _streams(texts))
    statistics[:, EXACT] = [
        caption.strip() in {text.strip() for text in of_row} for caption, of_row in zip(captions, texts, strict=True)
    ]
    statistics[:, WRONG_SCRIPT] = _wrong_scripts(captions, texts, languages)
    return ScoredRows(captions=words, references=reference_words, languages=list(languages), statistics=statistics)


def check_languages(references: Sequence[Sequence[str]], languages: Sequence[str], cjk_tokens: Sequence[str]) -> None:
    """UserError for languages whose words cannot be told apart, and for one that is called as all of them are."""
    if ALL in languages:
        raise UserError(f"a row has the language {ALL!r}, which stands for all rows together: give it another code.")
    check_segmenters(cjk_tokens)
    check_spaces(references, languages, cjk_tokens)


def sacrebleu_metrics() -> tuple[Any, Any]:
    """Return sacrebleu's BLEU and chrF with its defaults."""
    metrics = load_library("sacrebleu.metrics")
    # force: no warning that captions look tokenised, as segmented ones do; it changes no score.
    return metrics.BLEU(force=True), metrics.CHRF()


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, np.ndarray]:
    """CIDEr (Vedantam et al. 2015) of segmented rows and of each of them, 0 to 10, by pycocoevalcap.

    Document frequencies are those of these references; tokens are what stands between spaces.
    """
    scorer = load_library("pycocoevalcap.cider.cider").Cider()
    expected = {index: list(of_row) for index, of_row in enumerate(references)}
    score, of_rows = scorer.compute_score(expected, {index: [caption] for index, caption in enumerate(captions)})
    return float(score), of_rows


def _with_text(
    captions: Sequence[str], references: Sequence[Sequence[str]], languages: Sequence[str]
) -> list[list[str]]:
    """The references of each row that have text; ValueError for arguments that do not fit together."""
    if not len(captions) == len(references) == len(languages):
        raise ValueError(
            f"{len(captions)} captions, references of {len(references)} rows and {len(languages)} languages: "
            "they must be as many as each other."
        )
    if not captions:
        raise ValueError("there are no rows to score.")
    for index, of_row in enumerate(references):
        if isinstance(of_row, str):
            raise ValueError(f"the references of row {index} are one string: give a sequence of strings.")
    texts = [[text for text in of_row if text.strip()] for of_row in references]
    for index, of_row in enumerate(texts):
        if not of_row:
            raise ValueError(f"row {index} has no reference with text: leave it out.")
    return texts


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References as sacrebleu takes them: the first of every row, the second of every row, … None where a row ends."""
    most = max(len(of_row) for of_row in references)
    return [[of_row[place] if place < len(of_row) else None for of_row in references] for place in range(most)]


def _wrong_scripts(
    captions: Sequence[str], references: Sequence[Sequence[str]], languages: Sequence[str]
) -> list[bool]:
    texts: dict[str, list[str]] = {language: [] for language in languages}
    for language, of_row in zip(languages, references, strict=True):
        texts[language].extend(of_row)
    expected = {language: expected_scripts(language, of) for language, of in texts.items()}
    return [
        in_wrong_script(caption, of_row, expected[language])
        for caption, of_row, language in zip(captions, references, languages, strict=True)
    ]
