"""Parallel text: FLORES+, whose sentences have the same id in every language, and NLLB's mined bitext with scores.

Columns of the releases:
  flores  openlanguagedata/flores_plus: id, iso_639_3, iso_15924, glottocode, text, split; facebook/flores:
          sentence_eng_Latn, sentence_sin_Sinh, ... in one row
  nllb    allenai/nllb: translation ({language: text}), laser_score; or a column for each language and laser_score; or
          the released files eng_Latn-sin_Sinh.gz, tab-separated without a header, best score first: both texts, the
          LASER score, and six more fields
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pair_files import Record, file_records, find_files, hub_records, read_records, table_suffix, text_of
from stratified import LeftOut, TextPair

from craft.fields import did_you_mean
from params.errors import UserError

FLORES_HUB = "openlanguagedata/flores_plus"
NLLB_FILES = "https://storage.googleapis.com/allennlp-data-bucket/nllb"  # what the hub's allenai/nllb points to
CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")  # ISO 639-3 and ISO 15924, as FLORES and NLLB write languages
_FILE_PAIR = re.compile(rf"({CODE.pattern})-({CODE.pattern})")
ABSENT = "not mined"  # a pair of languages that NLLB does not have
_SENTENCE = "sentence_"

Texts = dict[str, dict[Any, str]]  # language -> id -> sentence


def language_pairs(
    languages: Sequence[str], explicit: Sequence[str], *, pivot: str, wanted_by: Sequence[str]
) -> list[tuple[str, str]]:
    """Return the pairs of languages: the explicit ones, or each language with the pivot.

    Errors: UserError for what is no FLORES code, for both lists at once, and for a list that no source reads.
    """
    if languages and explicit:
        raise UserError("give either --languages (each with --pivot_language) or --language_pairs, not both.")
    if (languages or explicit) and not wanted_by:
        raise UserError("--languages and --language_pairs choose from flores and nllb: add one of them to --sources.")
    for code in (*languages, pivot):
        require_code(code)
    if not explicit:
        return [(pivot, code) for code in dict.fromkeys(languages) if code != pivot]
    pairs = []
    for word in explicit:
        first, separator, second = word.partition("-")
        if not separator or first == second:
            raise UserError(f"--language_pairs {word}: write a pair as two codes, such as eng_Latn-sin_Sinh.")
        pairs.append((require_code(first), require_code(second)))
    return list(dict.fromkeys(pairs))


def require_code(code: str) -> str:
    """Return a FLORES code; UserError for anything else, such as "si"."""
    if CODE.fullmatch(code):
        return code
    language, _, script = code.partition("_")
    mended = f"{language.lower()}_{script.title()}"
    meant = f" Did you mean {mended}?" if CODE.fullmatch(mended) else ""
    raise UserError(
        f"{code!r} is no language code of FLORES: three letters of the language and four of its script, such as "
        f"sin_Sinh, urd_Arab, yue_Hant.{meant}"
    )


def read_flores(location: str | None, *, pairs: Sequence[tuple[str, str]], split: str) -> Iterator[TextPair | LeftOut]:
    """Yield the sentences of each pair of languages, by id; where rows tell their split, only those of ``split``."""
    if not pairs:
        raise UserError("flores has 200 languages: choose with --languages or --language_pairs.")
    wanted = list(dict.fromkeys(code for pair in pairs for code in pair))
    texts = _flores_texts(_flores_records(location, wanted, split), split)
    for first, second in pairs:
        label = f"{first}-{second}"
        _require_language("flores", (first, second), texts, location)
        for key, text in texts[first].items():
            if key in texts[second]:
                yield TextPair(source="flores", language=label, text=text, text_tgt=texts[second][key])
            else:
                yield LeftOut(source="flores", language=label, reason="no translation")


def _flores_records(location: str | None, wanted: Sequence[str], split: str) -> Iterator[Record]:
    if location is not None:
        yield from read_records(location, split=split)
        return
    for code in wanted:  # a configuration each: only these are downloaded
        yield from hub_records(FLORES_HUB, code, split=split)


def _flores_texts(records: Iterable[Record], split: str) -> Texts:
    texts: Texts = {}
    splits: set[str] = set()
    record = None
    for record in records:
        own = record.values.get("split") or split
        splits.add(own)
        if own != split:
            continue
        for language, text in _sentences(record):
            of_language = texts.setdefault(language, {})
            key = record.values.get("id")
            if of_language.setdefault(key, text) != text:
                raise UserError(
                    f"{record.where}: {language} has two different sentences with the id {key!r}. Give the file of one "
                    "variety (glottocode) and of one split."
                )
    if record is not None and split not in splits:
        raise UserError(f"flores has no row of the split {split}; it has {', '.join(sorted(splits))} (--flores_split).")
    return texts


def _sentences(record: Record) -> Iterator[tuple[str, str]]:
    """(language, sentence) of one row of either release."""
    values = record.values
    wide = [name for name in values if name.startswith(_SENTENCE)]
    if values.get("id") is None or not (wide or {"iso_639_3", "iso_15924", "text"} <= values.keys()):
        raise UserError(
            f"{record.where}: flores has the columns {', '.join(values)}. A row needs id, iso_639_3, iso_15924 and "
            "text, or id and a column sentence_xxx_Yyyy for each language."
        )
    if wide:
        yield from ((name.removeprefix(_SENTENCE), _text(record, name)) for name in wide)
    else:
        yield f"{values['iso_639_3']}_{values['iso_15924']}", _text(record, "text")


def read_nllb(
    location: str | None, *, pairs: Sequence[tuple[str, str]], min_score: float, max_rows: int | None
) -> Iterator[TextPair | LeftOut]:
    """Yield mined sentence pairs whose LASER score is at least ``min_score``, of the languages asked for.

    Without ``pairs`` a local file gives all that it holds; ``max_rows`` ends the reading of each file.
    """
    if location is None and not pairs:
        raise UserError("nllb has 1,600 pairs of languages: choose with --languages or --language_pairs.")
    seen: dict[str, None] = {}
    found: set[tuple[str, str]] = set()
    for record in _nllb_records(location, pairs, max_rows):
        translation = _translation(record)
        seen.update(dict.fromkeys(translation))
        chosen = next((pair for pair in pairs if set(pair) == set(translation)), None)
        first, second = chosen or translation
        label = f"{first}-{second}"
        if pairs and chosen is None:
            yield LeftOut(source="nllb", language=label, reason="other languages")
            continue
        found.add((first, second))
        if _score(record) >= min_score:
            yield TextPair(source="nllb", language=label, text=translation[first], text_tgt=translation[second])
        else:
            yield LeftOut(source="nllb", language=label, reason=f"score below {min_score:g}")
    for pair in pairs:
        if pair in found:
            continue
        misspelt = any(did_you_mean(code, seen) for code in pair if code not in seen)
        if misspelt or not found:
            _require_language("nllb", pair, seen, location)
            raise UserError(f"nllb has no row of {pair[0]} with {pair[1]} in {location or 'the release'}.")
        # Few languages are mined with every other: FLORES may have what NLLB lacks.
        yield LeftOut(source="nllb", language="-".join(pair), reason=ABSENT)


def _nllb_records(location: str | None, pairs: Sequence[tuple[str, str]], max_rows: int | None) -> Iterator[Record]:
    if location is not None and location.startswith("hub:"):
        yield from islice(read_records(location), max_rows)
    elif location is not None:
        for file in find_files(location, named=_FILE_PAIR):
            yield from islice(_nllb_file(file), max_rows)
    else:
        for pair in pairs:
            first, second = sorted(pair)  # as the files are named
            yield from islice(_released_lines(f"{NLLB_FILES}/{first}-{second}.gz", (first, second)), max_rows)


def _nllb_file(file: Path) -> Iterator[Record]:
    """The rows of a table with a header, or of a released file, whose name tells its languages."""
    named = _FILE_PAIR.search(file.name)
    if table_suffix(file) in (".jsonl", ".parquet", ".csv"):
        return file_records(file)
    with text_of(file) as lines:
        if "laser_score" in next(lines, ""):
            return file_records(file)
    if named is None:
        raise UserError(
            f"{file} has no header with laser_score, and its name does not tell its languages. Name it as the release "
            "does: eng_Latn-sin_Sinh.tsv.gz."
        )
    return _released_lines(file, named.groups())


def _released_lines(location: str | Path, languages: Sequence[str]) -> Iterator[Record]:
    first, second = languages
    with text_of(location, may_be_missing=True) as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{location} line {number}"
            fields = line.rstrip("\r\n").split("\t")
            if len(fields) < 3:
                raise UserError(f"{where} has {len(fields)} tab-separated fields; both texts and a score are needed.")
            translation = {first: fields[0], second: fields[1]}
            yield Record(values={"translation": translation, "laser_score": fields[2]}, where=where)


def _translation(record: Record) -> dict[str, str]:
    """Language -> text of one row: two of them."""
    values = record.values
    texts = values.get("translation")
    if not isinstance(texts, Mapping):
        texts = {name: value for name, value in values.items() if CODE.fullmatch(name)}
    # A table of several pairs of languages has a field for each, empty but for two.
    found = {name: text for name, text in texts.items() if text is not None}
    if len(found) != 2 or not all(isinstance(text, str) for text in found.values()):
        raise UserError(
            f"{record.where}: nllb has the columns {', '.join(values)}. A row needs translation with the texts of two "
            "languages (or a column for each of two language codes), and laser_score."
        )
    return found


def _score(record: Record) -> float:
    value = record.values.get("laser_score")
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{record.where}: laser_score is {value!r}, not a number. Bitext without scores is read as a source of "
            "your own, with columns text and text_tgt: --sources NAME=PATH."
        ) from error


def _require_language(source: str, pair: Sequence[str], known: Iterable[str], location: str | None) -> None:
    known = sorted(known)
    for code in pair:
        if code not in known:
            several = f"{', '.join(known[:12])}{' ...' if len(known) > 12 else ''}" or "none"
            raise UserError(
                f"{source} has no text in {code}{did_you_mean(code, known) or '.'} Languages in "
                f"{location or 'the release'}: {several}."
            )


def _text(record: Record, name: str) -> str:
    value = record.values[name]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{record.where}: {name} is {type(value).__name__} {str(value)[:60]!r}, not text.")
    return value or ""
