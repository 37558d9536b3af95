"""The embedded tiny models, their processors, a byte tokenizer, and small samples."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from PIL import Image, ImageDraw
from tiny_families import TinyFamily, tiny_family
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from inft.models import MODELS
from inft.sample import Prompt, Sample

torch.set_num_threads(1)

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|pad|>")


@dataclass(frozen=True, kw_only=True)
class StillImage:
    """An image that is in memory already."""

    image: Image.Image

    def load(self) -> Image.Image:
        return self.image


@pytest.fixture(params=MODELS)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    """Each family in turn."""
    return tiny_family(request.param)


@pytest.fixture(params=["llama32", "aya"])
def vlm(request: pytest.FixtureRequest) -> TinyFamily:
    """Each family that takes images in turn."""
    return tiny_family(request.param)


@pytest.fixture
def llama32() -> TinyFamily:
    return tiny_family("llama32")


@pytest.fixture
def aya() -> TinyFamily:
    return tiny_family("aya")


@pytest.fixture
def text() -> TinyFamily:
    return tiny_family("text")


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., Sample]:
    """A sample from words: make_sample(answer, news=…, instruction=…, image=True, size=…, where=…)."""

    def sample(
        answer: str = "A red circle.",
        *,
        news: str = "",
        instruction: str = "Write a caption for this image in English.",
        image: bool = True,
        colour: str = "red",
        size: tuple[int, int] = (96, 64),
        where: str = "train.jsonl line 17",
    ) -> Sample:
        return Sample(
            image=StillImage(image=disc(colour, size)) if image else None,
            prompt=Prompt(instruction=instruction, news=news),
            answer=answer,
            language="en",
            meta={"where": where, "title": "a title", "source": "test"},
        )

    return sample


def disc(colour: str, size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((20, 10, 60, 50), fill=colour)
    return image


@pytest.fixture(scope="session")
def make_byte_tokenizer() -> Callable[[str], PreTrainedTokenizerFast]:
    """make_byte_tokenizer(chat_template): one token for each byte of UTF-8 and each of SPECIAL, in all 260."""

    def tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
        vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        made = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            eos_token="<|end|>",
            pad_token="<|pad|>",
            additional_special_tokens=["<|user|>", "<|assistant|>"],
        )
        made.chat_template = chat_template
        return made

    return tokenizer
