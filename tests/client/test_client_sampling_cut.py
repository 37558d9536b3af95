"""Completions that end where max_tokens says: whole characters, whatever the tokenizer's tokens hold."""

from itertools import pairwise
from typing import Any

import torch
from embedded_bases import embedded_base
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from inft.client.drawing import Row


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes as SentencePiece's are: with one byte too few it decodes none of those before it."""
    model = models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def cut(tokenizer: Any, tokens: list[int], *, stopped: bool = False) -> str:
    draws = torch.Generator()
    row = Row(tokenizer=tokenizer, last=tokens[0], generator=draws, ends=(), stops=(), tokens=tokens[1:])
    row.stopped = stopped
    return row.text()


SINHALA = "A රතු කවයක් මැද 🙂 é"


def test_a_completion_that_was_cut_in_a_character_is_whole_characters() -> None:
    tokenizer = embedded_base("text").tokenizer
    tokens = tokenizer(SINHALA, add_special_tokens=False)["input_ids"]
    assert cut(tokenizer, tokens) == SINHALA[1:]
    texts = [cut(tokenizer, tokens[:end]) for end in range(1, len(tokens))]
    assert any("\ufffd" in tokenizer.decode(tokens[:end]) for end in range(1, len(tokens))), "some are cut there"
    for before, text in pairwise(texts):
        assert SINHALA[1:].startswith(text)
        assert text.startswith(before)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=6), st.integers(0, 24))
def test_single_bytes_that_are_no_character_yet_spoil_none_before_them(text: str, kept: int) -> None:
    content = text.encode()[:kept]
    assert cut(bytes_tokenizer(), [ord("a"), *content]) == content.decode(errors="ignore")


def test_a_completion_that_ended_by_itself_is_told_as_it_is() -> None:
    tokenizer = bytes_tokenizer()
    assert cut(tokenizer, list(b"a\xe0"), stopped=True) == "\ufffd"
    assert cut(tokenizer, list(b"a\xe0")) == ""
    assert cut(tokenizer, list("ab\ufffdc".encode())) == "b\ufffdc"
