"""Base training of a tiny model, all weights from scratch, as a plain loop over pre-tokenised captions and images.

Shapes: B batch, T tokens, V vocabulary, D width.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin

from inft.data.prompts import build_prompt
from inft.data.sample import keywords, scenes
from inft.data.scene_captions import caption
from inft.data.scenes import COMBINATIONS, Attributes, DrawnImage
from inft.sample import Sample
from params import MUNIChusLoadConfig
from tiny_models.families import Family

BASE_LANGUAGES = ("ar", "en", "fr", "hi", "id", "ja", "zh")  # ur, si and yue are left for fine-tuning
FIRST_ROUND = 1000  # rounds of drawings that the sample source never reaches


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyperparameters of the base training."""

    seed: int = 42
    steps: int = 4000  # optimiser steps
    batch_size: int = 32  # captions
    rounds: int = 20  # images drawn of each training combination
    lr: float = 1.5e-3  # peak, cosine to 0
    warmup: int = 200  # steps
    weight_decay: float = 0.05  # of matrices, embeddings and head excepted
    max_grad_norm: float = 1.0


RECIPES: Mapping[str, Recipe] = {
    "llama32": Recipe(rounds=30),
    "aya": Recipe(steps=3500),
    "text": Recipe(steps=800, warmup=80),
}


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Tokenised conversations, one row for each (language, combination), and the images that may go with them."""

    input_ids: Tensor  # (rows, T)
    labels: Tensor  # (rows, T), -100 everywhere but on answers and their ends
    attention_mask: Tensor  # (rows, T)
    cross_attention_mask: Tensor | None  # (rows, T, 1, 1) of models that cross-attend
    row: Mapping[tuple[str, Attributes], int]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Processed images of scenes."""

    attributes: Sequence[Attributes]
    pixel_values: Tensor  # (images, …) in float16
    constant: Mapping[str, Tensor]  # (1, …) what the processor says of every image alike


def tokenise(processor: ProcessorMixin, family: Family, languages: Sequence[str]) -> Captions:
    """Render and tokenise each (language, combination) with the family's own collator."""
    keys = [(language, attributes) for language in languages for attributes in COMBINATIONS]
    collator = family.collator(processor)
    samples = [_sample(family, *key) for key in keys]
    batches = [collator(samples[start : start + 64]) for start in range(0, len(samples), 64)]

    def joined(name: str, padding: int) -> Tensor:
        length = max(batch[name].shape[1] for batch in batches)
        padded = []
        for batch in batches:
            missing = (0, 0) * (batch[name].dim() - 2) + (0, length - batch[name].shape[1])
            padded.append(F.pad(batch[name], missing, value=padding))
        return torch.cat(padded)

    cross_attends = "cross_attention_mask" in batches[0]
    return Captions(
        input_ids=joined("input_ids", collator.tokenizer.pad_token_id),
        labels=joined("labels", -100),
        attention_mask=joined("attention_mask", 0),
        # Padding may look at the image: nothing is learned from it.
        cross_attention_mask=joined("cross_attention_mask", 1) if cross_attends else None,
        row={key: row for row, key in enumerate(keys)},
    )


def _sample(family: Family, language: str, attributes: Attributes) -> Sample:
    config = MUNIChusLoadConfig(context="none" if family.takes_images else "content")
    return Sample(
        image=DrawnImage(attributes=attributes, seed="any") if family.takes_images else None,
        prompt=build_prompt(config, language=language, title="", content=keywords(attributes)),
        answer=caption(attributes, language),
        language=language,
    )


def draw_pictures(processor: ProcessorMixin, split: str, *, rounds: int, first_round: int = 0) -> Pictures:
    """Draw and process the scenes of a split."""
    drawn = list(scenes(split, rounds=rounds, first_round=first_round))
    batches = []
    for start in range(0, len(drawn), 64):
        images = [[scene.image.load()] for scene in drawn[start : start + 64]]
        batches.append(processor.image_processor(images, return_tensors="pt"))
    constant = {k: batches[0][k][:1] for k in ("aspect_ratio_ids", "aspect_ratio_mask") if k in batches[0]}
    pixel_values = torch.cat([batch["pixel_values"].half() for batch in batches])
    return Pictures(attributes=[scene.attributes for scene in drawn], pixel_values=pixel_values, constant=constant)


