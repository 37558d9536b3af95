"""Tokenising pairs: text, prompt and completion, or messages, each with its ``_tgt`` and ``_neg`` twins."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from craft.collate import PER_TOKEN, SUFFIX, is_array
from craft.data import missing_positives
from craft.fields import ContrastiveKeys

# Columns that hold a text, by what is read first, before the text field; a suffix stands after each name.
_FORMS = (("messages",), ("prompt", "completion"))
# What retrieval data sets call their texts, read last.
_ROLES = {"": "anchor", "_tgt": "positive", "_neg": "negative"}
_BESIDE_TOKENS = tuple(name for name in PER_TOKEN if name not in ("input_ids", "attention_mask"))


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

    dataset: a datasets.Dataset or IterableDataset; a list of dicts, which gives a list; or another sized data set of
    dicts, whose rows are tokenised when they are read. A text is `input_ids{suffix}` as it is, `messages{suffix}`
    through the chat template, `prompt{suffix}` + `completion{suffix}` (texts or messages), `{text_field}{suffix}` or
    `text{suffix}`, or else the column `anchor`, `positive` or `negative`; texts end in the EOS token, as TRL writes
    them. Anchor and positive may have different forms. The columns of the texts themselves go, others stay. Tokens
    beyond `max_length` are cut from the end, together with whatever else the data set has for each of them.
    `contrastive_keys` (craft_contrastive_keys) gives other names to the token columns.
    Errors: ValueError without an anchor or a positive column, for anything else than such a data set, and for texts
    without a tokenizer; ValueError naming the row that has no token left.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length={max_length} must be at least 1, or None to cut nothing.")
    columns = _column_names(dataset)
    names = _token_columns(ContrastiveKeys(contrastive_keys or {}))
    forms = _complete(_forms(columns, text_field, names), columns, text_field)
    spent = sorted({name for suffix, form in forms.items() if form != (names(suffix)[0],) for name in form})
    if spent and tokenizer is None:
        raise ValueError(
            f"the pairs are texts ({', '.join(spent)}) and there is no tokenizer. Pass the trainer processing_class=, "
            "or pairs with columns input_ids and input_ids_tgt."
        )
    encoder = _Encoder(tokenizer, forms, names, max_length=max_length, chat_template=chat_template)
    if hasattr(dataset, "map"):
        options = {"num_proc": num_proc} if num_proc else {}
        return dataset.map(encoder, with_indices=True, remove_columns=spent, **options)
    rows = _TokenisedRows(dataset, encoder, spent)
    return [rows[index] for index in range(len(rows))] if isinstance(dataset, list | tuple) else rows


def has_pairs(dataset: Any, *, text_field: str = "text", contrastive_keys: Mapping[str, str] | None = None) -> bool:
    """Return whether tokenize_pairs finds both texts among the columns of a data set."""
    try:
        columns = _column_names(dataset)
    except ValueError:
        return False
    forms = _forms(columns, text_field, _token_columns(ContrastiveKeys(contrastive_keys or {})))
    return {"", "_tgt"} <= forms.keys()


def _column_names(dataset: Any) -> list[str]:
    """The names of a data set's columns; ValueError for what is no data set of mappings."""
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"the pairs are a {kind} of {', '.join(map(str, dataset))}: one data set of rows is needed. Choose a split "
            "(pairs['train']), or make rows of columns with datasets.Dataset.from_dict."
        )
    names = getattr(dataset, "column_names", None)
    if isinstance(names, list):
        return names
    if not hasattr(dataset, "map") and not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"the pairs are a {kind}, which has no numbered rows. Give a datasets.Dataset, a list of dicts, or a "
            "datasets.IterableDataset."
        )
    first: Any = next(iter(dataset), {})
    if not isinstance(first, Mapping):
        raise ValueError(
            f"the rows of the pairs ({kind}) are {type(first).__name__}, so they have no columns. Give each as a dict "
            "of both texts, such as {'text': ..., 'text_tgt': ...}, or pass a craft_collator that reads them."
        )
    return list(first)


