"""What the README and the training guide promise beside their code: TRL's scripts go on, and each sentence holds."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from guide_runs import LOG_KEYS, config, finite_logs
from trl import SFTConfig, SFTTrainer

from craft.data import CRAFTCollator, make_craft_datasets
from craft.trainers import CRAFTSFTTrainer

pytestmark = pytest.mark.usefixtures("workshop")

# Drop-in


def told(role_text: str, reply: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": role_text}, {"role": "assistant", "content": reply}]


def words(count: int = 24) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices("abcdef ", k=draw.randrange(3, 20))) + str(i) for i in range(count)]


FORMATS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "raw text": lambda word, end: {f"text{end}": word + end},
    "prompt and completion": lambda word, end: {f"prompt{end}": word, f"completion{end}": f" {word.upper()}{end}"},
    "messages": lambda word, end: {f"messages{end}": told(word, word.upper() + end)},
    "prompts of messages": lambda word, end: {
        f"prompt{end}": told(word, "")[:1],
        f"completion{end}": told("", word.upper() + end)[1:],
    },
    "tokens": lambda word, end: {f"input_ids{end}": list(f"{word}{end}".encode())},
    "tokens and masks": lambda word, end: {
        f"input_ids{end}": list(f"{word}{end}".encode()),
        f"attention_mask{end}": [1] * len(f"{word}{end}"),
    },
}


@pytest.mark.parametrize("strategy", ["self_align", "paired_dataset"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_script_of_trl_goes_on_with_another_config_and_trainer(form, strategy, make_model, tokenizer):
    rows = Dataset.from_list([FORMATS[form](word, "") for word in words()])
    pairs = Dataset.from_list([{**FORMATS[form](word, ""), **FORMATS[form](word, "_tgt")} for word in words(20)])
    more = {"contrastive_dataset": pairs} if strategy == "paired_dataset" else {}
    trainer = CRAFTSFTTrainer(
        model=make_model(),
        args=config(max_steps=5, logging_steps=5),
        train_dataset=rows,
        processing_class=tokenizer,
        **more,
    )
    trainer.train()
    assert trainer.craft_bundle.strategy == strategy
    assert finite_logs(trainer)[-1].keys() >= LOG_KEYS


def marked(rows: Dataset, column: str, *, labels: bool) -> Dataset:
    """The answers marked by a column of their own."""
    return Dataset.from_list(
        [
            {
                "input_ids": row["input_ids"],
                column: [int(label != -100) for label in row["labels"]],
                **({"labels": row["input_ids"]} if labels else {}),
            }
            for row in rows
        ]
    )


@pytest.mark.parametrize("labels", [True, False], ids=["all tokens learned", "no labels"])
@pytest.mark.parametrize("column", ["assistant_masks", "assistant_mask", "answer"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_either_spelling_of_the_mask_marks_the_answer(make_trainer, rows, column, labels, side, spy):
    """With settings as they are, TRL keeps neither column: what is contrasted would be halves of the whole text."""
    collator = {"data_collator": CRAFTCollator(padding_side=side)} if side == "left" else {}
    key = {"craft_assistant_mask_key": "answer"} if column == "answer" else {}
    trainer = make_trainer(marked(rows(16), column, labels=labels), trainer=collator, max_length=22, **key)
    reference = make_trainer(rows(16), trainer=collator, max_length=22)
    kept = [set(map(tuple, marked_tokens(each))) for each in (trainer, reference)]
    assert kept[1] <= kept[0]  # TRL drops rows without a learned token: there are none where all tokens are learned
    trainer.train()
    assert trainer.craft_metrics["loss/craft_contrast"] > 0


def marked_tokens(trainer: Any) -> list[list[int]]:
    """The tokens that are taken for answers in an epoch, sorted."""
    found = []
    for batch in trainer.get_train_dataloader():
        answers = trainer._craft_answers(batch)
        found += [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], answers.answer_BT, strict=True)]
    return sorted(found)


def test_the_column_of_labels_may_have_another_name(make_trainer, rows):
    renamed = rows(16).map(lambda row: {"labels": row["input_ids"], "answers": row["labels"]})
    trainer = make_trainer(renamed, craft_contrastive_keys={"anchor_labels": "answers"})
    assert trainer.args.craft_contrastive_keys.anchor_labels == "answers"
    assert marked_tokens(trainer) == marked_tokens(make_trainer(rows(16)))
    trainer.train()


# Sentences


def test_alpha_means_what_it_says_in_the_plan(make_trainer, rows, pairs):
    plan = make_trainer(rows(24), pairs(24), craft_beta=0.75, craft_contrastive_batch_size=6).craft_plan
    assert (plan.n_sft, plan.n_contrastive) == (3, 1)
    assert plan.effective_alpha == 0.6
    assert plan.negatives_per_anchor == 5  # every other example in the contrastive batch
    assert "3 SFT and 1 contrastive" in str(plan)


def test_beta_is_the_share_of_sft_batches_in_a_window(make_trainer, rows, pairs, spy):
    trainer = make_trainer(rows(40), pairs(24), craft_beta=0.75, craft_contrastive_batch_size=2)
    spy.watch(trainer)
    trainer.train()
    for step in spy.batches:
        assert [batch["craft_batch_type"] for batch in step] == ["sft", "sft", "sft", "craft"]
        assert [len(batch["input_ids"]) for batch in step] == [4, 4, 4, 2]


@pytest.mark.parametrize(
    ("strategy", "sft", "contrastive"),
    [("oversample", 12, 12), ("cap", 4, 4), ("auto_beta", 12, 4)],
)
def test_length_strategies_end_the_epoch_where_they_say(make_trainer, rows, pairs, spy, strategy, sft, contrastive):
    trainer = make_trainer(
        rows(48), pairs(16), craft_beta=0.5, craft_length_strategy=strategy, max_steps=-1, num_train_epochs=1
    )
    spy.watch(trainer)
    trainer.train()
    kinds = [batch["craft_batch_type"] for step in spy.batches for batch in step]
    assert (kinds.count("sft"), kinds.count("craft")) == (sft, contrastive)


def test_self_align_takes_both_losses_from_one_forward_pass(make_trainer, rows):
    trainer = make_trainer(rows(40))
    passes = []
    trainer.model.model.register_forward_hook(lambda *_: passes.append(1))
    trainer.train()
    assert len(passes) == 2 * 4


@pytest.mark.parametrize("strategy", ["self_align", "paired_dataset"])
def test_evaluation_remains_pure_sft(make_trainer, make_model, rows, pairs, tokenizer, strategy):
    # failure 10
    heldout = rows(8, seed=5)
    trainer = make_trainer(
        rows(40),
        pairs(24) if strategy == "paired_dataset" else None,
        trainer={"eval_dataset": heldout},
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        craft_negative_strategy="queue",
        craft_negative_queue_size=16,
        craft_gradient_balancing="loss_scale",
    )
    in_evaluation = []
    trainer.craft_loss.projector.register_forward_hook(lambda *_: in_evaluation.append(not trainer.model.training))
    trainer.train()
    assert in_evaluation
    assert not any(in_evaluation)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2
    assert not [key for entry in evaluations for key in entry if "craft" in key]
    plain = SFTTrainer(
        model=trainer.model,
        args=SFTConfig(output_dir="plain", report_to="none", use_cpu=True, bf16=False, per_device_eval_batch_size=4),
        train_dataset=rows(40),
        eval_dataset=heldout,
        processing_class=tokenizer,
    )
    assert plain.evaluate()["eval_loss"] == evaluations[-1]["eval_loss"]


def test_alpha_one_disables_it_without_code_changes(make_trainer, rows, pairs):
    trainer = make_trainer(
        rows(24),
        trainer={"craft_bundle": make_craft_datasets(rows(24), pairs(24)), "craft_collator": CRAFTCollator()},
        craft_alpha=1.0,
        craft_negative_strategy="queue",
        craft_gradient_balancing="pcgrad",
        craft_use_gradcache=True,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    assert trainer.craft_metrics == {}
    assert trainer.craft_plan is None
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in trainer.model.parameters()}
    assert not list(Path(trainer.args.output_dir).rglob("*craft*"))


def test_a_resumed_run_has_head_beta_schedule_and_reference(make_trainer, rows, pairs, spy, tmp_path):
    def trainer(**more: Any) -> Any:
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "craft_beta": 0.75, "data_seed": 1}
        return make_trainer(rows(24), pairs(24), **{**settings, **more})

    whole = trainer()
    spy.watch(whole)
    whole.train()
    resumed = trainer()
    other = type(spy)().watch(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    kinds = [[[batch["craft_batch_type"] for batch in step] for step in each.batches] for each in (spy, other)]
    assert kinds[0][2:] == kinds[1]
    assert kinds[0][2] == ["sft", "sft", "sft", "craft"][: len(kinds[0][2])] or "craft" in kinds[0][2]
    for mine, theirs in zip(whole.craft_parameters(), resumed.craft_parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(whole._craft_journal.reference, resumed._craft_journal.reference)


def test_the_reported_metrics_are_those_that_were_asked_for(make_trainer, rows):
    trainer = make_trainer(rows(24), craft_report_metrics=["temperature"])
    trainer.train()
    asked = {key for key in finite_logs(trainer)[-1] if key.startswith("metrics/craft")}
    assert asked == {"metrics/craft_temperature"}
    assert trainer.craft_metrics["metrics/craft_temperature"] == pytest.approx(0.05)


def test_training_raises_the_accuracy_and_lowers_the_loss(make_trainer, rows, pairs):
    trainer = make_trainer(
        rows(32), pairs(16), max_steps=40, learning_rate=3e-3, gradient_accumulation_steps=2, logging_steps=5
    )
    trainer.train()
    logs = finite_logs(trainer)
    assert logs[-1]["loss/craft_contrast"] < 0.5 * logs[0]["loss/craft_contrast"]
    assert logs[-1]["metrics/craft_contrastive_accuracy"] > 0.7