def inputs(captions: Captions, rows: Tensor, pictures: Pictures | None, picked: Tensor) -> dict[str, Tensor]:
    """The model's inputs for rows of captions and the pictures picked for them."""
    batch = {"input_ids": captions.input_ids[rows], "attention_mask": captions.attention_mask[rows]}
    if captions.cross_attention_mask is not None:
        batch["cross_attention_mask"] = captions.cross_attention_mask[rows]
    if pictures is not None:
        batch["pixel_values"] = pictures.pixel_values[picked].float()
        batch |= {k: v.expand(len(rows), *v.shape[1:]) for k, v in pictures.constant.items()}
    return batch


def scores(model: PreTrainedModel, batch: dict[str, Tensor], labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Logits (supervised tokens, V) with Cohere's scale applied, and their targets."""
    hidden_BTD = model.model(**batch, use_cache=False).last_hidden_state[:, :-1]
    supervised = labels[:, 1:] != -100
    return model.lm_head(hidden_BTD[supervised]) * scale, labels[:, 1:][supervised]


def keep_unseen_rows(model: PreTrainedModel, seen: Tensor) -> None:
    """Freeze the embedding and head rows of the tokens that no training text contains.

    A softmax over the whole vocabulary would push all of them to one point, where LoRA, which adapts neither
    embedding nor head, could not tell the words of a new language apart.
    """
    for weight in {model.get_input_embeddings().weight, model.lm_head.weight}:
        mask = torch.zeros(weight.shape[0], 1)
        mask[seen[seen < len(weight)]] = 1.0  # the head of Llama has no row for <|image|>
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)


def train(model: PreTrainedModel, processor: ProcessorMixin, family: Family, recipe: Recipe) -> list[float]:
    """Train every weight; returns the loss of each step."""
    rng = torch.Generator().manual_seed(recipe.seed)
    captions = tokenise(processor, family, BASE_LANGUAGES)
    pictures = _training_pictures(processor, family, recipe)
    shown = pictures.attributes if pictures else [scene.attributes for scene in scenes("train", rounds=1)]
    rows_of = torch.tensor([[captions.row[language, a] for language in BASE_LANGUAGES] for a in shown])
    keep_unseen_rows(model, captions.input_ids[rows_of.unique()].unique())
    optimiser = _optimiser(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _share_of_peak(step, recipe))
    losses, started = [], time.perf_counter()
    model.train()
    for step in range(recipe.steps):
        picked = torch.randint(len(shown), (recipe.batch_size,), generator=rng)
        language = torch.randint(len(BASE_LANGUAGES), (recipe.batch_size,), generator=rng)
        rows = rows_of[picked, language]
        logits, targets = scores(
            model, inputs(captions, rows, pictures, picked), captions.labels[rows], family.logit_scale
        )
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 250 == 0:
            seconds = time.perf_counter() - started
            print(f"step {step + 1}/{recipe.steps}  loss {sum(losses[-250:]) / 250:.4f}  {seconds:.0f} s", flush=True)
    return losses


def _training_pictures(processor: ProcessorMixin, family: Family, recipe: Recipe) -> Pictures | None:
    if not family.takes_images:
        return None
    return draw_pictures(processor, "train", rounds=recipe.rounds, first_round=FIRST_ROUND)


def _optimiser(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    tables = {id(model.get_input_embeddings().weight), id(model.lm_head.weight)}
    decayed = [p for p in model.parameters() if p.ndim > 1 and id(p) not in tables]
    kept = [p for p in model.parameters() if p.ndim <= 1 or id(p) in tables]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))


def _share_of_peak(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup) / (recipe.steps - recipe.warmup)))


@torch.no_grad()
def exact_share(
    model: PreTrainedModel, processor: ProcessorMixin, family: Family, languages: Sequence[str], split: str
) -> dict[str, float]:
    """Share of captions whose every token is the most likely one: exactly the captions that greedy search writes."""
    model.eval()
    captions = tokenise(processor, family, languages)
    pictures = draw_pictures(processor, split, rounds=2) if family.takes_images else None
    shown = pictures.attributes if pictures else [scene.attributes for scene in scenes(split, rounds=1)]
    picked = torch.arange(len(shown))
    shares = {}
    for language in languages:
        rows = torch.tensor([captions.row[language, attributes] for attributes in shown])
        labels = captions.labels[rows]
        logits, targets = scores(model, inputs(captions, rows, pictures, picked), labels, family.logit_scale)
        wrong = torch.zeros_like(labels[:, 1:], dtype=torch.bool)
        wrong[labels[:, 1:] != -100] = logits.argmax(-1) != targets
        shares[language] = round(1.0 - wrong.any(1).float().mean().item(), 4)
    return shares
