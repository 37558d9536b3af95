# %% [markdown]
"""
# CRAFT's metrics in a TRL run, against plain fine-tuning

    python scripts/examples/03b_craft_trl_sft.py

`CRAFTSFTTrainer` is trained twice on the same rows and seed, with `craft_alpha=1` (plain `SFTTrainer`, to the bit) and
with the contrastive term. This example shows every figure that CRAFT logs, what each one means, how to read them while
a run is on, and what the term changed.

A minute on one core with the embedded tiny model.
"""

# %%
from shared.options import options

OPTIONS = options(__doc__, name="03b_craft_trl_sft", steps=160)

# %%
from datasets import Dataset
from shared.curves import Panel, draw
from shared.models import model_path, pairs, retrieval, run_settings, scores, translate
from shared.progress import follow
from shared.summary import finish, show_texts, table
from shared.texts import Translation, corpus
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from craft import CRAFTSFTConfig, CRAFTSFTTrainer

# %% [markdown]
# ## Rows and pairs

# %%
texts = corpus(OPTIONS)
path = model_path(OPTIONS)
tokenizer = AutoTokenizer.from_pretrained(path)


def conversations(translations: list[Translation]) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": texts.question(each.text), "completion": [{"role": "assistant", "content": each.translation}]}
            for each in translations
        ]
    )


train_rows, held_out_rows = conversations(texts.train), conversations(texts.held_out)
contrastive_rows = Dataset.from_list(pairs(texts.train))

# %% [markdown]
# ## Two runs
# All four metrics are asked for; the first two are the default. A metric that would make no sense is left out of the
# log rather than logged as NaN: with `craft_alpha=1` there is none of them.
#
# Both take the same time: where the plain run has two micro-batches of rows, the other has one of rows and one of
# pairs.
#
# `craft_metrics` has the figures that were logged last: what a callback needs to stop a run, or to raise an alarm.


# %%
class Alarm(TrainerCallback):
    """Says when anchors and positives are found apart no better than at first."""

    def on_train_end(self, args, state, control, **kwargs):
        accuracy = trainer.craft_metrics.get("metrics/craft_contrastive_accuracy")
        if accuracy is not None and accuracy < 0.7:
            print(f"contrastive accuracy is {accuracy:.2f}: above 0.7 is what a run should reach")


histories, written, found = {}, {}, {}
for name, alpha in (("plain", 1.0), ("CRAFT", 0.6)):
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    if not written:
        written["before"] = translate(model, tokenizer, texts, texts.held_out)
        found["before"] = scores(written["before"], texts.held_out, texts)
        found["before"]["translation found (%)"] = retrieval(model, tokenizer, texts.held_out)
    trainer = CRAFTSFTTrainer(
        model=model,
        args=CRAFTSFTConfig(
            **run_settings(OPTIONS),
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=max(1, OPTIONS.steps // 10),
            craft_alpha=alpha,
            craft_beta=0.5,
            craft_pooling="mean",
            craft_learnable_temperature=True,
            craft_report_metrics=[
                "contrastive_accuracy",
                "representation_consistency",
                "temperature",
                "gradient_norm",
            ],
        ),
        train_dataset=train_rows,
        eval_dataset=held_out_rows,
        contrastive_dataset=contrastive_rows,
        processing_class=tokenizer,
        callbacks=[Alarm()],
    )
    print(f"\n{name}: {trainer.craft_plan or 'the trainer of TRL as it is'}")
    follow(trainer, "loss", "loss/craft_sft", "loss/craft_contrast", "metrics/craft_contrastive_accuracy")
    trainer.train()
    histories[name] = trainer.state.log_history
    written[name] = translate(model, tokenizer, texts, texts.held_out)
    found[name] = scores(written[name], texts.held_out, texts)
    found[name]["translation found (%)"] = retrieval(model, tokenizer, texts.held_out)
    found[name]["held-out loss (nats per token)"] = trainer.evaluate()["eval_loss"]

# %% [markdown]
# ## What the curves say
# - **loss/craft_sft, loss/craft_contrast**: both losses unweighted. Their weighted sum is `loss/craft_total`.
# - **eval_loss**: the trainer's own loss, never scaled: runs with and without CRAFT can be compared by it.
# - **metrics/craft_contrastive_accuracy**: how often an anchor is nearest to its own positive among those of its
#   batch. It starts near one in sixteen, the size of a batch; above 0.7 the pairs are told apart.
# - **metrics/craft_representation_consistency**: cosine of the batch to a running mean. Near 1 for all texts alike
#   would be a collapse; a fall means that texts spread out.
# - **metrics/craft_temperature**: learned here. A fall sharpens the contrast.
# - **metrics/craft_gradient_norm_sft, ..._contrast**: the gradient of each loss by itself. When one is many times the
#   other, try `craft_gradient_balancing="loss_scale"`.

# %%
LOSSES = {"loss/craft_sft": "fine-tuning", "loss/craft_contrast": "contrast"}
NORMS = {"metrics/craft_gradient_norm_sft": "fine-tuning", "metrics/craft_gradient_norm_contrast": "contrast"}
draw(
    OPTIONS.output_dir / "craft_metrics.png",
    [
        Panel(title="Losses", y="nats per token; nats per anchor", curves=LOSSES, logarithmic=True),
        Panel(
            title="Contrastive accuracy and representation consistency",
            y="share of anchors; cosine",
            curves={
                "metrics/craft_contrastive_accuracy": "accuracy",
                "metrics/craft_representation_consistency": "consistency",
            },
            limits=(0, 1.05),
        ),
        Panel(title="Temperature", y="temperature of InfoNCE", curves={"metrics/craft_temperature": ""}),
        Panel(title="Gradient of each loss", y="L2 norm", curves=NORMS, logarithmic=True),
    ],
    {"CRAFT": histories["CRAFT"]},
)
draw(
    OPTIONS.output_dir / "held_out_loss.png",
    [Panel(title="Held-out texts", y="loss, nats per token", curves={"eval_loss": ""}, logarithmic=True)],
    histories,
)
show_texts(texts.held_out, written, count=2)
table(found, title=f"{len(texts.held_out)} held-out texts")
finish(OPTIONS, {"scores": found, "last log": trainer.craft_metrics})
