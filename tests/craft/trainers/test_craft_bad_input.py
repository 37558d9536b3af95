"""What cannot work is refused with the remedy, and what can happen to any data set breaks nothing."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.data import DataCollatorWithFlattening
from trl import SFTConfig

from craft import CRAFTCollator, CRAFTConfigMixin, CRAFTSFTConfig, CRAFTTrainerMixin, make_craft_datasets
from craft.trainers import CRAFTSFTTrainer


@dataclass
class Args(CRAFTConfigMixin, TrainingArguments):
    """Arguments of a plain Trainer with CRAFT."""


class PlainTrainer(CRAFTTrainerMixin, Trainer):
    """A plain Trainer with CRAFT, whose batches are what its collator makes."""


def plain(
    model: nn.Module, train_dataset: Any, tmp_path: Any, *, trainer: dict[str, Any] | None = None, **changes: Any
):
    settings = {
        "output_dir": str(tmp_path / "plain"),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "remove_unused_columns": False,
    }
    return PlainTrainer(
        model=model,
        args=Args(**{**settings, **changes}),
        train_dataset=train_dataset,
        **{"data_collator": CRAFTCollator(pad_token_id=3), **(trainer or {})},
    )


def row(*, prompt: int = 4, answer: int = 4, first: int = 70) -> dict[str, list[int]]:
    ids = list(range(first, first + prompt + answer))
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


# Data sets


def test_pairs_without_a_second_text(make_trainer, rows):
    with pytest.raises(ValueError, match=r"input_ids_tgt.*Rename the column.*craft_contrastive_keys.*self_align"):
        make_trainer(rows(8), rows(8, seed=3))


def test_a_custom_loader_of_pairs_without_a_second_text(make_trainer, rows, pairs):
    loader = DataLoader(rows(8).select_columns("input_ids"), batch_size=2, collate_fn=CRAFTCollator())
    trainer = make_trainer(rows(8), pairs(8), trainer={"craft_contrastive_loader": loader})
    with pytest.raises(ValueError, match=r"no column 'input_ids_tgt'; it has.*craft_contrastive_keys"):
        trainer.train()


def test_self_align_without_labels_or_mask(make_model, rows, tmp_path):
    trainer = plain(make_model(), rows(8).remove_columns("labels"), tmp_path)
    with pytest.raises(
        ValueError,
        match=r"^CRAFT strategy='self_align' needs either labels \(with assistant tokens where labels != -100\) or an "
        r"assistant mask column.*max_length.*mask",
    ):
        trainer.train()


@pytest.mark.parametrize(
    "batches", [[], 5, [torch.ones(2, 3)], [("input_ids", "labels")]], ids=["none", "number", "tensor", "tuple"]
)
def test_self_align_with_a_loader_that_cannot_be_read(make_trainer, rows, batches):
    trainer = make_trainer(rows(8), trainer={"craft_sft_loader": batches})
    with pytest.raises(
        ValueError,
        match=r"^CRAFT strategy='self_align' requires a readable SFT dataloader to validate assistant spans.*"
        "not empty.*collator",
    ):
        trainer.train()


def test_a_mask_that_was_promised_and_is_not_there(make_trainer, rows):
    trainer = make_trainer(rows(8), craft_assistant_mask_strategy="provided")
    with pytest.raises(ValueError, match=r"no column 'assistant_masks'.*Add the column, or use .*'auto' with labels"):
        trainer.train()


def test_a_mask_that_is_shorter_than_its_text(make_trainer, rows):
    masked = rows(8).map(lambda row: {"assistant_mask": [1]})
    with pytest.raises(ValueError, match=r"assistant_mask has 1 entries for .* tokens.*drop it"):
        make_trainer(masked).train()


def test_first_batches_in_which_nothing_is_marked(make_model, tmp_path):
    nothing = Dataset.from_list([{**row(), "labels": [-100] * 8}] * 8)
    with pytest.raises(ValueError, match=r"needs either labels.*no token in them is marked: check truncation"):
        plain(make_model(), nothing, tmp_path).train()


@pytest.mark.parametrize("more", [{}, {"craft_symmetric": True, "craft_gradient_balancing": "gradnorm"}], ids=str)
@pytest.mark.parametrize("where", ["answer", "prompt"])
def test_a_batch_without_any_pair_in_the_middle_of_training_changes_nothing_else(make_model, tmp_path, where, more):
    usual = [row(first=70 + 9 * i) for i in range(4)]
    # One text that is all prompt, or of one supervised token: neither has two sides.
    odd = {**row(), "labels": [-100] * 8} if where == "answer" else row(prompt=0, answer=1)
    trainer = plain(
        make_model(),
        Dataset.from_list([*usual, odd, odd, *usual]),
        tmp_path,
        max_steps=5,
        train_sampling_strategy="sequential",
        **more,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 5
    assert all(math.isfinite(value) for entry in logs for value in entry.values())
    assert all(torch.isfinite(p).all() for p in (*trainer.model.parameters(), *trainer.craft_parameters()))
    assert "metrics/craft_contrastive_accuracy" in logs[1]
    assert "metrics/craft_contrastive_accuracy" not in logs[2]  # nothing was contrasted


@pytest.mark.parametrize("strategy", ["paired_dataset", "self_align"])
def test_a_single_row_trains_without_a_contrast_and_says_so(make_trainer, rows, pairs, strategy):
    contrastive = pairs(1) if strategy == "paired_dataset" else None
    trainer = make_trainer(rows(1), contrastive, per_device_train_batch_size=1)
    with pytest.warns(UserWarning, match=r"nothing to contrast.*raise the batch size.*craft_negative_strategy='queue'"):
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["loss/craft_contrast"] == 0 for entry in logs)
    assert not any("metrics/craft_contrastive_accuracy" in entry for entry in logs)


def test_equal_rows_are_no_negatives_of_each_other(make_trainer, rows, pairs):
    once, pair = rows(1), pairs(1)
    for train, contrastive in ((once, None), (once, pair)):
        repeated = None if contrastive is None else Dataset.from_list([contrastive[0]] * 12)
        trainer = make_trainer(Dataset.from_list([train[0]] * 12), repeated)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all(entry["loss/craft_contrast"] == 0 for entry in logs)
        assert not any("metrics/craft_contrastive_accuracy" in entry for entry in logs)


def test_rows_of_one_sample_are_no_negatives_either(make_trainer, rows):
    of_one_sample = rows(12).add_column("sample_id", [7] * 12)
    trainer = make_trainer(of_one_sample)
    trainer.train()
    assert trainer.craft_metrics["loss/craft_contrast"] == 0
    assert "metrics/craft_contrastive_accuracy" not in trainer.craft_metrics


def test_numbers_of_batches_that_differ_where_they_must_not(make_trainer, rows, pairs):
    with pytest.raises(ValueError, match=r"(?s)10 SFT.*6 contrastive.*(oversample|cap)"):
        make_trainer(rows(40), pairs(24), craft_length_strategy="error").train()
    equal = make_trainer(rows(24), pairs(24), craft_length_strategy="error", craft_beta=0.5)
    equal.train()
    assert equal.state.global_step == 2


def test_custom_loaders_of_different_length_where_they_must_not(make_trainer, rows, pairs):
    sft = DataLoader(rows(12), batch_size=4, collate_fn=CRAFTCollator())
    contrastive = DataLoader(pairs(8), batch_size=4, collate_fn=CRAFTCollator())
    loaders = {"craft_sft_loader": sft, "craft_contrastive_loader": contrastive}
    trainer = make_trainer(rows(12), pairs(8), trainer=loaders, craft_length_strategy="error")
    with pytest.raises(ValueError, match=r"(?s)3 SFT.*2 contrastive.*(oversample|cap)"):
        trainer.train()


def test_a_queue_larger_than_the_data_set_holds_each_row_once(make_trainer, rows, pairs):
    for contrastive, held in ((pairs(10), 10), (None, 16)):
        with pytest.warns(
            UserWarning, match=f"craft_negative_queue_size=65,536 is more than the {held} .*at most that"
        ):
            trainer = make_trainer(rows(16), contrastive, craft_negative_strategy="queue", max_steps=6)
        trainer.train()
        assert trainer._craft_objective.queue.bank_size == held
        assert trainer._craft_objective.queue.is_full


# Packing


def test_a_collator_that_packs(make_trainer, make_model, rows, pairs, tmp_path):
    with pytest.raises(ValueError, match=r"DataCollatorWithFlattening joins.*craft_collator that does not pack"):
        make_trainer(rows(8), pairs(8), trainer={"craft_collator": DataCollatorWithFlattening()})
    with pytest.raises(ValueError, match=r"joins several texts.*craft_allow_packed_contrastive=True"):
        plain(make_model(), rows(8), tmp_path, trainer={"data_collator": DataCollatorWithFlattening()})


@pytest.mark.parametrize("packing", [{"packing": True}, {"padding_free": True, "max_length": None}], ids=str)
def test_packed_rows_in_self_align(make_trainer, rows, packing):
    with pytest.raises(ValueError, match="Set packing=False and padding_free=False"):
        make_trainer(rows(8), **packing)


def test_packed_sft_rows_do_no_harm_to_pairs(make_trainer, rows, pairs):
    trainer = make_trainer(rows(40), pairs(24), packing=True, max_length=64, gradient_accumulation_steps=2)
    trainer.train()
    assert {"loss/craft_sft", "loss/craft_contrast"} <= trainer.craft_metrics.keys()


# Models


class WithoutStates(nn.Module):
    """A model of its own that gives a loss and logits alone."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.inner = model.model
        self.lm_head = model.lm_head
        self.config = model.config

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **others: Any
    ) -> dict[str, Any]:
        logits = self.lm_head(self.inner(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize(
    ("hook", "remedy"),
    [(True, "craft_use_hidden_state_hook=False"), (False, "must return hidden_states")],
)
def test_a_model_without_hidden_states(make_model, rows, tmp_path, hook, remedy):
    trainer = plain(WithoutStates(make_model()), rows(8), tmp_path, craft_use_hidden_state_hook=hook)
    with pytest.raises(ValueError, match=f"(?s)no hidden state.*{remedy}"):
        trainer.train()


class NoSize(nn.Module):
    """A model of its own whose config does not tell its hidden size."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model.model
        self.lm_head = model.lm_head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        state = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.lm_head(state)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "last_hidden_state": state}


def test_a_model_whose_config_does_not_tell_its_hidden_size(make_model, rows, tmp_path):
    trainer = plain(NoSize(make_model()), rows(8), tmp_path)
    with pytest.raises(ValueError, match=r"hidden size of NoSize is not in its config.*config with hidden_size"):
        trainer.train()


# Arguments of the trainer


def test_an_unknown_preset(tmp_path):
    with pytest.raises(ValueError, match=r"'balanecd', did you mean 'balanced'.*Presets: minimal, balanced"):
        CRAFTSFTConfig.from_preset("balanecd", output_dir=str(tmp_path))


@pytest.mark.parametrize("made", [None, 3, (None, None), ("loader",), ([], [], [])], ids=str)
def test_a_factory_that_returns_no_pair_of_loaders(make_trainer, rows, made):
    trainer = make_trainer(rows(8), trainer={"craft_loader_factory": lambda trainer: made})
    with pytest.raises(ValueError, match=r"craft_loader_factory must return \(sft_loader, contrastive_loader\)"):
        trainer.train()


def test_a_factory_beside_loaders(make_trainer, rows):
    with pytest.raises(ValueError, match="either craft_loader_factory or craft_sft_loader"):
        make_trainer(rows(8), trainer={"craft_loader_factory": lambda trainer: ([], []), "craft_sft_loader": []})


def test_a_custom_loader_of_no_mappings(make_trainer, rows, pairs):
    loader = DataLoader(rows(8).with_format("torch")["labels"], batch_size=1)
    with pytest.raises(ValueError, match=r"yields Tensor.*collate_fn.*CRAFTCollator"):
        make_trainer(rows(8), pairs(8), trainer={"craft_contrastive_loader": loader}).train()


def test_a_bundle_beside_a_contrastive_dataset(make_trainer, rows, pairs):
    bundle = make_craft_datasets(rows(8), pairs(8))
    with pytest.raises(ValueError, match="either craft_bundle, or contrastive_dataset and craft_strategy"):
        make_trainer(rows(8), pairs(8), trainer={"craft_bundle": bundle})


@pytest.mark.parametrize(
    ("strategy", "contrastive", "remedy"),
    [
        ("pared_dataset", True, "did you mean 'paired_dataset'"),
        ("paired_dataset", False, "Pass one, or use strategy='self_align'"),
        ("self_align", True, "leave contrastive_dataset out, or use strategy='paired_dataset'"),
    ],
)
def test_a_strategy_that_does_not_fit(make_trainer, rows, pairs, strategy, contrastive, remedy):
    with pytest.raises(ValueError, match=remedy):
        make_trainer(rows(8), pairs(8) if contrastive else None, trainer={"craft_strategy": strategy})


def test_a_scheduler_of_an_optimizer_without_the_head(make_trainer, make_model, rows):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = make_trainer(rows(8), model=model, trainer={"optimizers": (optimizer, scheduler)})
    with pytest.raises(ValueError, match=r"optimizers=\(optimizer, None\)"):
        trainer.train()


def test_an_optimizer_alone_takes_the_head_in(make_trainer, make_model, rows):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = make_trainer(rows(8), model=model, trainer={"optimizers": (optimizer, None)})
    trainer.train()
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert {id(parameter) for parameter in trainer.craft_parameters()} <= held


def test_arguments_without_the_fields(make_model, rows, tokenizer, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match=r"SFTConfig has no craft_\* fields. Use CRAFTSFTConfig, or add them"):
        CRAFTSFTTrainer(model=make_model(), args=args, train_dataset=rows(8), processing_class=tokenizer)
