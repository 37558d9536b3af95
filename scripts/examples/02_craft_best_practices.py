# %% [markdown]
"""
# CRAFT as one would run it: packing, assistant masks, LoRA, a preset

    python scripts/examples/02_craft_best_practices.py

Fine-tuning on conversations of several turns, with pairs beside them. Each choice is explained where it is made, and
checked where it can be: which tokens are learned, that packed conversations do not see each other, what the packing
saves, and that the adapter which is saved is a plain PEFT one.

A minute on one core with the embedded tiny model.
"""

# %%
from shared.options import options

OPTIONS = options(__doc__, name="02_craft_best_practices", steps=140)

# %%
import random

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from shared.curves import Panel, draw
from shared.models import model_path, pairs, retrieval, run_settings, scores, translate
from shared.progress import follow
from shared.summary import finish, show_texts, table
from shared.texts import Translation, corpus
from transformers import AutoModelForCausalLM, AutoTokenizer

from craft import CRAFTSFTConfig, CRAFTSFTTrainer, make_craft_datasets

MAX_LENGTH = 256  # tokens of a packed row

# %% [markdown]
# ## Conversations
# One to four questions each, as `messages`. The pairs stay single texts: one text, one vector.

# %%
texts = corpus(OPTIONS)
path = model_path(OPTIONS)
tokenizer = AutoTokenizer.from_pretrained(path)


def conversations(translations: list[Translation], *, most_turns: int) -> Dataset:
    rng = random.Random(OPTIONS.seed)
    left, found = list(translations), []
    while left:
        turns = [left.pop() for _ in range(min(len(left), rng.randint(1, most_turns)))]
        messages = [
            message
            for each in turns
            for message in (*texts.question(each.text), {"role": "assistant", "content": each.translation})
        ]
        found.append({"messages": messages})
    return Dataset.from_list(found)


train_rows = conversations(texts.train, most_turns=4)
held_out_rows = conversations(texts.held_out, most_turns=1)
contrastive_rows = Dataset.from_list(pairs(texts.train))
print(f"{len(train_rows)} conversations, {len(contrastive_rows)} pairs")

# %% [markdown]
# ## Which tokens are learned: assistant masks
# Every turn of the assistant, with the token that ends it, and nothing else. A chat template says where those are by
# `{% generation %}`; few do. TRL brings such templates for the large families; for others, take the tokenizer's own
# and put the block in. The text must stay the same, which is checked here.

# %%
MARKED_TEMPLATES = {
    "Llama 3": r"""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
""",
    "SmolLM2": r"""
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
""",
}
shown = max(train_rows["messages"], key=len)


