"""The code of the README and of the training guide as it stands there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from guide_runs import LOG_KEYS, config, finite_logs
from torch.utils.data import DataLoader

from craft.config import CRAFTSFTConfig
from craft.data import CRAFTCollator, make_craft_datasets
from craft.spans import self_align_spans
from craft.trainers import CRAFTSFTTrainer

pytestmark = pytest.mark.usefixtures("workshop")

QUICK_START = """
from transformers import AutoModelForCausalLM
from craft.config import CRAFTSFTConfig
from craft.data import CRAFTCollator, make_craft_datasets
from craft.trainers import CRAFTSFTTrainer

# Assume `sft_dataset` and `contrastive_dataset` are tokenized datasets with the
# appropriate columns (`input_ids`, `attention_mask`, optional *_tgt columns).

bundle = make_craft_datasets(
    sft_dataset,
    contrastive_dataset=contrastive_dataset,
    strategy="paired_dataset",
)

model = AutoModelForCausalLM.from_pretrained("HuggingFaceH4/zephyr-7b-beta")

args = CRAFTSFTConfig(
    output_dir="./outputs",
    per_device_train_batch_size=2,
    gradient_accumulation_steps=8,
    craft_alpha=0.6,
    craft_beta=0.5,
)

trainer = CRAFTSFTTrainer(
    model=model,
    args=args,
    train_dataset=sft_dataset,
    craft_bundle=bundle,
    data_collator=CRAFTCollator(),
)

trainer.train()
"""

README_CONFIGS = {
    "presets": """
# Start from a preset
config = CRAFTSFTConfig.from_preset("balanced", output_dir="./outputs")

# Or auto-detect optimal settings
config = CRAFTSFTConfig.auto(
    output_dir="./outputs",
    model=my_model,
    sft_dataset=train_data,
    available_memory_gb=16,
)
""",
    "optimisations": """
config = CRAFTSFTConfig(
    # Memory optimization
    craft_use_gradcache=True,           # Enable GradCache for large batches
    craft_gradcache_chunk_size=8,       # Chunk size for backward pass
    craft_use_hidden_state_hook=True,   # Hook-based hidden state capture

    # Projection head
    craft_projection_dim=256,           # Lower dim = more efficient
    craft_learnable_temperature=True,   # CLIP-style learnable temp

    # Negative sampling
    craft_negative_strategy="queue",    # MoCo-style negative queue
    craft_negative_queue_size=65536,
)
""",
    "lengths": """
config = CRAFTSFTConfig(
    output_dir="./outputs",
    per_device_train_batch_size=2,
    craft_contrastive_batch_size=4,
    craft_beta=0.5,
    craft_beta_mode="auto",
    craft_length_strategy="auto_beta",
)
""",
}

README_LOADERS = """
trainer = CRAFTSFTTrainer(
    model=model,
    args=args,
    train_dataset=sft_dataset,  # Still required for length calculations
    craft_bundle=bundle,
    craft_sft_loader=custom_sft_loader,          # Custom SFT loader
    craft_contrastive_loader=custom_contrast_loader  # Custom contrastive loader
)
"""

README_SELF_ALIGN = """
{
    "input_ids": torch.tensor([...]),
    "attention_mask": torch.tensor([...]),
    "labels": torch.tensor([-100, -100, 1234, 5678, -100]),  # Assistant tokens where labels != -100
    # OR
    "assistant_mask": torch.tensor([0, 0, 1, 1, 0])  # 1 marks assistant tokens
}
"""

GUIDE_BUNDLE = """
bundle = make_craft_datasets(
    sft_dataset,
    contrastive_dataset=my_pairs,  # None for self-align
    strategy="paired_dataset",
)
"""

GUIDE_CONFIGS = {
    "workflow": """
from craft.config import CRAFTSFTConfig

args = CRAFTSFTConfig(
    output_dir="./outputs",
    per_device_train_batch_size=2,
    craft_alpha=0.6,
    craft_beta=0.5,
    craft_length_strategy="auto_beta",
)
""",
    "hook": """
config = CRAFTSFTConfig(
    craft_use_hidden_state_hook=True,  # Enable hook-based capture
)
""",
    "gradcache": """
config = CRAFTSFTConfig(
    craft_use_gradcache=True,           # Enable GradCache
    craft_gradcache_chunk_size=8,       # Backward chunk size
    per_device_train_batch_size=4,      # Physical batch
)
""",
    "temperature": """
config = CRAFTSFTConfig(
    craft_learnable_temperature=True,   # CLIP-style learnable temp
    craft_projection_dim=256,           # Lower dims = more efficient
    craft_projection_dropout=0.1,
)
""",
    "queue": """
