"""Words of captions in languages that write no spaces between them: zh and yue by jieba, ja by MeCab."""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from inft.evaluation.metrics.libraries import load_library
from inft.evaluation.metrics.script import CJK, base_code, script_counts
from params.errors import UserError

Words = Callable[[str], list[str]]
WITHOUT_SPACES = frozenset({CJK, "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"})


def segmenter(language: str, cjk_tokens: Sequence[str]) -> Callable[[str], str]:
    """Return what turns a text into its words with spaces between them; the text itself outside of cjk_tokens.

    Errors: UserError for a language of cjk_tokens that no segmenter knows and for a library that is not installed.
    """
    check_segmenters(cjk_tokens)
    if language not in cjk_tokens:
        return lambda text: text
    words = SEGMENTERS[base_code(language)]()
    return lambda text: " ".join(word for word in words(text) if not word.isspace())


def check_segmenters(cjk_tokens: Sequence[str]) -> None:
    """UserError naming the first language of data.cjk_tokens that no segmenter knows."""
    for language in cjk_tokens:
        if base_code(language) not in SEGMENTERS:
            raise UserError(
                f"data.cjk_tokens names {language!r}, and no segmenter knows it. Known are {', '.join(SEGMENTERS)}, "
                "also with a region such as zh-TW: --set data.cjk_tokens=ja,zh,yue"
            )


def check_spaces(references: Sequence[Sequence[str]], languages: Sequence[str], cjk_tokens: Sequence[str]) -> None:
    """UserError when a language's references are mostly in a script without spaces and cjk_tokens lacks the language.

    Whole sentences would count as one word in BLEU and CIDEr.
    """
    texts: defaultdict[str, list[str]] = defaultdict(list)
    for language, of_row in zip(languages, references, strict=True):
        if language not in cjk_tokens:
            texts[language].extend(of_row)
    glued = {language: scripts for language, of in texts.items() if (scripts := _scripts_without_spaces(of))}
    for language, scripts in glued.items():
        problem = (
            f"the references in {language!r} have no spaces between words ({', '.join(sorted(scripts))}), "
            "so whole sentences would count as one word."
        )
        if base_code(language) not in SEGMENTERS:
            raise UserError(
                f"{problem} No segmenter knows {language!r} (known: {', '.join(SEGMENTERS)}): "
                "leave it out of data.languages, with --languages."
            )
        known = (*cjk_tokens, *(code for code in glued if base_code(code) in SEGMENTERS))
        raise UserError(f"{problem} Segment them: --set data.cjk_tokens={','.join(known)}")


def _scripts_without_spaces(texts: Sequence[str]) -> set[str]:
    """The scripts without spaces of the texts when they hold more than half of the letters, else none."""
    counts = script_counts("".join(texts))
    glued = {script for script in counts if script in WITHOUT_SPACES}
    return glued if 2 * sum(counts[script] for script in glued) > counts.total() else set()


@cache
def _jieba() -> Words:
    """jieba.lcut with its own dictionary, which is read here instead of from a cache file in a shared folder."""
    tokenizer = load_library("jieba").Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    words: Words = tokenizer.lcut
    return words


@cache
def _mecab() -> Words:
    """MeCab with unidic-lite, whatever other dictionary is installed."""
    mecab, directory = load_library("MeCab"), load_library("unidic_lite").DICDIR
    tagger = mecab.Tagger(f'-r "{os.path.join(directory, "mecabrc")}" -d "{directory}" -Owakati')

    def words(text: str) -> list[str]:
        # A C string ends at NUL and must be valid UTF-8.
        found: str = tagger.parse(text.replace("\0", " ").encode("utf-8", "replace").decode())
        return found.split()

    return words


# base code of a language -> its segmenter
SEGMENTERS: Mapping[str, Callable[[], Words]] = {
    "ja": _mecab,
    "jpn": _mecab,
    "zh": _jieba,
    "zho": _jieba,
    "cmn": _jieba,
    "yue": _jieba,
    "wuu": _jieba,
    "lzh": _jieba,
}
