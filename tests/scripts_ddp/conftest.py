"""scripts/ddp on the path of imports, and small files with the columns of the real sources."""

import csv
import gzip
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "ddp"
sys.path.insert(0, str(SCRIPTS))

LANGUAGES = ("eng_Latn", "sin_Sinh", "urd_Arab")
WORDS = ("red", "green", "blue", "circle", "square", "big", "small", "two", "three", "line")


def words(*numbers: int) -> str:
    """A text that differs for different numbers."""
    return " ".join(WORDS[digit % 10] for number in numbers for digit in (number, number // 10, number // 100))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([list(header), *rows])
    return path


@pytest.fixture(scope="session")
def jsonl() -> Callable[..., Path]:
    return write_jsonl


@pytest.fixture(scope="session")
def table() -> Callable[..., Path]:
    """table(path, header, rows) writes a CSV or TSV file."""
    return write_csv


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each source with the columns of its release, and SFT rows."""
    root = tmp_path_factory.mktemp("sources")
    flores = [
        {
            "id": number,
            "iso_639_3": language[:3],
            "iso_15924": language[4:],
            "glottocode": "stan1293",
            "text": f"{language[:3]} {words(number)}",
            "split": "dev" if number < 25 else "devtest",
        }
        for language in LANGUAGES
        for number in range(30)
    ]
    nllb = root / "eng_Latn-sin_Sinh.gz"
    with gzip.open(nllb, "wt", encoding="utf-8") as file:
        for number in range(40):
            score = 1.445 - 0.01 * number
            fields = (words(number, 3), words(number, 7), f"{score:.3f}", "1.0", "0.9", "crawl", "_", "crawl", "_")
            file.write("\t".join(fields) + "\n")
    return {
        "sft": write_jsonl(
            root / "sft.jsonl",
            [{"prompt": f"Say {words(n)}:", "completion": f" {words(n + 1)}"} for n in range(40)],
        ),
        "flores": write_jsonl(root / "flores.jsonl", flores),
        "nllb": nllb,
        "all-nli": write_csv(
            root / "all-nli.csv",
            ("premise", "hypothesis", "label"),
            [(words(n // 3, 5), words(n, 2), n % 3) for n in range(60)],
        ),
        "quora-duplicates": write_csv(
            root / "quora.tsv",
            ("sentence1", "sentence2", "label"),
            [(f'How "{words(n)}"?', f"What\tis {words(n, 1)}?", int(n % 4 == 0)) for n in range(40)],
        ),
        "natural-questions": write_jsonl(
            root / "nq.jsonl", [{"query": words(n), "answer": words(n, 9)} for n in range(20)]
        ),
        "mine": write_jsonl(root / "mine.jsonl", [{"text": words(n), "text_tgt": words(n, 8)} for n in range(10)]),
    }


@pytest.fixture(scope="session")
def source_words(sources: dict[str, Path]) -> list[str]:
    """Every source as --sources takes it."""
    return [f"{name}={path}" for name, path in sources.items() if name != "sft"]
