# %% [markdown]
"""
# InfoNCELoss in a plain transformers.Trainer, by hand and by the mixin

    python scripts/examples/03a_craft_loss_transformers_trainer.py

`InfoNCELoss` is a module like any other: a `compute_loss` of your own can call it. This example does that in thirty
lines, then trains the same model with `CRAFTTrainerMixin` on the same `Trainer`, and compares the two step by step:
without gradient accumulation they are the same objective, and their losses agree to rounding. Then it says what the
mixin does that the thirty lines do not.

Half a minute on one core with the embedded tiny model.
"""

# %%
from shared.options import options

OPTIONS = options(__doc__, name="03a_craft_loss_transformers_trainer", steps=160)

# %%
from dataclasses import dataclass

import torch
from datasets import Dataset
from shared.curves import Panel, draw
from shared.models import model_path, run_settings, scores, translate
from shared.progress import follow
from shared.summary import finish, show_texts, table
from shared.texts import Translation, corpus
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from craft import (
    CRAFTCollator,
    CRAFTConfigMixin,
    CRAFTTrainerMixin,
    InfoNCELoss,
    LastHiddenStateHook,
    compute_contrastive_accuracy,
)

ALPHA, TEMPERATURE, DIMENSIONS = 0.6, 0.05, 64

# %% [markdown]
# ## Rows
# A plain `Trainer` takes tokens. The labels are those of the answer, -100 elsewhere; they also tell the two sides of
# the pair: the prompt is the anchor, its answer the positive, and the answers of the other rows are the negatives.

# %%
texts = corpus(OPTIONS)
path = model_path(OPTIONS)
tokenizer = AutoTokenizer.from_pretrained(path)


def tokens(row: Translation) -> dict[str, list[int]]:
    question = texts.question(row.text)
    answer = [{"role": "assistant", "content": row.translation}]
    before = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    after = tokenizer.apply_chat_template([*question, *answer], tokenize=False).removeprefix(before)
    prompt, response = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
    return {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}


rows = Dataset.from_list([tokens(each) for each in texts.train])
collator = CRAFTCollator(pad_token_id=tokenizer.pad_token_id)
print({name: tuple(column.shape) for name, column in collator([rows[0], rows[1]]).items()})

# %% [markdown]
# ## By hand
# Four things that are easily forgotten:
#
# 1. The projection head has weights. They must be in the optimizer, and their gradients set to zero after each step:
#    the `Trainer` does both for what is part of the model, so the loss is made part of it (and taken out before
#    saving).
# 2. `output_hidden_states=True` would keep the states of every layer; the hook keeps the last one.
# 3. Evaluation must not be scaled: outside of training the loss is the model's own.
# 4. The `Trainer` divides its own loss by the tokens of all accumulated micro-batches, and so divides nothing
#    afterwards. A term that is a mean over one micro-batch must be divided by their number here.


# %%
class HandmadeTrainer(Trainer):
    def __init__(self, *args, info_nce: InfoNCELoss, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.info_nce = info_nce.to(self.args.device)
        self.hook = LastHiddenStateHook(self.model)
        self.parts: list[tuple[float, float, float]] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        own, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if not model.training:
            return (own, outputs) if return_outputs else own
        answer_BT = inputs["labels"] != -100
        prompt_BT = inputs["attention_mask"].bool() & ~answer_BT
        hidden_BTH = self.hook.get()
        contrast, details = self.model.info_nce(hidden_BTH, hidden_BTH, prompt_BT, answer_BT, return_details=True)
        self.hook.clear()
        accuracy = compute_contrastive_accuracy(details["anchor_embeddings"], details["positive_embeddings"])
        self.parts.append((own.item(), contrast.item(), accuracy.item()))
        loss = ALPHA * own + (1 - ALPHA) * contrast / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.parts:
            names = ("loss/craft_sft", "loss/craft_contrast", "metrics/craft_contrastive_accuracy")
            logs.update(zip(names, torch.tensor(self.parts).mean(0).tolist(), strict=True))
            self.parts.clear()
        super().log(logs, *args, **kwargs)


settings = {
    **run_settings(OPTIONS),
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 0.0,  # off: the mixin clips model and head apart, a Trainer whatever is in the model together
    "remove_unused_columns": False,
}
written: dict[str, list[str]] = {}
found: dict[str, dict[str, float]] = {}
histories = {}


def fresh_model():
    return AutoModelForCausalLM.from_pretrained(path, dtype="float32")


def run(name: str, trainer: Trainer) -> None:
    follow(trainer, "loss", "loss/craft_sft", "loss/craft_contrast", "metrics/craft_contrastive_accuracy")
    trainer.train()
    written[name] = translate(trainer.model, tokenizer, texts, texts.held_out)
    found[name] = scores(written[name], texts.held_out, texts)
    histories[name] = trainer.state.log_history


base = fresh_model()
written["before"] = translate(base, tokenizer, texts, texts.held_out)
found["before"] = scores(written["before"], texts.held_out, texts)

torch.manual_seed(OPTIONS.seed)  # the mixin makes its head from this seed, too
head = InfoNCELoss(temperature=TEMPERATURE, hidden_size=base.config.hidden_size, projection_dim=DIMENSIONS)
run(
    "by hand",
    HandmadeTrainer(
        model=base,
        args=TrainingArguments(**settings),
        train_dataset=rows,
        data_collator=collator,
        info_nce=head,
    ),
)

# %% [markdown]
# ## By the mixin
# The same `Trainer`, with `CRAFTTrainerMixin` before it and its fields in the arguments. `self_align` means what was
# done by hand: each prompt against its own answer, both losses from one forward pass.


# %%
@dataclass
class Arguments(CRAFTConfigMixin, TrainingArguments):
    """Training arguments with the fields of CRAFT."""


class MixedTrainer(CRAFTTrainerMixin, Trainer):
    """A plain Trainer with the contrastive term."""


run(
    "mixin",
    MixedTrainer(
        model=fresh_model(),
        args=Arguments(**settings, craft_alpha=ALPHA, craft_temperature=TEMPERATURE, craft_projection_dim=DIMENSIONS),
        train_dataset=rows,
        data_collator=collator,
        craft_strategy="self_align",
    ),
)

# %% [markdown]
# ## Side by side

# %%
losses = {name: [entry["loss"] for entry in history if "loss" in entry] for name, history in histories.items()}
apart = [abs(one - other) for one, other in zip(*losses.values(), strict=True)]
print(f"the two losses differ by {apart[0]:.1e} in the first log entry and by {max(apart):.1e} at most")
draw(
    OPTIONS.output_dir / "curves.png",
    [
        Panel(title="Fine-tuning loss", y="nats per token", curves={"loss/craft_sft": ""}, logarithmic=True),
        Panel(title="Contrastive loss", y="nats per anchor", curves={"loss/craft_contrast": ""}),
    ],
    histories,
)
show_texts(texts.held_out, written)
table(found, title=f"{len(texts.held_out)} held-out texts")

# %% [markdown]
# ## What the mixin adds
# With gradient accumulation, several processes or rows of unequal length the thirty lines are a mean of means; the
# mixin weighs by the tokens and anchors of the whole step, so that `craft_alpha` is the share it says. It also clips
# the head apart, writes head, temperature and queue into every checkpoint and reads them back on resume, gathers
# negatives over processes, takes equal texts out of the negatives, and offers pairs of your own (`paired_dataset`),
# GradCache, a queue of negatives and gradient balancing.

# %%
finish(OPTIONS, {"scores": found, "largest difference of the losses": max(apart)})
