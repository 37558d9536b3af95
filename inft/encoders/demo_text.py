"""Text that ships or is generated, for the demo of pretraining: captions of drawn scenes and the project's documents.

Three kinds of document: a caption in one of ten languages; a caption in English and in another language, where what is
masked in one can be read off the other; and prose in English: docstrings of the installed packages and, in a source
tree, the README files.
"""

import ast
import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import NamedTuple
from zlib import crc32

from inft.data.sample import combinations
from inft.data.scene_captions import GRAMMARS, caption
from inft.training.storage import write_text

PACKAGES = ("params", "craft", "inft")
PAIR, PROSE = "pair", "prose"  # stand for the language of captions in two, and of documents
PIVOT = "en"  # one of the two
SPLITS = ("train", "validation")
MASKINGS = 3  # rows of each held-out caption: every row is masked elsewhere
_HELD_OUT_SCENES = ("validation", "test")  # splits of the sample set
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_HELD_OUT = 10  # every so many-th source file and section is held out, whole
_LEAST = 40  # characters of a document worth reading


class Text(NamedTuple):
    """One document with the language it counts for."""

    text: str
    language: str  # code of GRAMMARS, PAIR or PROSE


def demo_data(directory: Path, seed: int) -> None:
    """Write train.jsonl and validation.jsonl with a text and a language in each row.

    Captions held out show combinations of attributes that no trained caption shows; prose held out is of other files
    and sections. The same seed and documents give the same bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        rows = demo_texts(split, seed)
        lines = [json.dumps(row._asdict(), ensure_ascii=False) for row in rows]
        write_text(directory / f"{split}.jsonl", "\n".join(lines) + "\n")


def read_texts(directory: Path, split: str) -> list[Text]:
    """The rows that demo_data wrote for a split."""
    lines = (directory / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [Text(**json.loads(line)) for line in lines]


def demo_texts(split: str, seed: int) -> list[Text]:
    """The documents of a split, "train" or "validation", in an order drawn from the seed."""
    texts = [*_captions(split), *(Text(text, PROSE) for text in _prose(split))]
    Random(f"{seed} {split}").shuffle(texts)
    return texts


def _captions(split: str) -> Iterator[Text]:
    """Each scene in every language, and in English and every other one, in both orders."""
    held_out = split != "train"
    for part in _HELD_OUT_SCENES if held_out else ("train",):
        for attributes in combinations(part):
            said = {language: caption(attributes, language) for language in GRAMMARS}
            for language, text in said.items():
                yield from [Text(text, language)] * (MASKINGS if held_out else 1)
                if language != PIVOT:
                    yield Text(f"{text} {said[PIVOT]}", PAIR)
                    yield Text(f"{said[PIVOT]} {text}", PAIR)


def _prose(split: str) -> Iterator[str]:
    """Docstrings and paragraphs, each once; what occurs in both splits is trained on only."""
    trained = {text for place, text in _documents() if not _held_out(place)}
    if split == "train":
        yield from sorted(trained)
    else:
        yield from sorted({text for place, text in _documents() if _held_out(place)} - trained)


def _held_out(place: str) -> bool:
    return crc32(place.encode()) % _HELD_OUT == 0


def _documents() -> Iterator[tuple[str, str]]:
    """Pairs of the file or section that a document is from, and its text."""
    for name in PACKAGES:
        root = _package(name)
        for path in sorted(root.rglob("*.py")):
            place = f"{name}/{path.relative_to(root).as_posix()}"
            yield from ((place, text) for text in docstrings(path.read_text(encoding="utf-8")))
    for name, path in _readme_files().items():
        sections = markdown_sections(path.read_text(encoding="utf-8"))
        yield from ((f"{name} {title}", text) for title, texts in sections for text in texts)


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None, name
    assert spec.origin is not None, name
    return Path(spec.origin).parent


def _readme_files() -> dict[str, Path]:
    """README files of a source tree by name; beside installed packages a README could be anyone's."""
    root = _package("inft").parent
    names = ("README.md", "craft/README.md") if (root / "pyproject.toml").is_file() else ()
    return {name: root / name for name in names if (root / name).is_file()}


def docstrings(source: str) -> list[str]:
    """The docstrings of a Python file, each on one line, without the very short ones."""
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, _DOCUMENTED)]
    return _worth_reading([text for text in found if text])


def markdown_sections(source: str) -> list[tuple[str, list[str]]]:
    """Titles and paragraphs of a Markdown file; code and tables are left out."""
    sections: list[tuple[str, list[str]]] = [("", [])]
    for number, part in enumerate(source.split("```")):
        if number % 2:
            continue  # between fences
        for block in part.split("\n\n"):
            if block.lstrip().startswith("#"):
                sections.append((block.strip("# \n"), []))
            elif not block.lstrip().startswith("|"):
                sections[-1][1].append(block)
    return [(title, _worth_reading(blocks)) for title, blocks in sections]


def _worth_reading(texts: Sequence[str]) -> list[str]:
    lines = [" ".join(text.split()) for text in texts]
    return [line for line in lines if len(line) >= _LEAST]
