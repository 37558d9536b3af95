"""A step of each trainer with CRAFT in joint mode against a step of the same trainer without it.

Rows are texts of random words, prompts and answers of 12 to 32 words, eight rows a step; the model is the Llama of
trainer_steps.py. GRPO, RLOO and PPO generate 16 tokens a row in each step, PPO with one epoch a rollout. With
self_align both losses share a forward pass: what is added is pooling, the head and the similarities. Eight pairs beside
a step's rows are two more passes of the backbone.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from compared import Compared, Ratio
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from trainer_steps import ALPHA, PAD, VOCABULARY, Step, llama, settings
from transformers import PreTrainedTokenizerFast
from trl.experimental.orpo import ORPOTrainer

import craft
from craft.ppo.trainer import PPOTrainer

ROWS = 8
SHORTEST, LONGEST = 12, 32  # words of a prompt, and of an answer
GENERATED = 16  # tokens
LIMIT = 1.05
PLAIN: dict[str, type] = {
    "DPO": trl.DPOTrainer,
    "ORPO": ORPOTrainer,
    "KTO": trl.KTOTrainer,
    "GRPO": trl.GRPOTrainer,
    "RLOO": trl.RLOOTrainer,
    "PPO": PPOTrainer,
}
GENERATING = {
    "GRPO": {"num_generations": 2, "max_completion_length": GENERATED},
    "RLOO": {"num_generations": 2, "max_completion_length": GENERATED, "beta": 0.0},
    "PPO": {"num_ppo_epochs": 1, "max_completion_length": GENERATED},
}
LIBRARY = {"PPO": "ours without"}  # TRL has none; the others stand against TRL's


class Stepping(Step):
    """A Step of a trainer that may generate first: its loss is made of rows, not of a batch that can be used again."""

    def __call__(self) -> float:
        if hasattr(self.trainer, "_buffered_inputs"):
            self.trainer._buffered_inputs = None  # a rollout in every step
        torch.manual_seed(0)  # of as many tokens in each
        return super().__call__()


def methods(directory: Path) -> Compared:
    """Each method plain, with self_align and with pairs."""
    found = Compared()
    for method in PLAIN:
        variants = {
            method: step(method, directory, None),
            f"CRAFT {method}": step(method, directory, "self_align"),
            f"CRAFT {method}, pairs": step(method, directory, "paired_dataset"),
        }
        if method not in GENERATING:
            check_own_part(method, variants[method], directory)
        peer, ours, paired = variants
        over = f"{method} step with self_align over {LIBRARY.get(method, 'TRL' + chr(39) + 's')}, {ROWS} rows"
        found.add(
            Compared(
                variants=dict(variants),
                ratios=[
                    Ratio(what=over, ours=ours, peer=peer, limit=LIMIT),
                    Ratio(what=f"the same with {ROWS} pairs beside them instead", ours=paired, peer=peer),
                ],
            )
        )
    return found


def step(method: str, directory: Path, strategy: str | None, **changes: Any) -> Stepping:
    """The step of a trainer on the rows that its own loader gives; without CRAFT where ``strategy`` is None."""
    cls = PLAIN[method] if strategy is None else changes.pop("cls", getattr(craft, f"CRAFT{method}Trainer"))
    args = getattr(craft, f"CRAFT{method}Config")(
        **settings(directory),
        **GENERATING.get(method, {}),
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        craft_alpha=ALPHA,
    )
    pairs = {"contrastive_dataset": paired_texts()} if strategy == "paired_dataset" else {}
    rewards = {"reward_funcs": brevity} if method in GENERATING else {}
    reference = {"ref_model": llama()} if method in ("DPO", "KTO", "PPO") else {}
    trainer = cls(
        model=llama(),
        args=args,
        train_dataset=rows_of(method),
        processing_class=words_tokenizer(),
        **pairs,
        **rewards,
        **reference,
    )
    trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))
    return Stepping(trainer, [batch])


def check_own_part(method: str, plain: Step, directory: Path) -> None:
    """Without the contrastive loss, loss and gradients are alpha times those of the plain trainer."""
    ours: type = getattr(craft, f"CRAFT{method}Trainer")

    class WithoutPairs(ours):  # type: ignore[misc, valid-type]
        def _compute_craft_contrastive_loss(self, anchors_BD: Tensor, positives_BD: Tensor, **known: Any) -> Tensor:
            return 0.0 * anchors_BD.sum(1)

    without = step(method, directory, "self_align", cls=WithoutPairs)
    without.window = plain.window
    torch.testing.assert_close(without() / ALPHA, plain(), rtol=1e-5, atol=0)
    wanted = plain.gradients()
    for name, gradient in without.gradients().items():
        torch.testing.assert_close(gradient / ALPHA, wanted[name], rtol=1e-3, atol=1e-6, msg=name)


def words_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=f"w{PAD}", eos_token="w2", padding_side="left")


def phrases(count: int, seed: int) -> list[str]:
    """Texts of random words."""
    draw = random.Random(seed)
    lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(count)]
    return [" ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(length)) for length in lengths]


def rows_of(method: str) -> Dataset:
    """Eight rows in the form that a method takes."""
    prompts, chosen, rejected = (phrases(ROWS, seed) for seed in (0, 1, 2))
    if method in GENERATING:
        return Dataset.from_dict({"prompt": prompts})
    if method == "KTO":
        labels = [number % 2 == 0 for number in range(ROWS)]
        return Dataset.from_dict({"prompt": prompts, "completion": [f" {text}" for text in chosen], "label": labels})
    answers = {"chosen": chosen, "rejected": rejected}
    return Dataset.from_dict({"prompt": prompts, **{name: [f" {t}" for t in texts] for name, texts in answers.items()}})


def paired_texts() -> Dataset:
    """Eight pairs as long as prompt and answer."""
    return Dataset.from_dict({"text": phrases(ROWS, 3), "text_tgt": phrases(ROWS, 4)})


def brevity(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that takes no time."""
    return [-float(len(text)) for text in completions]