config = CRAFTSFTConfig(
    craft_negative_strategy="queue",    # "inbatch" or "queue"
    craft_negative_queue_size=65536,
)
""",
    "balancing": """
config = CRAFTSFTConfig(
    # Choose strategy
    craft_gradient_balancing="loss_scale",  # none|loss_scale|uncertainty|gradnorm|pcgrad
    
    # Strategy-specific options
    craft_loss_scale_momentum=0.99,   # EMA momentum for loss_scale
    craft_gradnorm_alpha=1.5,         # GradNorm asymmetry (higher = stronger)
    
    # Per-task gradient clipping (optional, works with any strategy)
    craft_gradient_clip_per_task=True,
    craft_gradient_clip_value=1.0,
)
""",
    "presets": """
from craft.config import CRAFTSFTConfig

# Use a preset directly
config = CRAFTSFTConfig.from_preset("balanced", output_dir="./outputs")

# Override specific values
config = CRAFTSFTConfig.from_preset(
    "memory_efficient",
    output_dir="./outputs",
    per_device_train_batch_size=2,
    craft_alpha=0.7,  # Override preset value
)
""",
    "auto": """
config = CRAFTSFTConfig.auto(
    output_dir="./outputs",
    model=my_model,                    # Detects hidden size → projection dim
    sft_dataset=train_data,            # Estimates size → beta
    contrastive_dataset=pairs_data,    # Large dataset → queue strategy
    available_memory_gb=16,            # Low memory → enables GradCache
)
""",
    "auto with overrides": """
config = CRAFTSFTConfig.auto(
    output_dir="./outputs",
    model=model,
    sft_dataset=sft_data,
    # Override auto-detected values
    craft_gradient_balancing="gradnorm",
    num_train_epochs=5,
)
""",
}

GUIDE_LOADERS = """
from torch.utils.data import DataLoader

# Create custom loaders with your preferred settings
sft_loader = DataLoader(
    sft_dataset,
    batch_size=4,
    shuffle=True,
    collate_fn=my_custom_collator  # Optional custom collation
)

contrastive_loader = DataLoader(
    contrastive_dataset,
    batch_size=8,  # Can differ from SFT batch size
    shuffle=True,
    collate_fn=my_contrastive_collator
)

# Pass to trainer
trainer = CRAFTSFTTrainer(
    model=model,
    args=training_args,
    train_dataset=sft_dataset,  # Still required for length calculations
    craft_bundle=bundle,
    craft_sft_loader=sft_loader,           # Custom SFT loader
    craft_contrastive_loader=contrastive_loader  # Custom contrastive loader
)
"""


def run(code: str, **names: Any) -> dict[str, Any]:
    """The names after running some code as written."""
    exec(compile(code, "the guide", "exec"), names)
    return names


def tokenised(dataset: Dataset, *names: str) -> Dataset:
    """Token columns with their masks and nothing else, as the guide's table has them."""
    masks = {name: name.replace("input_ids", "attention_mask") for name in names}
    return Dataset.from_list(
        [{**{n: row[n] for n in names}, **{masks[n]: [1] * len(row[n]) for n in names}} for row in dataset]
    )


@pytest.fixture
def model_dir(tmp_path: Path, make_model: Any, tokenizer: Any) -> str:
    """A tiny model and its tokenizer, saved as the hub has them."""
    made = make_model()
    made.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


# The code


def test_the_quick_start(rows, pairs, model_dir):
    # failures 23 and 24: it raised
    sft = tokenised(rows(16), "input_ids")
    contrastive = tokenised(pairs(16), "input_ids", "input_ids_tgt")
    found = run(
        QUICK_START.replace("HuggingFaceH4/zephyr-7b-beta", model_dir), sft_dataset=sft, contrastive_dataset=contrastive
    )
    trainer = found["trainer"]
    assert trainer.state.global_step == 6  # 8 SFT batches, 4 in each step, 3 epochs
    assert trainer.craft_plan.n_sft == trainer.craft_plan.n_contrastive == 4
    assert Path("outputs").is_dir()


