"""Captions to score: drawn scenes in ten languages, some of them right, some half right, some empty."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from inft.data.sample import scenes
from inft.data.scene_captions import GRAMMARS, caption

ROOT = Path(__file__).parents[3]


@dataclass(kw_only=True)
class Rows:
    """The arguments of score_captions."""

    captions: list[str] = field(default_factory=list)
    references: list[list[str]] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)

    def picked(self, indices: list[int]) -> "Rows":
        return Rows(
            captions=[self.captions[index] for index in indices],
            references=[self.references[index] for index in indices],
            languages=[self.languages[index] for index in indices],
        )

    def of(self, language: str) -> "Rows":
        return self.picked([index for index, code in enumerate(self.languages) if code == language])

    def args(self) -> tuple[list[str], list[list[str]], list[str]]:
        return self.captions, self.references, self.languages


def make_rows(seed: int = 0, *, each: int = 12) -> Rows:
    """Captions of each language in turn: about a third right, a third of another scene, the rest spoilt."""
    rng = Random(seed)
    shown = [scene.attributes for scene in scenes("train", rounds=1)]
    rows = Rows()
    for _ in range(each):
        for language in GRAMMARS:
            one, two, other = (caption(attributes, language) for attributes in rng.sample(shown, k=3))
            rows.captions.append(rng.choice([one, one, other, other, "", "A wrong language.", one[: len(one) // 2]]))
            rows.references.append([one, two] if rng.random() < 0.3 else [one])
            rows.languages.append(language)
    return rows


@pytest.fixture(scope="session")
def rows() -> Rows:
    return make_rows()


@pytest.fixture(scope="session")
def other_rows() -> Rows:
    """The same references, captioned by another system."""
    right = Rows(**vars(make_rows()))
    rng = Random(1)
    right.captions = [
        of_row[0] if rng.random() < 0.5 else caption
        for caption, of_row in zip(right.captions, right.references, strict=True)
    ]
    return right


@pytest.fixture(scope="session")
def words_by_hand(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], str]:
    """(language, text) -> words with spaces, straight from the libraries."""
    import jieba
    import MeCab
    import unidic_lite

    jieba.setLogLevel(logging.WARNING)
    jieba.dt.tmp_dir = str(tmp_path_factory.mktemp("jieba"))
    directory = unidic_lite.DICDIR
    tagger = MeCab.Tagger(f'-r "{os.path.join(directory, "mecabrc")}" -d "{directory}" -Owakati')

    def words(language: str, text: str) -> str:
        if language == "ja":
            return tagger.parse(text).strip()
        return " ".join(jieba.lcut(text)) if language in ("zh", "yue") else text

    return words