def rendered(template: str | None) -> tuple[str, str]:
    whole = tokenizer.apply_chat_template(shown, chat_template=template, tokenize=False)
    prompt = tokenizer.apply_chat_template(
        shown[:1], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return whole, prompt


for name, template in MARKED_TEMPLATES.items():
    if rendered(template) == rendered(None):
        print(f"the tokenizer's template is that of {name}: marked")
        tokenizer.chat_template = template  # where none is the same, TRL takes its own, or says that it has none

marked = tokenizer.apply_chat_template(shown, return_assistant_tokens_mask=True, return_dict=True)
print("learned tokens in [brackets]:")
print(
    "".join(
        f"[{tokenizer.decode(token)}]" if learned else tokenizer.decode(token)
        for token, learned in zip(marked["input_ids"], marked["assistant_masks"], strict=True)
    )
)

# %% [markdown]
# ## Packing
# Conversations are laid end to end in rows of `MAX_LENGTH` tokens (`bfd`: none is cut unless it is longer than a
# row), so that little is padding. Is one conversation hidden from the other? Only if the attention takes a position
# that begins again as the beginning of another text. Not every implementation does. Here it is measured: the logits
# of a conversation behind another, against those of the same one alone.
#
# CRAFT refuses packing with `self_align`, where a row must be one text. Pairs (`paired_dataset`) are never packed:
# only the rows of the fine-tuning part are.

# %%
base = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
one, other = (
    tokenizer.apply_chat_template(row["messages"], return_dict=True, return_tensors="pt")["input_ids"]
    for row in train_rows.select([0, 1])
)
positions = [torch.arange(ids.shape[1]) for ids in (one, other)]
with torch.no_grad():
    both = {"input_ids": torch.cat([one, other], dim=1), "position_ids": torch.cat(positions)[None]}
    packed = base(**both, use_cache=False).logits  # as in training: with a cache, positions begin only once
    alone = base(input_ids=other).logits
apart = (packed[:, one.shape[1] :] - alone).abs().max().item()
print(f"logits of a packed conversation differ by {apart:.1e} at most from those of the same one alone")
if apart > 1e-3:
    raise SystemExit("this attention implementation sees through packed rows: set packing=False.")

# %% [markdown]
# ## The model, before

# %%
before_texts = translate(base, tokenizer, texts, texts.held_out)
before = scores(before_texts, texts.held_out, texts)
before["translation found (%)"] = retrieval(base, tokenizer, texts.held_out)

# %% [markdown]
# ## The run
# - **The preset** `balanced` weighs the losses by their running means (`loss_scale`) and learns the temperature.
#   Short of memory: `memory_efficient`. Whatever is given beside it replaces its values: here every step has one
#   micro-batch of each kind, and the rarer kind is repeated (`oversample`), where the preset would leave out what
#   finds no partner.
# - **LoRA** on every linear layer, by TRL's `peft_config`. The contrast's projection head stays outside of the
#   adapter.
# - **The rate** of LoRA is some ten times that of training all weights of a released model, such as 2e-4. This tiny
#   model takes 3e-3 either way.
# - **Pairs of a batch** are each other's negatives, and cost little: give them a larger batch than the rows have
#   (`craft_contrastive_batch_size`; beyond the memory, `craft_use_gradcache=True`).
# - **Mean pooling** for pairs of plain texts: a causal model's last token alone was never trained to sum up a text.
# - **Evaluation** is the trainer's own loss on held-out conversations, unpacked and unscaled.

# %%
trainer = CRAFTSFTTrainer(
    model=base,
    args=CRAFTSFTConfig.from_preset(
        "balanced",
        **run_settings(OPTIONS) | {"per_device_train_batch_size": max(1, OPTIONS.batch_size // 4)},
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=max(1, OPTIONS.steps // 10),
        max_length=MAX_LENGTH,
        packing=True,
        eval_packing=False,
        assistant_only_loss=True,
        craft_beta=0.5,
        craft_beta_mode="fixed",
        craft_length_strategy="oversample",
        craft_pooling="mean",
        craft_contrastive_batch_size=2 * OPTIONS.batch_size,
        craft_report_metrics=["contrastive_accuracy", "representation_consistency", "temperature"],
    ),
    train_dataset=train_rows,
    eval_dataset=held_out_rows,
    craft_bundle=make_craft_datasets(train_rows, contrastive_dataset=contrastive_rows),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
lengths = [sum(row["seq_lengths"]) for row in trainer.train_dataset]
single = [length for row in trainer.train_dataset for length in row["seq_lengths"]]
padding = {
    "one conversation a row": 100 * (1 - sum(single) / (len(single) * max(single))),
    "packed": 100 * (1 - sum(lengths) / (len(lengths) * MAX_LENGTH)),
}
print(f"{len(single)} conversations of {min(single)} to {max(single)} tokens in {len(lengths)} packed rows")
print("padding, if all rows had the length of the longest: " + ", ".join(f"{k} {v:.0f} %" for k, v in padding.items()))
print(trainer.craft_plan)
trainer.model.print_trainable_parameters()
follow(trainer, "loss/craft_sft", "loss/craft_contrast", "metrics/craft_contrastive_accuracy")
trainer.train()

# %% [markdown]
# ## The adapter
# What is saved is a plain PEFT adapter: no head, no temperature. It is loaded here as any user of it would.

# %%
adapter = OPTIONS.output_dir / "adapter"
trainer.model.save_pretrained(adapter)
loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path, dtype="float32"), adapter)
after_texts = translate(loaded, tokenizer, texts, texts.held_out)
after = scores(after_texts, texts.held_out, texts)
after["translation found (%)"] = retrieval(loaded, tokenizer, texts.held_out)
kilobytes = (adapter / "adapter_model.safetensors").stat().st_size / 1000
print(f"adapter of {kilobytes:,.0f} kB: {', '.join(sorted(each.name for each in adapter.iterdir()))}")

# %%
draw(
    OPTIONS.output_dir / "curves.png",
    [
        Panel(
            title="Losses",
            y="nats per token; nats per anchor",
            curves={
                "loss/craft_sft": "fine-tuning",
                "eval_loss": "fine-tuning, held out",
                "loss/craft_contrast": "contrast",
            },
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
show_texts(texts.held_out, {"before": before_texts, "after": after_texts})
table({"before": before, "after": after}, title=f"{len(texts.held_out)} held-out texts")
finish(
    OPTIONS,
    {
        "before": before,
        "after": after,
        "padding (%)": padding,
        "packed and alone differ by": apart,
        "adapter (kB)": kilobytes,
        "last log": trainer.craft_metrics,
    },
)