@pytest.mark.parametrize(
    "code", [*README_CONFIGS.values(), *GUIDE_CONFIGS.values()], ids=[*README_CONFIGS, *GUIDE_CONFIGS]
)
def test_every_config_trains(code, make_model, rows, pairs, tokenizer):
    model, sft, contrastive = make_model(), rows(24), pairs(16)
    known = {"my_model": model, "model": model, "train_data": sft, "sft_data": sft, "pairs_data": contrastive}
    found = run(code, CRAFTSFTConfig=CRAFTSFTConfig, **known)
    args = found.get("config", found.get("args"))
    args.max_steps, args.logging_steps, args.disable_tqdm = 4, 2, True
    trainer = CRAFTSFTTrainer(
        model=model,
        args=args,
        train_dataset=sft,
        processing_class=tokenizer,
        craft_bundle=run(GUIDE_BUNDLE, make_craft_datasets=make_craft_datasets, sft_dataset=sft, my_pairs=contrastive)[
            "bundle"
        ],
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert {"loss/craft_contrast", "loss/craft_total"} <= finite_logs(trainer)[-1].keys()


def loader_parts(make_model: Any, rows: Any, pairs: Any) -> dict[str, Any]:
    sft, contrastive = rows(24), pairs(24)
    return {
        "CRAFTSFTTrainer": CRAFTSFTTrainer,
        "model": make_model(),
        "sft_dataset": sft,
        "contrastive_dataset": contrastive,
        "bundle": make_craft_datasets(sft, contrastive),
    }


def test_the_readmes_custom_loaders(make_model, rows, pairs, model_dir, spy):
    parts = loader_parts(make_model, rows, pairs)
    parts["model"] = type(parts["model"]).from_pretrained(model_dir)  # the tokenizer comes from there
    custom = [
        DataLoader(parts[name], batch_size=size, collate_fn=CRAFTCollator(pad_token_id=3))
        for name, size in (("sft_dataset", 3), ("contrastive_dataset", 5))
    ]
    found = run(
        README_LOADERS,
        args=config(gradient_accumulation_steps=2),
        custom_sft_loader=custom[0],
        custom_contrast_loader=custom[1],
        **parts,
    )
    check_custom(found["trainer"], spy, (3, 5))


def test_the_guides_custom_loaders(make_model, rows, pairs, model_dir, spy):
    parts = loader_parts(make_model, rows, pairs)
    parts["model"] = type(parts["model"]).from_pretrained(model_dir)
    seen: list[str] = []

    def collator(kind: str) -> Callable[[Any], Any]:
        def collate(features: Any) -> Any:
            seen.append(kind)
            return CRAFTCollator(pad_token_id=3)(features)

        return collate

    found = run(
        GUIDE_LOADERS,
        training_args=config(gradient_accumulation_steps=2),
        my_custom_collator=collator("sft"),
        my_contrastive_collator=collator("craft"),
        **parts,
    )
    check_custom(found["trainer"], spy, (4, 8))
    assert {"sft", "craft"} == set(seen)


def check_custom(trainer: Any, spy: Any, sizes: tuple[int, int]) -> None:
    spy.watch(trainer)
    trainer.train()
    for step in spy.batches:
        assert [batch["craft_batch_type"] for batch in step] == ["sft", "craft"]
        assert tuple(len(batch["input_ids"]) for batch in step) == sizes
    assert {"loss/craft_sft", "loss/craft_contrast"} <= finite_logs(trainer)[-1].keys()


@pytest.mark.parametrize("own_pairs", [True, False])
def test_a_loader_factory(make_trainer, rows, pairs, spy, own_pairs):
    def loaders(trainer: Any) -> tuple[DataLoader, DataLoader | None]:
        collate = CRAFTCollator(pad_token_id=3)
        sft = DataLoader(trainer.train_dataset, batch_size=3, collate_fn=collate)
        return sft, DataLoader(pairs(10), batch_size=5, collate_fn=collate) if own_pairs else None

    trainer = make_trainer(
        rows(24), pairs(24), trainer={"craft_loader_factory": loaders}, gradient_accumulation_steps=2
    )
    check_custom(trainer, spy, (3, 5 if own_pairs else 4))


def test_a_custom_loader_in_self_align(make_trainer, rows, spy):
    sft = DataLoader(rows(24), batch_size=6, collate_fn=CRAFTCollator(pad_token_id=3))
    trainer = make_trainer(rows(24), trainer={"craft_sft_loader": sft})
    spy.watch(trainer)
    trainer.train()
    assert {len(batch["input_ids"]) for step in spy.batches for batch in step} == {6}
    assert finite_logs(trainer)[-1].keys() >= LOG_KEYS


def test_the_readmes_self_align_batch_is_read_either_way():
    ids = "torch.tensor([5, 6, 1234, 5678, 2])"
    code = "batch = " + README_SELF_ALIGN.strip().replace("torch.tensor([...])", ids, 1)
    batch = run(code.replace("[...]", "[1, 1, 1, 1, 1]"), torch=torch)["batch"]
    rows = {name: values.unsqueeze(0) for name, values in batch.items()}
    for left_out in ("labels", "assistant_mask"):
        spans = self_align_spans(
            {name: values for name, values in rows.items() if name != left_out}, strategy="auto", mask_key=None
        )
        assert spans.anchor_BT.tolist() == [[True, True, False, False, False]]
        assert spans.positive_BT.tolist() == [[False, False, True, True, False]]
