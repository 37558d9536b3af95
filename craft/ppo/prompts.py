"""Prompts: rows of a data set become left-padded inputs of the model, in rollouts of a fixed number of rows."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Sampler

from craft.sampler import shuffled

PromptCollator = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]]
SHOWN = 80  # characters of a prompt in a message


class ChatPromptCollator:
    """Rows with a "prompt" (text or chat messages), and "image" or "images" where they have any, as model inputs.

    Texts are tokenised as they are. Chat messages get the chat template with its generation prompt; images go before
    the text of the first user message, or where its content has parts of type "image" for them.
    Errors: ValueError for images beside a prompt that is plain text, and for other numbers of them than of parts.
    """

    def __init__(self, processing_class: Any) -> None:
        self.processing_class = processing_class
        self.in_parts = hasattr(processing_class, "image_processor")  # content as typed parts, as processors want it

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the inputs of some prompts, left-padded."""
        padding = {"padding": True, "padding_side": "left"}
        chat = [not isinstance(row["prompt"], str) for row in rows]
        if any(chat) and not all(chat):
            raise ValueError("some prompts are text and some are chat messages: give all of them in one form.")
        if all(chat):
            return self._chat(rows, padding)
        if any(images_of(row) for row in rows):
            raise ValueError(
                "a prompt with an image must be chat messages, for the chat template to place the image: "
                '[{"role": "user", "content": "…"}].'
            )
        return dict(self.processing_class(text=[row["prompt"] for row in rows], return_tensors="pt", **padding))

    def _chat(self, rows: Sequence[Mapping[str, Any]], padding: Mapping[str, Any]) -> dict[str, Tensor]:
        processing_class, prompted = self.processing_class, {"add_generation_prompt": True}
        messages = [self._messages(row) for row in rows]
        if self.in_parts:
            made = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": padding}
            return dict(processing_class.apply_chat_template(messages, **prompted, **made))
        texts = processing_class.apply_chat_template(messages, tokenize=False, **prompted)
        return dict(processing_class(text=texts, add_special_tokens=False, return_tensors="pt", **padding))

    def _messages(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        images = images_of(row)
        if not self.in_parts:
            if images:
                raise ValueError(
                    f"prompt {shortened(row['prompt'])} has an image, and the processing_class is a tokenizer, which "
                    "takes none: give the processor of a vision-language model, or drop the images."
                )
            return list(row["prompt"])
        messages = [{**message, "content": _parts(message["content"])} for message in row["prompt"]]
        places = [part for m in messages for part in m["content"] if part["type"] == "image" and "image" not in part]
        if images and not places:
            first = next((message for message in messages if message["role"] == "user"), messages[0])
            places = [{"type": "image"} for _ in images]
            first["content"] = [*places, *first["content"]]
        if len(places) != len(images):
            raise ValueError(
                f"prompt {shortened(row['prompt'])} has {len(places)} places for images, and its row has {len(images)}."
            )
        for place, image in zip(places, images, strict=True):
            place["image"] = image
        return messages


def _parts(content: Any) -> list[dict[str, Any]]:
    """Content as typed parts; keys without a value, as a table of mixed parts has them, are left out."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{key: value for key, value in part.items() if value is not None} for part in content]


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """Return the images of a row: those of its column "images", or the one of "image"."""
    if row.get("images") is not None:
        return list(row["images"])
    return [] if row.get("image") is None else [row["image"]]


def shortened(prompt: Any) -> str:
    """Return the beginning of a prompt for a message."""
    if not isinstance(prompt, str) and prompt and isinstance(prompt[-1], Mapping):
        prompt = prompt[-1].get("content") or ""
    if isinstance(prompt, list):
        prompt = " ".join(part["text"] for part in prompt if isinstance(part, Mapping) and part.get("text"))
    text = str(prompt)
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "…")


def check_rows(dataset: Any, name: str) -> None:
    """Refuse a data set that cannot be learned from.

    Errors: TypeError for one without length; ValueError without rows, without a column "prompt", and for a row whose
    prompt is empty, which it names.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{name} is a {type(dataset).__name__}, which has no length: rollouts come back to their rows. "
            "Load it as a data set in memory or on disk (without streaming=True)."
        )
    if not len(dataset):
        raise ValueError(f"{name} has no rows.")
    columns = getattr(dataset, "column_names", None) or list(dataset[0])
    if "prompt" not in columns:
        raise ValueError(f"{name} has no column 'prompt'; it has {', '.join(map(str, columns))}.")
    # Of a table one column is read; the rows of another data set may cost an image each, and are met in training.
    if hasattr(dataset, "column_names"):
        prompts = dataset["prompt"]
    elif isinstance(dataset, list | tuple):
        prompts = (row["prompt"] for row in dataset)
    else:
        return
    for row, prompt in enumerate(prompts):
        if is_empty(prompt):
            raise ValueError(f"row {row} of {name} has an empty prompt. Drop the row, or give it one.")


def is_empty(prompt: Any) -> bool:
    """Whether there is nothing to answer: no text, no messages, or a last message without content."""
    if isinstance(prompt, str):
        return not prompt.strip()
    if not prompt:
        return True
    content = prompt[-1].get("content")
    return not (content.strip() if isinstance(content, str) else content)


def check_inputs(inputs: Mapping[str, Tensor], rows: Sequence[Mapping[str, Any]], limit: int | None) -> None:
    """Refuse prompts that no completion can follow; ``limit`` is how many tokens the context leaves them.

    Errors: ValueError naming the prompt that has no token, or more than the limit; for inputs that are not left-padded.
    """
    mask_BT = inputs["attention_mask"].bool()
    for row, length in zip(rows, mask_BT.sum(1).tolist(), strict=True):
        if not length:
            raise ValueError(f"prompt {shortened(row['prompt'])} has no token. Drop the row, or give it a prompt.")
        if limit is not None and length > limit:
            raise ValueError(
                f"prompt {shortened(row['prompt'])} has {length} tokens; with max_completion_length the model's "
                f"context leaves {limit}. Drop or shorten the row, or lower max_completion_length."
            )
    if not mask_BT[:, -1].all():
        raise ValueError("the prompts are not left-padded: the prompt collator must pad with padding_side='left'.")


class RolloutSampler(Sampler[int]):
    """The order of the prompts: in groups of a rollout's rows, each group ``repeats`` times in a row.

    One pass is one epoch, shuffled by (seed, ``epoch()``) alone. The last group is filled up with the first rows of
    the epoch, or left out with ``drop_last``.
    """

    def __init__(
        self,
        rows: int,
        *,
        group: int,
        repeats: int,
        seed: int,
        epoch: Callable[[], int],
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.rows, self.group, self.repeats = rows, group, repeats
        self.seed, self.shuffle, self.epoch = seed, shuffle, epoch
        self.groups = rows // group if drop_last else -(-rows // group)
        if not self.groups:
            raise ValueError(
                f"train_dataset has {rows} rows and a rollout {group}: with dataloader_drop_last=True none is left. "
                "Lower per_device_train_batch_size or gradient_accumulation_steps, or turn it off."
            )

    def __iter__(self) -> Iterator[int]:
        order = shuffled(self.rows, seed=self.seed, round_=self.epoch()) if self.shuffle else range(self.rows)
        endless = itertools.cycle(order)
        for _ in range(self.groups):
            group = list(itertools.islice(endless, self.group))
            for _ in range(self.repeats):
                yield from group

    def __len__(self) -> int:
        return self.groups * self.group * self.repeats