class _TokenisedRows(Dataset[dict[str, Any]]):
    """The rows of a map-style data set, each tokenised when it is read."""

    def __init__(self, rows: Any, encoder: "_Encoder", spent: Sequence[str]) -> None:
        self.rows, self.encoder, self.spent = rows, encoder, frozenset(spent)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        kept = {name: value for name, value in row.items() if name not in self.spent}
        return {**kept, **self.encoder(row, index)}


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
    """Suffix -> the columns that its text is made of, where there are any."""
    found: dict[str, tuple[str, ...]] = {}
    for suffix in dict.fromkeys([*_ROLES, *_suffixes(columns)]):
        texts = (tuple(f"{name}{suffix}" for name in form) for form in (*_FORMS, (text_field,), ("text",)))
        role = [(_ROLES[suffix],)] if suffix in _ROLES else []
        candidates = [(names(suffix)[0],), *texts, *role]
        form = next((form for form in candidates if all(name in columns for name in form)), None)
        if form is not None:
            found[suffix] = form
    return found


def _complete(forms: dict[str, tuple[str, ...]], columns: Sequence[str], text_field: str) -> dict[str, tuple[str, ...]]:
    """The forms as they are; ValueError when anchors or positives have none."""
    if "_tgt" not in forms:
        raise ValueError(missing_positives(columns, text_field=text_field))
    if "" not in forms:
        raise ValueError(
            f"the pairs have no column of anchors: found {', '.join(columns)}. Each row needs its first text as "
            f"input_ids, messages, prompt and completion, {text_field}, or anchor. Rename the column, or pass "
            "text_field= (the trainer's dataset_text_field)."
        )
    return forms


def _suffixes(columns: Iterable[str]) -> list[str]:
    return [match.group() for name in columns if (match := SUFFIX.search(name))]


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
            if any(row.get(name) is None for name in form):
                raise ValueError(f"row {index} has no {' and '.join(form)}. Fill it in, or drop the row.")
            ids = _listed(row[ids_name]) if form == (ids_name,) else self._ids(row, form)
            # Where the row has other tokens under the usual name, its labels and masks are theirs.
            usual = f"input_ids{suffix}"
            of_others = usual in row and usual != ids_name
            per_token = [mask_name, *(f"{name}{suffix}" for name in _BESIDE_TOKENS if not of_others)]
            encoded |= self._columns(row, ids, [ids_name, *per_token], form=" and ".join(form), index=index)
        return encoded

    def _columns(
        self, row: Mapping[str, Any], ids: list[int], names: Sequence[str], *, form: str, index: int
    ) -> dict[str, list[int]]:
        """The tokens of a text and whatever the row has for each of them, all cut alike."""
        columns = {names[0]: ids[: self.max_length]}
        for name in names[1:]:
            values = row.get(name)
            if values is None or not is_array(values):
                continue
            if len(values) != len(ids):
                raise ValueError(
                    f"row {index}: {name} has {len(values)} entries for {len(ids)} tokens of {form}. Each token needs "
                    "one: drop the column, or tokenise both together."
                )
            columns[name] = _listed(values)[: self.max_length]
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
        messages = [message for part in parts if isinstance(part, list) for message in part]
        if all(isinstance(part, list) for part in parts) and all(isinstance(each, Mapping) for each in messages):
            return self._rendered(messages) if messages else []
        raise ValueError(
            f"{' and '.join(form)} must be text, or lists of messages, in all rows. Name columns of token ids in "
            "craft_contrastive_keys."
        )

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


def _listed(values: Any) -> list[int]:
    """A list of numbers, or the numbers of an array or tensor."""
    numbers: list[int] = values.tolist() if hasattr(values, "tolist") else list(values)
    return numbers
