"""What data sources yield and model families take: Sample, with its Prompt and ImageRef, and Pair, two of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageRef(Protocol):
    """An image that is read when it is needed; kept small so that a data set fits in memory."""

    def load(self) -> "Image":
        """Return the image as RGB, upright, alpha composited on white."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """The user's turn: an instruction that is never cut and a news text that may be."""

    instruction: str
    news: str = ""

    @property
    def text(self) -> str:
        """The whole turn; the news text, when there is one, stands after the instruction."""
        return f"{self.instruction}\n\n{self.news}" if self.news else self.instruction

    def with_news(self, news: str) -> "Prompt":
        """The same instruction with another (usually shorter) news text."""
        return replace(self, news=news)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One supervised row: image and prompt in, answer out."""

    image: ImageRef | None  # None: a text-only row
    prompt: Prompt
    answer: str
    language: str  # code, such as "si"
    rejected: str | None = None  # the worse answer of a preference row, whose better one is `answer`
    # title, where, source, picture (equal for equal pictures): to name it in messages, to split by, to tell rows apart
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two rows whose answers say the same: the positive is to be found among other rows' for the anchor."""

    anchor: Sample
    positive: Sample
    id: int  # above 0 and below 2**63; pairs of one id are no negatives of each other
