"""What joint mode does around the loss: resume, the stream of pairs, generated answers, images, and what it refuses."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from joint_trainers import SETTINGS, make_joint, method_rows, preference_rows, vowels
from tiny_runs import pair_rows, tiny_llama
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from craft import CRAFTCollator, CRAFTDPOConfig, CRAFTDPOTrainer, CRAFTORPOConfig
from craft.preferences import check_preferences
from craft.trainers.orpo import CRAFTORPOTrainer

STRATEGIES = ["self_align", "paired_dataset"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_a_resumed_run_is_bit_equal(method, strategy, tmp_path, tokenizer):
    def trainer(directory: str) -> Any:
        return make_joint(
            method,
            tmp_path / directory,
            tokenizer,
            strategy=strategy,
            max_steps=5,
            save_strategy="steps",
            save_steps=2,
            data_seed=3,
            craft_negative_strategy="queue",
            craft_negative_queue_size=8,
        )

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    torch.manual_seed(12345)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for parts in ("model", "craft_loss"):
        first, second = (getattr(t, parts).state_dict() for t in (whole, resumed))
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole.craft_pairs_taken == resumed.craft_pairs_taken == (10 if strategy == "paired_dataset" else 0)


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_run_that_generates_goes_on_from_its_checkpoint(method, tmp_path, tokenizer):
    settings = {"strategy": "paired_dataset", "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    make_joint(method, tmp_path, tokenizer, **settings).train()
    resumed = make_joint(method, tmp_path, tokenizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3
    assert resumed.craft_pairs_taken == 6


def taken_pairs(trainer: Any) -> list[list[int]]:
    """Input ids of the anchors that a run contrasts, in order."""
    seen: list[list[int]] = []
    take = trainer._craft_stream.take

    def watched(number: int) -> list[Any]:
        batches = take(number)
        seen.extend(
            ids[mask.bool()].tolist()
            for batch in batches
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        )
        return batches

    trainer._craft_stream.take = watched
    return seen


@pytest.mark.parametrize("workers", [0, 1])
def test_every_pair_is_contrasted_once_before_one_is_repeated(workers, tmp_path, tokenizer):
    pairs = pair_rows(12)
    trainer = make_joint(
        "dpo",
        tmp_path,
        tokenizer,
        strategy="paired_dataset",
        pairs=pairs,
        max_steps=3,
        craft_contrastive_batch_size=3,
        dataloader_num_workers=workers,
    )
    seen = taken_pairs(trainer)
    trainer.train()
    assert len(seen) == 18
    assert sorted(seen[:12]) == sorted(pairs["input_ids"])
    assert trainer.craft_plan.n_sft == trainer.craft_plan.n_contrastive == 2


def test_a_loader_of_ones_own_gives_the_pairs_and_begins_anew_when_it_ends(tmp_path, tokenizer):
    pairs = pair_rows(6)
    loader = DataLoader(pairs, batch_size=3, collate_fn=CRAFTCollator(pad_token_id=3))
    trainer = make_joint(
        "dpo",
        tmp_path,
        tokenizer,
        strategy="paired_dataset",
        pairs=pairs,
        trainer={"craft_contrastive_loader": loader},
    )
    seen = taken_pairs(trainer)
    trainer.train()
    assert seen == [*pairs["input_ids"], *pairs["input_ids"]]


def test_pairs_leave_the_trainers_own_rows_as_they_were(tmp_path, tokenizer):
    orders = []
    for strategy in (None, "paired_dataset"):
        trainer = make_joint("dpo", tmp_path, tokenizer, strategy=strategy, data_seed=1)
        seen: list[Any] = []
        compute = trainer._compute_loss
        trainer._compute_loss = lambda model, inputs, *a, c=compute, s=seen: (
            s.append(inputs["input_ids"]) or c(model, inputs, *a)
        )
        trainer.train()
        orders.append(torch.cat([ids.flatten() for ids in seen]))
    assert torch.equal(*orders)


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_completions_of_one_prompt_are_no_negatives_of_each_other(method, tmp_path, tokenizer):
    rows = Dataset.from_list([{"prompt": "the same question?"}] * 12)
    trainer = make_joint(method, tmp_path, tokenizer, rows=rows)
    with pytest.warns(UserWarning, match="nothing to contrast"):
        trainer.train()
    assert trainer.craft_metrics["loss/craft_contrast"] == 0


def test_equal_prompts_about_different_images_are_told_apart():
    from PIL import Image

    from craft.trainers.joint import sample_id

    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    ids = [sample_id({"prompt": "What is it?", "image": image}) for image in (red, blue, red.copy())]
    assert ids[0] == ids[2] != ids[1]
    assert all(0 < number < 2**63 for number in ids)


def test_orpo_gives_the_model_what_a_batch_holds_beside_its_texts(vlm, tmp_path, make_sample):
    batch = vlm.collator()([make_sample(), make_sample(answer="a blue star"), make_sample(answer="no"), make_sample()])
    labels = batch.pop("labels")
    half = len(labels) // 2
    rows = Dataset.from_list([{"row": 0}, {"row": 1}])

    def collate(_: Any) -> dict[str, Any]:
        texts = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        sides = {f"chosen_{name}": value[:half] for name, value in texts.items()}
        sides |= {f"rejected_{name}": value[half:] for name, value in texts.items()}
        return sides | {name: value for name, value in batch.items() if name not in texts}

    class Rows(CRAFTORPOTrainer):
        def tokenize_row(self, feature: Any, model: Any = None) -> Any:
            return {}

    losses = []
    for change in (0.0, 1.0):
        batch["pixel_values"] = batch["pixel_values"] + change
        trainer = Rows(
            model=vlm.model(),
            args=CRAFTORPOConfig(
                output_dir=str(tmp_path), max_length=64, padding_value=0, remove_unused_columns=False, **SETTINGS
            ),
            data_collator=collate,
            train_dataset=rows,
            processing_class=vlm.processor.tokenizer,
        )
        trainer.model.train()
        with torch.no_grad():
            losses.append(float(trainer.get_batch_loss_metrics(trainer.model, collate(None))[0]))
    assert losses[0] != losses[1]


@pytest.mark.parametrize("method", ["dpo", "orpo", "kto"])
def test_rows_of_one_sample_are_no_negatives_of_each_other(method, tmp_path, tokenizer):
    rows = method_rows(method)
    trainer = make_joint(method, tmp_path, tokenizer, rows=rows.add_column("id", ["the same"] * len(rows)))
    with pytest.warns(UserWarning, match="nothing to contrast"):
        trainer.train()
    assert trainer.craft_metrics["loss/craft_contrast"] == 0


def test_a_second_run_begins_with_the_first_pairs_again(tmp_path, tokenizer):
    trainer = make_joint("dpo", tmp_path, tokenizer, strategy="paired_dataset", dataloader_num_workers=1)
    seen = taken_pairs(trainer)
    for _ in range(2):
        trainer.train()
        assert trainer._craft_stream._batches is None  # and its workers with it
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


class Judge:
    """A reward that is called as an asynchronous function."""

    __name__ = "judge"

    async def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_an_asynchronous_reward_object_is_called_as_trl_calls_it(method, tmp_path, tokenizer):
    trainer = make_joint(method, tmp_path, tokenizer, max_steps=1, trainer={"reward_funcs": Judge()})
    trainer.train()
    assert trainer.state.log_history[0]["rewards/judge/mean"] > 0


def test_the_plan_counts_no_completion_of_the_same_prompt(tmp_path, tokenizer):
    trainer = make_joint(
        "grpo", tmp_path, tokenizer, gradient_accumulation_steps=1, per_device_train_batch_size=6, num_generations=2
    )
    assert trainer.craft_plan.negatives_per_anchor == 4


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": ""}], "image": "pixels"},
        {"chosen": [{"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}]},
    ],
)
def test_what_says_something_without_a_text_is_not_empty(row):
    messages = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows = [{"prompt": [{"role": "user", "content": "Q"}], **messages, **row}]
    check_preferences(Dataset.from_list(rows))


# What is refused


def test_a_generation_batch_of_one_prompt_has_nothing_to_contrast(tmp_path, tokenizer):
    settings = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4}
    with pytest.raises(ValueError, match=r"the 4 completions of a generation batch are all of one prompt"):
        make_joint("grpo", tmp_path, tokenizer, **settings)
    assert make_joint("grpo", tmp_path, tokenizer, **settings, craft_negative_strategy="queue").craft_enabled
    assert make_joint("grpo", tmp_path, tokenizer, **settings, craft_alpha=1.0) is not None


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_hidden_states_that_nobody_asks_for_are_refused(method, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="craft_use_hidden_state_hook=False asks the model for hidden states"):
        make_joint(method, tmp_path, tokenizer, craft_use_hidden_state_hook=False)


@pytest.mark.parametrize("method", ["grpo", "rloo", "kto", "reward"])
def test_rows_that_cannot_be_learned_from_are_named(method, tmp_path, tokenizer):
    rows = method_rows(method, 8).to_list()
    rows[3]["prompt"] = " "
    with pytest.raises(ValueError, match="row 3: prompt is empty"):
        make_joint(method, tmp_path, tokenizer, rows=Dataset.from_list(rows), strategy="paired_dataset")


def test_answers_that_max_length_cuts_away_are_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"row \d: nothing of its (chosen|rejected) answer is left within max_length"):
        make_joint("orpo", tmp_path, tokenizer, max_length=12)


def test_no_row_at_all_is_told(tmp_path, tokenizer):
    trainer = make_joint("dpo", tmp_path, tokenizer)
    trainer.train_dataset = trainer.train_dataset.select([])
    with pytest.raises(ValueError, match="no SFT row is left"):
        trainer.get_train_dataloader()


def test_pairs_that_do_not_fill_a_batch_are_told(tmp_path, tokenizer):
    trainer = make_joint("dpo", tmp_path, tokenizer, strategy="paired_dataset", pairs=pair_rows(3).select([]))
    with pytest.raises(ValueError, match=r"the 0 pairs do not fill one batch of 4 .* Give more pairs\."):
        trainer.train()


@pytest.mark.parametrize("strategy", ["cap", "error"])
def test_what_says_how_kinds_are_mixed_is_refused(strategy, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=f"craft_length_strategy='{strategy}' has no meaning here: CRAFTDPOTrainer"):
        make_joint("dpo", tmp_path, tokenizer, strategy="paired_dataset", craft_length_strategy=strategy)


def test_a_beta_that_is_not_read_is_told(tmp_path, tokenizer):
    with pytest.warns(UserWarning, match=r"craft_beta=0.75 is not read: CRAFTDPOTrainer adds a batch of pairs"):
        make_joint("dpo", tmp_path, tokenizer, strategy="paired_dataset", craft_beta=0.75)


@pytest.mark.parametrize("name", ["minimal", "balanced", "memory_efficient", "large_batch", "aggressive"])
def test_every_preset_trains(name, tmp_path, tokenizer):
    args = CRAFTDPOConfig.from_preset(
        name, output_dir=str(tmp_path), craft_negative_queue_size=8, **SETTINGS, activation_checkpointing=False
    )
    trainer = CRAFTDPOTrainer(
        tiny_llama(), tiny_llama(), args, train_dataset=method_rows("dpo"), processing_class=tokenizer,
        contrastive_dataset=pair_rows(10),
    )  # fmt: skip
    trainer.train()
    assert trainer.craft_metrics["loss/craft_contrast"] > 0


@pytest.mark.parametrize("method", ["dpo", "orpo"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "same ", "rejected": "same"}, r"row 2: chosen and rejected are equal \('same'\)"),
        ({"prompt": " "}, "row 2: prompt is empty"),
        ({"chosen": ""}, "row 2: chosen is empty"),
        ({"rejected": ""}, "row 2: rejected is empty"),
    ],
)
def test_rows_that_are_no_preferences_are_named(method, row, message, tmp_path, tokenizer):
    rows = preference_rows(4).to_list()
    rows[2] |= row
    with pytest.raises(ValueError, match=message):
        make_joint(method, tmp_path, tokenizer, rows=Dataset.from_list(rows))


def test_equal_conversations_are_no_preference(tmp_path, tokenizer):
    row = {"prompt": [{"role": "user", "content": "Q"}]}
    row |= {side: [{"role": "assistant", "content": "A"}] for side in ("chosen", "rejected")}
    with pytest.raises(ValueError, match="row 0: chosen and rejected are equal"):
        make_joint("dpo", tmp_path, tokenizer, rows=Dataset.from_list([row]))


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_reference_model_of_another_vocabulary_is_refused(method, tmp_path, tokenizer):
    config = LlamaConfig(**{**tiny_llama().config.to_dict(), "vocab_size": 300})
    with pytest.raises(ValueError, match="ref_model has a vocabulary of 300 tokens and the model one of 260"):
        make_joint(method, tmp_path, tokenizer, trainer={"ref_model": LlamaForCausalLM(config)})


@pytest.mark.parametrize("method", ["grpo", "rloo"])
@pytest.mark.parametrize("balancing", ["gradnorm", "uncertainty"])
def test_a_loss_around_0_is_not_weighed_by_its_size(method, balancing, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=f"craft_gradient_balancing='{balancing}' weighs losses by their size.*pcgrad"):
        make_joint(method, tmp_path, tokenizer, craft_gradient_balancing=balancing)


@pytest.mark.parametrize(("name", "value"), [("craft_contrastive_batch_size", 3), ("craft_length_strategy", "cap")])
def test_self_align_tells_what_it_does_not_read(name, value, tmp_path, tokenizer):
    with pytest.warns(UserWarning, match=f"{name}={value!r} is about pairs, and strategy='self_align' has none"):
        make_joint("dpo", tmp_path, tokenizer, **{name: value})


def test_a_reward_model_has_pairs_or_no_contrast(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"no self_align.*contrastive_dataset"):
        make_joint("reward", tmp_path, tokenizer)


def raising(**columns: Any) -> list[float]:
    raise ZeroDivisionError("division by zero")


def too_few(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * (len(completions) - 1)


def not_a_number(completions: list[str], **columns: Any) -> list[float]:
    return [float("nan")] * len(completions)


@pytest.mark.parametrize("method", ["grpo", "rloo"])
@pytest.mark.parametrize("function", [raising, too_few, not_a_number])
def test_a_reward_function_that_misbehaves_is_named(method, function, tmp_path, tokenizer):
    trainer = make_joint(method, tmp_path, tokenizer, trainer={"reward_funcs": [vowels, function]})
    with pytest.raises(ValueError, match=function.__name__):
        trainer.train()


def test_debugging_tells_what_each_step_holds(tmp_path, tokenizer, caplog):
    make_joint("dpo", tmp_path, tokenizer, craft_debug=True).train()
    told = [record.message for record in caplog.records if record.message.startswith("CRAFT step: Window(")]
    assert len(told) == 2
    assert "anchors=8" in told[0]
