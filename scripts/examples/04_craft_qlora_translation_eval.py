# %% [markdown]
"""
# QLoRA on translations, with BLEU before, during and after

    python scripts/examples/04_craft_qlora_translation_eval.py

The weights of the model are loaded in 4 bit (NF4, bitsandbytes, on a GPU or a CPU), LoRA adapters are trained on
translations with CRAFT beside, and sacrebleu says what has come of it on texts that were held out.

A minute on one core with the embedded tiny model, English to Sinhala. It is a small world: 360 captions of one grammar,
of which the held-out fifth shows new combinations of words that were each seen, so that a BLEU near 100 can be reached
and says just that. On a GPU, with FLORES+ or any other parallel text as a TSV or JSONL file:

    python scripts/examples/04_craft_qlora_translation_eval.py --model unsloth/gemma-3-270m-it \
        --data flores_en_si.tsv --learning-rate 2e-4 --steps 500
"""

# %%
from shared.options import options

OPTIONS = options(__doc__, name="04_craft_qlora_translation_eval", steps=160)

# %%
import torch
from datasets import Dataset
from peft import LoraConfig
from sacrebleu.metrics import BLEU
from shared.curves import Panel, draw
from shared.models import BLEU_TOKENIZERS, model_path, pairs, retrieval, run_settings, scores, translate
from shared.progress import follow
from shared.summary import finish, show_texts, table
from shared.texts import corpus
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

from craft import CRAFTSFTConfig, CRAFTSFTTrainer, make_craft_datasets
from inft.training.quantise import after_quantised_load, quantised_modules

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # of what is computed, and of what is not in 4 bit

# %% [markdown]
# ## The texts
# The same texts serve twice: as rows (asked for a translation, answer it) and as pairs (a text and its translation
# mean the same). Held-out texts are in neither.

# %%
texts = corpus(OPTIONS)
sft_rows = Dataset.from_list(
    [
        {"prompt": texts.question(each.text), "completion": [{"role": "assistant", "content": each.translation}]}
        for each in texts.train
    ]
)
contrastive_rows = Dataset.from_list(pairs(texts.train))

# %% [markdown]
# ## A model in 4 bit
# NF4 with double quantisation (Dettmers et al. 2023) for all linear layers but the head. `after_quantised_load`
# freezes what was loaded and keeps bitsandbytes from repacking the weights on a CPU with AVX512-BF16, after which no
# training step would run.

# %%
path = model_path(OPTIONS)
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(
    path,
    dtype=DTYPE,
    device_map={"": 0} if ON_GPU else None,
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPE,
    ),
)
model = after_quantised_load(model)
print(f"{len(quantised_modules(model))} layers in 4 bit; {model.get_memory_footprint() / 1e6:.1f} MB in all")

# %% [markdown]
# ## BLEU before

# %%
written_before = translate(model, tokenizer, texts, texts.held_out)
bleu = BLEU(tokenize=BLEU_TOKENIZERS.get(OPTIONS.target, "13a"))
print(bleu.corpus_score(written_before, [[each.translation for each in texts.held_out]]))
print(bleu.get_signature())
before = scores(written_before, texts.held_out, texts)
before["translation found (%)"] = retrieval(model, tokenizer, texts.held_out)

# %% [markdown]
# ## Training, with BLEU on the way
# A callback translates the held-out texts eight times during the run.


# %%
class ScoreTranslations(TrainerCallback):
    def __init__(self, every: int):
        self.every = every
        self.history = [{"step": 0, **before}]

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % self.every == 0:
            written = translate(model, tokenizer, texts, texts.held_out)
            self.history.append({"step": state.global_step, **scores(written, texts.held_out, texts)})
            model.train()


on_the_way = ScoreTranslations(every=max(1, OPTIONS.steps // 8))
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
    craft_bundle=make_craft_datasets(sft_rows, contrastive_dataset=contrastive_rows),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[on_the_way],
)
trainer.model.print_trainable_parameters()
follow(trainer, "loss/craft_sft", "loss/craft_contrast", "metrics/craft_contrastive_accuracy")
trainer.train()

# %% [markdown]
# ## BLEU after

# %%
written_after = translate(trainer.model, tokenizer, texts, texts.held_out)
after = scores(written_after, texts.held_out, texts)
after["translation found (%)"] = retrieval(trainer.model, tokenizer, texts.held_out)
trainer.model.save_pretrained(OPTIONS.output_dir / "adapter")
draw(
    OPTIONS.output_dir / "losses.png",
    [
        Panel(
            title="Losses",
            y="nats per token; nats per anchor",
            curves={"loss/craft_sft": "fine-tuning", "loss/craft_contrast": "contrast"},
            logarithmic=True,
        ),
        Panel(
            title="Contrastive accuracy and representation consistency",
            y="share of anchors; cosine",
            curves={
                "metrics/craft_contrastive_accuracy": "accuracy",
                "metrics/craft_representation_consistency": "consistency",
            },
            limits=(0, 1.05),
        ),
    ],
    {"CRAFT": trainer.state.log_history},
)
draw(
    OPTIONS.output_dir / "bleu.png",
    [
        Panel(
            title=f"{len(texts.held_out)} held-out texts, {OPTIONS.source} to {OPTIONS.target}",
            y="BLEU, chrF (0 to 100); exact (%)",
            curves={"BLEU": "BLEU", "chrF": "chrF", "exact translations (%)": "exact translations"},
            limits=(0, 105),
        )
    ],
    {"CRAFT": on_the_way.history},
)
show_texts(texts.held_out, {"before": written_before, "after": written_after})
table({"before": before, "after": after}, title=f"{len(texts.held_out)} held-out texts")
finish(OPTIONS, {"before": before, "after": after, "on the way": on_the_way.history, "last log": trainer.craft_metrics})
