"""Parallel text: captions of the drawn scenes in two languages, or a file of the user's.

A file is JSONL or TSV in UTF-8:

- JSONL with `text` and `text_tgt` (and, for preferences, `rejected`: a worse translation);
- JSONL of captions, with `image`, `language` and `caption`: captions of one image are translations of each other;
- TSV with the text and its translation.

A tenth of a file, at most 200 texts, is held out by a hash of the text, so that new rows move no old ones.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from inft.data.heldout import unit_hash
from inft.data.sample import combinations
from inft.data.scene_captions import GRAMMARS, caption
from inft.data.scenes import COLOURS, FIGURES, PLACES, SIZES, Attributes
from params.munichus import LANGUAGE_NAMES
from shared.options import Options

Message = dict[str, str]
MOST_HELD_OUT = 200


@dataclass(frozen=True, kw_only=True)
class Translation:
    """A text, its translation, and a wrong one that is near it."""

    text: str
    translation: str
    wrong: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Parallel text in two parts that share no text."""

    train: list[Translation]
    held_out: list[Translation]
    source: str  # language codes
    target: str

    def question(self, text: str) -> list[Message]:
        """The user's turn that asks for a translation."""
        language = LANGUAGE_NAMES.get(self.target, self.target)
        return [{"role": "user", "content": f"Translate into {language}.\n\n{text}"}]


def corpus(options: Options) -> Corpus:
    """Return the texts that the options name; SystemExit with the remedy for a file that cannot be used."""
    languages = {"source": options.source, "target": options.target}
    if options.data:
        found = _unique(_read(Path(options.data).expanduser(), options))
        train, held_out = _split(found, options)
    else:
        train = _scenes("train", options)
        held_out = [*_scenes("validation", options), *_scenes("test", options)]
    print(f"{len(train)} texts to train on, {len(held_out)} held out, {options.source} -> {options.target}")
    return Corpus(train=train, held_out=held_out, **languages)


def _scenes(split: str, options: Options) -> list[Translation]:
    for code in (options.source, options.target):
        if code not in GRAMMARS:
            raise SystemExit(f"the drawn scenes have no captions in {code!r}: choose of {', '.join(GRAMMARS)}.")
    return [
        Translation(
            text=caption(scene, options.source),
            translation=caption(scene, options.target),
            wrong=caption(_other(scene, number), options.target),
        )
        for number, scene in enumerate(combinations(split))
    ]


def _other(scene: Attributes, number: int) -> Attributes:
    """The scene with one of its four attributes changed, each in turn."""
    values = {"figure": FIGURES, "colour": COLOURS, "size": SIZES, "place": PLACES}
    name = list(values)[number % 4]
    own = {key: getattr(scene, key) for key in values}
    following = values[name].index(own[name]) + 1
    return Attributes(**{**own, name: values[name][following % len(values[name])]})


def _read(path: Path, options: Options) -> list[Translation]:
    if not path.is_file():
        raise SystemExit(f"--data {path}: no such file. Give a JSONL or TSV file of texts with their translations.")
    if path.suffix == ".tsv":
        rows = [{"where": where, "text": one, "text_tgt": other} for where, one, other in _tsv(path)]
    else:
        rows = list(_jsonl(path))
        if rows and {"image", "language", "caption"} <= rows[0].keys():
            rows = _captions_of_one_image(rows, options)
    rights = [_text(row, "text_tgt") for row in rows]
    return [
        Translation(text=_text(row, "text"), translation=rights[number], wrong=_wrong(row, rights, number))
        for number, row in enumerate(rows)
    ]


def _wrong(row: dict[str, str], rights: list[str], number: int) -> str:
    """The row's own wrong translation, or else the next row's that is another than its right one."""
    right = rights[number]
    if row.get("rejected") is None:
        others = (other for other in [*rights[number + 1 :], *rights[:number]] if other != right)
        return next(others, f"no {right}")
    wrong = _text(row, "rejected")
    if wrong == right:
        raise SystemExit(f"{row['where']}: rejected is the translation itself. Write a worse one, or leave it out.")
    return wrong


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path.name} is not UTF-8 ({error.reason} at byte {error.start}). Convert it.") from error


def _tsv(path: Path) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(_lines(path), start=1):
        parts = line.split("\t")
        if len(parts) != 2:
            raise SystemExit(f"{path.name} line {number} has {len(parts)} columns: a text and its translation are two.")
        yield f"{path.name} line {number}", parts[0], parts[1]


def _jsonl(path: Path) -> Iterator[dict[str, str]]:
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path.name} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SystemExit(f"{where} is not JSON ({error}). Mend it, or drop it.") from error
        if not isinstance(row, dict):
            raise SystemExit(f"{where} is a JSON {type(row).__name__}: an object with text and text_tgt is needed.")
        yield {**row, "where": where}


def _captions_of_one_image(rows: list[dict[str, str]], options: Options) -> list[dict[str, str]]:
    wanted = (options.source, options.target)
    by_image: dict[str, dict[str, str]] = {}
    for row in rows:
        image, language, caption = (_text(row, name) for name in ("image", "language", "caption"))
        by_image.setdefault(image, {"where": row["where"]})[language] = caption
    both = [captions for captions in by_image.values() if all(code in captions for code in wanted)]
    return [{"where": each["where"], "text": each[wanted[0]], "text_tgt": each[wanted[1]]} for each in both]


def _text(row: dict[str, str], name: str) -> str:
    text = row.get(name)
    if not isinstance(text, str) or not text.strip():
        raise SystemExit(f"{row['where']} has no {name}: write it, or drop the row.")
    return text.strip()


def _unique(translations: list[Translation]) -> list[Translation]:
    return list({each.text: each for each in reversed(translations)}.values())[::-1]


def _split(found: list[Translation], options: Options) -> tuple[list[Translation], list[Translation]]:
    if len(found) < 2 * options.batch_size:
        raise SystemExit(
            f"--data {options.data} has {len(found)} different texts with a translation {options.source} -> "
            f"{options.target}: at least {2 * options.batch_size} are needed. Give more, name other languages with "
            "--source and --target, or lower --batch-size."
        )
    count = min(MOST_HELD_OUT, max(1, len(found) // 10))
    chosen = set(sorted((each.text for each in found), key=lambda text: unit_hash(options.seed, text))[:count])
    return [each for each in found if each.text not in chosen], [each for each in found if each.text in chosen]
