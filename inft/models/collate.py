"""CaptionCollator: samples in, one batch of tensors with labels on the answer and its end-of-turn token out."""

import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from inft.models.templates import (
    GENERATION,
    PROBE_ANSWERS,
    PROBE_PROMPT,
    SPLICE_TEMPLATE,
    Frame,
    Message,
    Processor,
    control_pattern,
    conversation,
    find_frame,
    first_difference,
    neutralise,
    own_template,
    render,
    template_variables,
    tokenizer_of,
)
from inft.sample import Prompt, Sample
from params.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MEASURED = 256  # rows whose lengths are found in one call of the tokenizer
IGNORED = -100  # label of a position without supervision, as torch's cross entropy reads it


class CaptionCollator:
    """One processor call a batch; loss on the answer and its end-of-turn only; nothing is ever cut but the news text.

    Arguments: `processor` of the family; `max_length` in tokens, image tokens included; `over_length` says what
    happens to a longer row: `shorten` its news text, `drop` it, or raise an `error`.
    Batch: every tensor of the processor, and `labels` [rows, tokens] with -100 where nothing is learned.
    `end_token_id` is the token that ends every supervised answer: the one at which training teaches to stop.
    Errors: UserError for a template under which training and generation would read different tokens; UserError
    naming the row that cannot be fitted, or that has nothing to learn.
    """

    family_template: str | None = None  # the released template with the answer marked; None: the processor's own
    tiles_are_tokens = False  # fewer tiles would make a row shorter
    parts = True  # content as typed parts (processors); False: as a string (tokenizers)

    def __init__(
        self,
        processor: Processor,
        *,
        max_length: int = 4096,
        over_length: Literal["shorten", "drop", "error"] = "shorten",
    ) -> None:
        self.processor = processor
        self.tokenizer = tokenizer_of(processor)
        self.max_length = max_length
        self.over_length = over_length
        self.template = self._choose_template()
        self.control = control_pattern(processor, self.template)
        # A template that marks the answer needs no frame; any other one is taken apart row by row.
        self.frame: Frame | None = None
        if not (self.parts and GENERATION.search(self.template)):
            self.frame = find_frame(processor, self.template, self.control, parts=self.parts)
        self.end_token_id, self._added_tokens = self._probe()
        # Shared memory: DataLoader workers count too.
        self._counts = torch.zeros(2, dtype=torch.int64).share_memory_()

    @property
    def shortened(self) -> int:
        """Rows whose news text was shortened so far."""
        return int(self._counts[0])

    @property
    def dropped(self) -> int:
        """Rows dropped so far because they were above max_length."""
        return int(self._counts[1])

    def __call__(self, features: Sequence[Sample | Mapping[str, Any]], *, answers: int = 1) -> dict[str, Tensor]:
        """Return the training batch of some samples, right-padded, with `labels`.

        With `answers` above 1 the samples are that many lists of equal length, one after the other, whose rows of the
        same place are answers to one prompt: that prompt is shortened alike for all of them, and no row is dropped.
        """
        samples = [self._neutral(f["sample"] if isinstance(f, Mapping) else f) for f in features]
        if empty := [where(sample) for sample in samples if not sample.answer]:
            raise UserError(f"{', '.join(empty)}: the answer is empty, so there is nothing to learn. Drop the row.")
        rows = [(sample, self._load(sample)) for sample in samples]
        batch = self._encode(rows)
        lengths = batch["attention_mask"].sum(1).tolist()
        if max(lengths) > self.max_length:
            alike = answers > 1
            rows = self._fit_alike(rows, lengths, answers) if alike else self._fit(rows, lengths, self._text)
            batch = self._encode(rows)
        supervised = batch.pop("assistant_masks").bool()
        assert bool(supervised.any(1).all()), "every row has a supervised token"
        batch["labels"] = batch["input_ids"].masked_fill(~supervised, IGNORED)
        return _channels_last(batch)

    def prompts(self, samples: Sequence[Sample], shots: Sequence[Sequence[Sample]] = ()) -> dict[str, Tensor]:
        """Return the prompts alone, left-padded and ending in the generation prompt, for `generate`.

        `shots` are the examples before each prompt, answered turns of the same conversation (see `fitting_shots`). A
        prompt above max_length has its news text shortened (an error under over_length="error"): an evaluation never
        drops a row.
        """
        rows, before = self._loaded(samples), [self._loaded(row) for row in shots]
        batch = self._encode_prompts(rows, before)
        lengths = batch["attention_mask"].sum(1).tolist()
        if max(lengths) > self.max_length:
            batch = self._encode_prompts(self._fit(rows, lengths, self._prompt_text, may_drop=False), before)
        return _channels_last(batch)

    def fitting_shots(self, samples: Sequence[Sample], shots: Sequence[Sequence[Sample]]) -> list[list[Sample]]:
        """Return the examples of each sample without the first ones, as many as must go to stay within max_length."""
        rows, before = self._loaded(samples), [self._loaded(row) for row in shots]
        kept = [list(row) for row in shots]
        while True:
            lengths = self._encode_prompts(rows, before)["attention_mask"].sum(1).tolist()
            long = [i for i, length in enumerate(lengths) if length > self.max_length and kept[i]]
            if not long:
                return kept
            for i in long:
                kept[i].pop(0)
                before[i].pop(0)

    def _loaded(self, samples: Sequence[Sample]) -> list[tuple[Sample, Any]]:
        return [(self._neutral(sample), self._load(sample)) for sample in samples]

    def rough_length(self, sample: Sample, size: tuple[int, int] | None) -> int:
        """Return what grows with the tokens of a prompt, to sort by; `size` is that of its image, where it is known."""
        return len(sample.prompt.text) + len((self._image_text(size) if size else None) or "")

    def lengths(self, samples: Sequence[Sample]) -> list[int]:
        """Return how many tokens each sample's whole row has, image tokens included and nothing shortened.

        Equal to what collating it would show. An image is decoded for its size alone, not processed, where the
        family can tell its tokens from that.
        """
        found: list[int] = []
        for start in range(0, len(samples), MEASURED):
            part = [self._neutral(sample) for sample in samples[start : start + MEASURED]]
            texts = [self._text_with_image_tokens(sample) for sample in part]
            tokens = iter(self._counted([text for text in texts if text is not None]))
            found += [
                self._exact_length(sample) if text is None else self._added_tokens + next(tokens)
                for sample, text in zip(part, texts, strict=True)
            ]
        return found

    def template_bytes(self) -> int:
        """Return how many bytes the template adds to a row's own texts, with the tokens that the processor adds.

        A token has at least one byte, so that a row's own bytes, these and its image tokens bound its length.
        """
        row = Sample(image=None, prompt=Prompt(instruction=PROBE_PROMPT), answer=PROBE_ANSWERS[0], language="")
        own = len((row.prompt.text + row.answer).encode())
        return len(self._text(row, None).encode()) - own + max(self._added_tokens, 0)

    def _probe(self) -> tuple[int, int]:
        """The token that ends an answer, and how many tokens the processor adds to a text of its own accord.

        UserError when the tokens of the generation prompt are not those that a row with an answer begins with.
        """
        prompt = Prompt(instruction=PROBE_PROMPT)
        rows = [(Sample(image=None, prompt=prompt, answer=answer, language=""), None) for answer in PROBE_ANSWERS]
        whole, asked = self._encode(rows), self._encode_prompts(rows[:1])["input_ids"][0].tolist()
        if any(row[: len(asked)] != asked for row in whole["input_ids"].tolist()):
            raise UserError(
                "a row with an answer does not begin with the tokens of the chat template's generation prompt, which "
                f"ends in {self._prompt_text(*rows[0])[-12:]!r}: the tokenizer joins that with the answer, or the "
                "template writes something else there. Training and generation would differ. Give the tokenizer a "
                "template whose generation prompt is the start of the answer's turn and ends in a special token or a "
                "line break; a space after it belongs to the answer's side."
            )
        ids = whole["input_ids"][0]
        added = int(whole["attention_mask"][0].sum()) - self._counted([self._text(*rows[0])])[0]
        return int(ids[whole["assistant_masks"][0].bool()][-1]), added

    def _choose_template(self) -> str:
        """The family's template when it renders as the processor's own does, else the processor's own."""
        own, family = own_template(self.processor), self.family_template
        template = family if family and (own is None or first_difference(self.processor, family, own) is None) else own
        if template is None:
            raise UserError("the tokenizer has no chat template: load it with inft.models.loading.load_processor.")
        return template

    def _neutral(self, sample: Sample) -> Sample:
        """The sample with control tokens in its texts made plain; surrounding white space carries no meaning."""
        prompt = replace(
            sample.prompt,
            instruction=neutralise(sample.prompt.instruction, self.control),
            news=neutralise(sample.prompt.news.strip(), self.control),
        )
        answer = neutralise(sample.answer.strip(), self.control)
        return replace(sample, prompt=prompt, answer=answer)

    def _load(self, sample: Sample) -> "Image | None":
        return None if sample.image is None else sample.image.load()

    def _messages(self, sample: Sample, image: Any, *, answered: bool = True) -> list[Message]:
        return conversation(sample.prompt.text, sample.answer if answered else None, image=image, parts=self.parts)

    def _dialogue(self, sample: Sample, image: Any, before: Sequence[tuple[Sample, Any]]) -> list[Message]:
        """The examples before a prompt as answered turns, and the prompt."""
        turns = [turn for shot in before for turn in self._messages(*shot)]
        return [*turns, *self._messages(sample, image, answered=False)]

    def _prompt_text(self, sample: Sample, image: Any, before: Sequence[tuple[Sample, Any]] = ()) -> str:
        return render(self.processor, self.template, self._dialogue(sample, image, before), generation_prompt=True)

    def _text(self, sample: Sample, image: Any) -> str:
        return render(self.processor, self.template, self._messages(sample, image), generation_prompt=False)

    def _image_text(self, size: tuple[int, int]) -> str | None:
        """What the processor writes for an image of this size (width, height); None: it has to process it to know."""
        return None

    def _text_with_image_tokens(self, sample: Sample) -> str | None:
        """The row's text as it is tokenised; None when only processing its image tells."""
        image = self._load(sample)
        if image is None:
            return self._text(sample, None)
        image_text = self._image_text(image.size)
        if image_text is None:
            return None
        return self._text(sample, image).replace(self.processor.image_token, image_text)

    def _exact_length(self, sample: Sample) -> int:
        return int(self._encode([(sample, self._load(sample))])["attention_mask"].sum())

    def _counted(self, texts: list[str]) -> list[int]:
        """Tokens of each text, without those that the processor adds."""
        return [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []

    def _split(self, sample: Sample, image: Any) -> tuple[str, str, str]:
        """The row's text as (before the supervised part, supervised part, after it)."""
        assert self.frame is not None
        prompt, whole = self._prompt_text(sample, image), self._text(sample, image)
        answer = self.frame.lead + sample.answer + self.frame.end
        if whole != prompt + answer + self.frame.trailing:
            raise UserError(
                f"{where(sample)}: the chat template does not render this answer after its own generation prompt "
                f"({whole[-80:]!r}). Give the tokenizer a template that writes answers unchanged."
            )
        return prompt, answer, self.frame.trailing

    def _spliced(self, sample: Sample, image: Any) -> list[Message]:
        before, answer, after = self._split(sample, image)
        content = [] if image is None else [{"type": "image", "image": image}]
        return [{"role": "user", "content": content, "before": before, "answer": answer, "after": after}]

    def _encode(self, rows: Sequence[tuple[Sample, Any]]) -> dict[str, Any]:
        """The processor's tensors of whole rows and `assistant_masks` [rows, tokens], 1 where supervised."""
        if self.frame is None:
            template, messages = self.template, [self._messages(*row) for row in rows]
        else:
            template, messages = SPLICE_TEMPLATE, [self._spliced(*row) for row in rows]
        return self._process(messages, template, "right", return_assistant_tokens_mask=True)

    def _encode_prompts(
        self, rows: Sequence[tuple[Sample, Any]], shots: Sequence[Sequence[tuple[Sample, Any]]] = ()
    ) -> dict[str, Any]:
        befores = shots or [()] * len(rows)
        messages = [self._dialogue(*row, before) for row, before in zip(rows, befores, strict=True)]
        return self._process(messages, self.template, "left", add_generation_prompt=True)

    def _process(self, messages: list[list[Message]], template: str, side: str, **options: bool) -> dict[str, Any]:
        # Lists first: the mask is made token by token, which on tensors takes longer than all the rest.
        batch = self.processor.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_tensors=None,
            processor_kwargs={"padding": True, "padding_side": side},
            **template_variables(template),
            **options,
        )
        return dict(batch.convert_to_tensors("pt"))

    def _fit(
        self,
        rows: Sequence[tuple[Sample, Any]],
        lengths: Sequence[int],
        text: Callable[[Sample, Any], str],
        *,
        may_drop: bool = True,
    ) -> list[tuple[Sample, Any]]:
        """The rows with every one above max_length shortened or dropped; UserError as over_length says."""
        fitted = []
        for (sample, image), length in zip(rows, lengths, strict=True):
            if length <= self.max_length:
                fitted.append((sample, image))
            elif self.over_length == "error":
                raise UserError(f"{self._too_long(sample, length)}, or set sft.over_length to shorten or drop.")
            elif self.over_length == "drop" and may_drop:
                self._counts[1] += 1
            else:
                fitted.append((self._shorten(sample, image, length, text), image))
                self._counts[0] += 1
        if not fitted:
            names = ", ".join(self._too_long(sample, length) for (sample, _), length in zip(rows, lengths, strict=True))
            raise UserError(f"every row of a batch was dropped: {names}, or set sft.over_length to shorten.")
        return fitted

    def _fit_alike(
        self, rows: Sequence[tuple[Sample, Any]], lengths: Sequence[int], answers: int
    ) -> list[tuple[Sample, Any]]:
        """The rows with the prompt of each as short as the longest row of the same prompt needs it."""
        count, fitted = len(rows) // answers, list(rows)
        for first in range(count):
            places = range(first, len(rows), count)
            longest = max(places, key=lengths.__getitem__)
            if lengths[longest] <= self.max_length:
                continue
            ((sample, _),) = self._fit([rows[longest]], [lengths[longest]], self._text, may_drop=False)
            for place in places:
                fitted[place] = replace(rows[place][0], prompt=sample.prompt), rows[place][1]
        return fitted

    def _too_long(self, sample: Sample, length: int) -> str:
        remedy = "Raise basic.max_length"
        if self.tiles_are_tokens and sample.image is not None:
            remedy += " or lower basic.max_image_tiles"
        return f"{where(sample)} has {length} tokens, above max_length={self.max_length}. {remedy}"

    def _shorten(self, sample: Sample, image: Any, length: int, text: Callable[[Sample, Any], str]) -> Sample:
        """The sample with the longest beginning of its news text that fits into max_length."""

        def cut(end: int) -> Sample:
            return replace(sample, prompt=sample.prompt.with_news(sample.prompt.news[:end].rstrip()))

        def count(end: int) -> int:
            return constant + self._counted([text(cut(end), image)])[0]

        # Image tokens and what the tokenizer adds are the same for every cut.
        constant = 0
        ends = [0, *character_ends(sample.prompt.news)]
        constant = length - count(ends[-1])
        if (needed := count(0)) > self.max_length:
            raise UserError(f"{self._too_long(sample, needed)}: it does not fit even without its news text.")
        best = max(bisect_right(ends, self.max_length, key=count) - 1, 0)
        while count(ends[best]) > self.max_length:  # merges can make a longer text one token shorter than its beginning
            best -= 1
        return cut(ends[best])


def where(sample: Sample) -> str:
    """Return the words that name a sample in a message: its place in the source, or its title."""
    return str(sample.meta.get("where") or sample.meta.get("title") or f"the row {sample.answer[:40]!r}")


def character_ends(text: str) -> list[int]:
    """Return the positions where a text can be cut without parting a letter from its marks or an emoji sequence."""
    joiner = "\u200d"

    def continues(i: int) -> bool:
        return text[i] == joiner or text[i - 1] == joiner or unicodedata.category(text[i]).startswith("M")

    return [i for i in range(1, len(text) + 1) if i == len(text) or not continues(i)]


def _channels_last(batch: dict[str, Any]) -> dict[str, Tensor]:
    """The batch with its images [..., channels, height, width] laid out channels last, as convolutions like them.

    Dimensions before these three (rows, images, tiles) stay in order, so that merging them copies nothing.
    """
    pixels = batch.get("pixel_values")
    if pixels is not None:
        tiles = pixels.flatten(end_dim=-4).contiguous(memory_format=torch.channels_last)
        batch["pixel_values"] = tiles.unflatten(0, pixels.shape[:-3])
    return batch
