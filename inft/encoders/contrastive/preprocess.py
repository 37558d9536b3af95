"""Tokenising pairs once, before training: what `inft preprocess` does for contrastive fine-tuning."""

from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from inft.encoders.build import load_tokenizer
from inft.encoders.contrastive.sources import raw_sources
from inft.encoders.contrastive.tokenized import NOTE, Tokenization, tokenize_source
from params.encoder import EncoderParams
from params.errors import UserError


def preprocess_contrastive(
    params: EncoderParams, output: Path, console: Console, tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    """Tokenise the rows of dataset.path or of every one of dataset.sources into `output`/<source>; returns `output`.

    Point dataset.path at it, with the same tokenizer, lengths and prefixes.
    Errors: UserError that names the first rows that cannot be used.
    """
    sources = raw_sources(params)
    for path in sources.values():
        if (path / NOTE).is_file():
            raise UserError(f"{path} is preprocessed already: point dataset.path at the rows it was made of.")
    others = [place.parent.name for place in output.glob(f"*/{NOTE}") if place.parent.name not in sources]
    if others:
        raise UserError(
            f"{output} also holds {', '.join(sorted(others))}, which would be trained on with the rest: remove that, "
            "or choose another output."
        )
    tokenizer = tokenizer or load_tokenizer(params)
    how = Tokenization.of(params, tokenizer)
    for name, path in sources.items():
        note = tokenize_source(path, output / name, tokenizer, how).note
        console.print(
            f"{name}: {note['rows']:,} rows, {note['texts']:,} texts, {note['tokens']:,} tokens; {note['at_limit']:,} "
            "texts are as long as allowed and may be cut"
            + (f"; fields that are not read: {', '.join(note['unread'])}" if note["unread"] else ""),
            highlight=False,
            soft_wrap=True,
        )
    return output
