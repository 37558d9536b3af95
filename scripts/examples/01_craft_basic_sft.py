# %% [markdown]
"""
# CRAFT in its smallest form: fine-tuning with pairs beside it

    python scripts/examples/01_craft_basic_sft.py

A model learns to translate captions, and beside it that a caption and its translation mean the same. Two data sets
make that: rows to learn from (`prompt`, `completion`) and pairs to contrast (`text`, `text_tgt`). Everything else is
TRL's `SFTTrainer`.

Half a minute on one core with the embedded tiny model. With a released model and your own texts, on a GPU:

    python scripts/examples/01_craft_basic_sft.py --model smollm2 --data texts.tsv --learning-rate 2e-4
"""

# %%
from shared.options import options

OPTIONS = options(__doc__, name="01_craft_basic_sft", steps=120)

# %%
from datasets import Dataset
from shared.curves import Panel, draw
from shared.models import model_path, pairs, retrieval, run_settings, scores, translate
from shared.progress import follow
from shared.summary import finish, show_texts, table
from shared.texts import corpus
from transformers import AutoModelForCausalLM, AutoTokenizer

from craft import CRAFTSFTConfig, CRAFTSFTTrainer, make_craft_datasets

# %% [markdown]
# ## The texts
# By default, captions of drawn scenes in English and Sinhala, a language that the embedded model was never taught.
# Held-out scenes show combinations of figure, colour, size and place that no training scene shows.

# %%
texts = corpus(OPTIONS)
sft_rows = Dataset.from_list(
    [
        {
            "prompt": texts.question(each.text),
            "completion": [{"role": "assistant", "content": each.translation}],
        }
        for each in texts.train
    ]
)
contrastive_rows = Dataset.from_list(pairs(texts.train))
print(sft_rows[0])
print(contrastive_rows[0])

# %% [markdown]
# ## The model, before

# %%
path = model_path(OPTIONS)
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")


def measured() -> tuple[list[str], dict[str, float]]:
    written = translate(model, tokenizer, texts, texts.held_out)
    found = scores(written, texts.held_out, texts)
    return written, {**found, "translation found (%)": retrieval(model, tokenizer, texts.held_out)}


written_before, before = measured()

# %% [markdown]
# ## Training
# The bundle holds both data sets. Of each optimizer step's two micro-batches one is of rows and one of pairs
# (`craft_beta=0.5`), and their losses weigh 0.6 and 0.4 (`craft_alpha=0.6`).

# %%
trainer = CRAFTSFTTrainer(
    model=model,
    args=CRAFTSFTConfig(
        **run_settings(OPTIONS),
        gradient_accumulation_steps=2,
        craft_alpha=0.6,
        craft_beta=0.5,
        craft_pooling="mean",
    ),
    train_dataset=sft_rows,
    craft_bundle=make_craft_datasets(sft_rows, contrastive_dataset=contrastive_rows, strategy="paired_dataset"),
    processing_class=tokenizer,
)
follow(trainer, "loss/craft_sft", "loss/craft_contrast", "metrics/craft_contrastive_accuracy")
trainer.train()

# %% [markdown]
# ## After
# *Translation found*: the share of held-out texts whose own translation is the nearest of all, by the mean of the
# last hidden states. No projection head takes part: it is the model itself that has changed.

# %%
written_after, after = measured()
draw(
    OPTIONS.output_dir / "curves.png",
    [
        Panel(
            title="Losses",
            y="nats per token, per anchor",
            curves={"loss/craft_sft": "fine-tuning", "loss/craft_contrast": "contrast"},
            logarithmic=True,
        ),
        Panel(
            title="Pairs told apart",
            y="share of the anchors in a batch",
            curves={"metrics/craft_contrastive_accuracy": ""},
            limits=(0, 1.05),
        ),
    ],
    {"CRAFT": trainer.state.log_history},
)
show_texts(texts.held_out, {"before": written_before, "after": written_after})
table({"before": before, "after": after}, title=f"{len(texts.held_out)} held-out texts")
finish(OPTIONS, {"before": before, "after": after, "last log": trainer.craft_metrics})
