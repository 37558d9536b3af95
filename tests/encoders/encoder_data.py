"""Drawn sentences in several scripts, a tiny WordPiece tokenizer and the files that encoder tests read."""

import json
import random
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_SENTENCES = {
    "en": "the red boat river old man walks dog home under quiet evening sky and finds a small golden key",
    "de": "der alte Mann geht mit seinem Hund nach Hause und sieht das rote Boot auf dem Fluss am Abend",
    "fr": "la fille lit un livre près de la fenêtre pendant que le chat dort sur le tapis bleu",
    "ru": "старый дом стоит у реки где дети играют вечером под большим зелёным деревом",
    "el": "το παιδί τρέχει στην αυλή και η γάτα κοιμάται κάτω από το τραπέζι",
    "ar": "الولد يقرأ كتابا جديدا في البيت الكبير قرب النهر",
    "hi": "लड़का नदी के पास पुराने घर में किताब पढ़ता है",
    "zh": "老人 在 河 边 慢慢 走 看见 红色 的 船",
}
WORDS = {language: sentence.split() for language, sentence in _SENTENCES.items()}
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def sentences(count: int, seed: int = 0, *, words: tuple[int, int] = (3, 14)) -> list[str]:
    """Sentences of ``words`` words, languages in turn; each differs from all others of the same call."""
    draw = random.Random(seed)
    languages = list(WORDS)
    return [
        " ".join([*draw.choices(WORDS[languages[i % len(languages)]], k=draw.randint(*words)), str(i)])
        for i in range(count)
    ]


def language_of(index: int) -> str:
    """The language of sentence ``index``."""
    return list(WORDS)[index % len(WORDS)]


def make_tokenizer(
    directory: Path | None = None, vocab_size: int = 200, *, mask: bool = True
) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of at most ``vocab_size`` tokens (90 or more); saved when told where."""
    special = {role: token for role, token in SPECIAL.items() if mask or role != "mask"}
    tokenizer = Tokenizer.from_str(_trained(vocab_size, tuple(special.values())))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{role}_token": token for role, token in special.items()}
    )
    if directory is not None:
        fast.save_pretrained(str(directory))
    return fast


@lru_cache(maxsize=8)
def _trained(vocab_size: int, special: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        limit_alphabet=max(20, vocab_size // 4),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(400, seed=99), trainer)
    cls, sep = SPECIAL["cls"], SPECIAL["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B {sep}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    return tokenizer.to_str()


def write_jsonl(path: Path, texts: Iterable[Any], *, column: str = "text", **columns: Sequence[Any]) -> Path:
    """Write one row a line: ``text`` and, of each further column, its value; the directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{column: text, **{name: values[i] for name, values in columns.items()}} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, texts: Iterable[Any], *, column: str = "text", **columns: Sequence[Any]) -> Path:
    """The same as a parquet file of several row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({column: list(texts), **{name: list(values) for name, values in columns.items()}})
    pq.write_table(table, path, row_group_size=max(1, len(table) // 3))
    return path
