"""Tokenising pairs: text, prompt and completion, or messages, each with its ``_tgt`` and ``_neg`` twins."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from craft.data import missing_positives
from craft.fields import ContrastiveKeys

_SUFFIX = re.compile(r"(_tgt|_neg(_\d+)?)$")
# Columns that hold a text, by what is read first, before the text field; a suffix stands after each name.
_FORMS = (("messages",), ("prompt", "completion"))
_PER_TOKEN = ("labels", "token_type_ids", "assistant_masks", "completion_mask", "craft_pooling_mask")


def tokenize_pairs(
    dataset: Any,
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    text_field: str = "text",
    chat_template: str | None = None,
    contrastive_keys: Mapping[str, str] | None = None,
    num_proc: int | None = None,
) -> Any:
    """Return the data set with input_ids and attention_mask of each anchor, and the same with _tgt and _neg suffixes.

    dataset: a datasets.Dataset, or a sequence of dicts, which gives a list. A text is `input_ids{suffix}` as it is,
    `messages{suffix}` through the chat template, `prompt{suffix}` + `completion{suffix}` (texts or messages), or
    `text{suffix}`; texts end in the EOS token, as TRL writes them. Anchor and positive may have different forms. The
    columns of the texts themselves go, others stay. Tokens beyond `max_length` are cut from the end, together with
    whatever else the data set has for each of them. `contrastive_keys` (craft_contrastive_keys) gives other names to
    the token columns.
    Errors: ValueError without an anchor or a positive column; ValueError naming the row that has no token left.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length={max_length} must be at least 1, or None to cut nothing.")
    columns = _column_names(dataset)
    names = _token_columns(ContrastiveKeys(contrastive_keys or {}))
    forms = _forms(columns, text_field, names)
    encoder = _Encoder(tokenizer, forms, names, max_length=max_length, chat_template=chat_template)
    spent = sorted({name for suffix, form in forms.items() if form != (names(suffix)[0],) for name in form})
    if hasattr(dataset, "map"):
        options = {"num_proc": num_proc} if num_proc else {}
        return dataset.map(encoder, with_indices=True, remove_columns=spent, **options)
    kept = [{key: value for key, value in row.items() if key not in spent} for row in dataset]
    return [{**rest, **encoder(row, index)} for index, (row, rest) in enumerate(zip(dataset, kept, strict=True))]


def _column_names(dataset: Any) -> list[str]:
    names = getattr(dataset, "column_names", None)
    return list(next(iter(dataset), {}) if names is None else names)


def _token_columns(keys: ContrastiveKeys) -> Callable[[str], tuple[str, str]]:
    """Suffix -> the columns of its tokens and of their mask."""
    renamed = {
        "": (keys.anchor_input_ids, keys.anchor_attention_mask),
        "_tgt": (keys.positive_input_ids, keys.positive_attention_mask),
    }
    return lambda suffix: renamed.get(suffix) or (f"input_ids{suffix}", f"attention_mask{suffix}")


def _forms(
    columns: Sequence[str], text_field: str, names: Callable[[str], tuple[str, str]]
) -> dict[str, tuple[str, ...]]:
    """Suffix -> the columns that its text is made of; ValueError when anchors or positives have none."""
    found: dict[str, tuple[str, ...]] = {}
    for suffix in dict.fromkeys(["", "_tgt", *_suffixes(columns)]):
        texts = (tuple(f"{name}{suffix}" for name in form) for form in (*_FORMS, (text_field,)))
        candidates = ((names(suffix)[0],), *texts)
        form = next((form for form in candidates if all(name in columns for name in form)), None)
        if form is not None:
            found[suffix] = form
    if "_tgt" not in found:
        raise ValueError(missing_positives(columns))
    if "" not in found:
        raise ValueError(
            f"the pairs have no column of anchors: found {', '.join(columns)}. Each row needs its first text as "
            f"input_ids, messages, prompt and completion, or {text_field}. Rename the column, or pass text_field=."
        )
    return found


def _suffixes(columns: Iterable[str]) -> list[str]:
    return [match.group() for name in columns if (match := _SUFFIX.search(name))]


class _Encoder:
    """The token columns of one row; a class, so that `map` can send it to other processes."""

    def __init__(
        self,
        tokenizer: Any,
        forms: Mapping[str, tuple[str, ...]],
        names: Callable[[str], tuple[str, str]],
        *,
        max_length: int | None,
        chat_template: str | None,
    ) -> None:
        # A processor's tokenizer: pairs are texts.
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.forms = {suffix: (form, *names(suffix)) for suffix, form in forms.items()}
        self.max_length, self.chat_template = max_length, chat_template

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, list[int]]:
        encoded: dict[str, list[int]] = {}
        for suffix, (form, ids_name, mask_name) in self.forms.items():
            if any(row[name] is None for name in form):
                raise ValueError(f"row {index} has no {' and '.join(form)}. Fill it in, or drop the row.")
            ids = list(row[ids_name]) if form == (ids_name,) else self._ids(row, form)
            per_token = [mask_name, *(f"{name}{suffix}" for name in _PER_TOKEN)]
            encoded |= self._columns(row, ids, [ids_name, *per_token], form=" and ".join(form), index=index)
        return encoded

    def _columns(
        self, row: Mapping[str, Any], ids: list[int], names: Sequence[str], *, form: str, index: int
    ) -> dict[str, list[int]]:
        """The tokens of a text and whatever the row has for each of them, all cut alike."""
        columns = {names[0]: ids[: self.max_length]}
        for name in names[1:]:
            values = row.get(name)
            if values is None:
                continue
            if len(values) != len(ids):
                raise ValueError(
                    f"row {index}: {name} has {len(values)} entries for {len(ids)} tokens of {form}. Each token needs "
                    "one: drop the column, or tokenise both together."
                )
            columns[name] = list(values)[: self.max_length]
        mask = columns.setdefault(names[1], [1] * len(columns[names[0]]))
        if not any(mask):
            cut = f" within the first max_length={self.max_length} tokens" if ids else ""
            raise ValueError(f"row {index}: {form} has no token{cut}. Drop the row, or give it a text.")
        return columns

    def _ids(self, row: Mapping[str, Any], form: tuple[str, ...]) -> list[int]:
        """The tokens of a text or of a conversation."""
        parts = [row[name] for name in form]
        if all(isinstance(part, str) for part in parts):
            return self._plain("".join(parts))
        if all(isinstance(part, list) for part in parts):
            messages = [message for part in parts for message in part]
            return self._rendered(messages) if messages else []
        raise ValueError(f"{' and '.join(form)} must be text, or lists of messages, in both.")

    def _plain(self, text: str) -> list[int]:
        if not text:
            return []
        end = self.tokenizer.eos_token or ""
        ids: list[int] = self.tokenizer(text=text if text.endswith(end) else text + end)["input_ids"]
        return ids

    def _rendered(self, messages: list[Any]) -> list[int]:
        template = self.chat_template or self.tokenizer.chat_template
        if not template:
            raise ValueError(
                "the pairs are conversations and the tokenizer has no chat template. Pass chat_template=, or give the "
                "pairs as text."
            )
        encoded = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, chat_template=template)
        ids: list[int] = encoded["input_ids"]
        return ids
