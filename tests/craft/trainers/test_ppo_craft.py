"""CRAFTPPOTrainer: PPO and the contrastive loss in each micro-batch."""

import math

import pytest
import torch
from peft import LoraConfig
from ppo_runs import letters, make_ppo, prompt_rows, training_logs
from tiny_runs import pair_rows

from craft import CRAFTPPOConfig, CRAFTPPOTrainer
from craft.trainers.ppo import PPOTrainer


def weights(trainer):
    return [p.detach().clone() for p in (*trainer.model.parameters(), *trainer.value_head.parameters())]


def make(output_dir, tokenizer, strategy, *, trainer=None, **config):
    given = {"contrastive_dataset": pair_rows(10)} if strategy == "paired_dataset" else {}
    return make_ppo(
        output_dir,
        tokenizer,
        cls=CRAFTPPOTrainer,
        args_class=CRAFTPPOConfig,
        trainer={**given, **(trainer or {})},
        **config,
    )


@pytest.mark.parametrize("strategy", ["self_align", "paired_dataset"])
def test_alpha_1_gives_the_weights_of_the_plain_trainer_to_the_bit(strategy, tmp_path, tokenizer):
    plain = make_ppo(tmp_path / "plain", tokenizer, cls=PPOTrainer)
    craft = make(tmp_path / "craft", tokenizer, strategy, craft_alpha=1.0)
    for trainer in (plain, craft):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(craft), strict=True))


@pytest.mark.parametrize("strategy", ["self_align", "paired_dataset"])
def test_both_losses_are_trained_and_logged(strategy, tmp_path, tokenizer):
    plain = make_ppo(tmp_path / "plain", tokenizer)
    plain.train()
    trainer = make(tmp_path / "craft", tokenizer, strategy)
    head = [p.detach().clone() for p in trainer.craft_parameters()]
    trainer.train()
    logs = training_logs(trainer)
    for entry in logs:
        own = entry["policy_loss"] + 0.1 * entry["value_loss"]
        assert entry["loss/craft_sft"] == pytest.approx(own, abs=1e-5)
        assert entry["loss/craft_contrast"] > 0
        total = 0.6 * entry["loss/craft_sft"] + 0.4 * entry["loss/craft_contrast"]
        assert entry["loss/craft_total"] == pytest.approx(total)
        assert entry["loss"] == pytest.approx(total, abs=1e-5)
        assert all(math.isfinite(value) for value in entry.values())
    assert logs[0]["reward"] == training_logs(plain)[0]["reward"]  # the first rollout is the same
    assert all(not torch.equal(a, b) for a, b in zip(head, trainer.craft_parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(weights(plain), weights(trainer), strict=True))


def test_self_align_takes_both_losses_from_one_forward_pass(tmp_path, tokenizer):
    passes = {}
    for name, alpha in (("plain", 1.0), ("craft", 0.6)):
        trainer = make(tmp_path / name, tokenizer, "self_align", craft_alpha=alpha)
        count = [0]
        trainer.model.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        trainer.train()
        passes[name] = count[0]
    assert passes["craft"] == passes["plain"]


def test_prompt_and_completion_are_what_is_contrasted(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, "self_align")
    trainer.model.train()
    for batch in trainer._roll_out([prompt_rows(8)[n] for n in range(8)]):
        answers = trainer._craft_answers(batch)
        assert not (answers.prompt_BT & answers.answer_BT).any()
        assert torch.equal(answers.prompt_BT | answers.answer_BT, batch["attention_mask"].bool())
        assert answers.answer_BT.sum(1).tolist() == batch["completion_mask"].sum(1).tolist()
        assert answers.valid_B.all()
        assert len(set(answers.sample_ids_B.tolist())) == len(answers.sample_ids_B)


def test_completions_of_one_prompt_are_no_negatives_of_each_other(tmp_path, tokenizer):
    rows = [{"prompt": word} for word in ("one", "two")]
    trainer = make(tmp_path, tokenizer, "self_align", rows=rows)
    trainer.model.train()
    (batch, *_) = trainer._roll_out([rows[0], rows[0], rows[1], rows[1], *rows, *rows])
    ids = trainer._craft_answers(batch).sample_ids_B.tolist()
    assert ids[0] == ids[1] != ids[2] == ids[3]


@pytest.mark.parametrize("steps", [2, 4])
def test_a_resumed_run_with_craft_goes_on_where_it_stopped(steps, tmp_path, tokenizer):
    config = {"max_steps": 6, "save_strategy": "steps", "save_steps": steps, "craft_gradient_balancing": "pcgrad"}
    whole = make(tmp_path, tokenizer, "paired_dataset", **config)
    whole.train()
    resumed = make(tmp_path, tokenizer, "paired_dataset", **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


@pytest.mark.parametrize("strategy", ["self_align", "paired_dataset"])
def test_images_are_trained_on_with_craft(strategy, vlm, make_sample, tmp_path):
    collator = vlm.collator()
    samples = [make_sample(colour=colour) for colour in ("red", "blue", "green", "black")]
    rows = [{"prompt": sample.prompt.text, "sample": sample} for sample in samples]
    trainer = make(
        tmp_path,
        vlm.processor,
        strategy,
        model=vlm.model(),
        rows=rows,
        reward_funcs=letters,
        per_device_train_batch_size=2,
        temperature=3.0,  # equal completions are no negatives, and this model is sure of its first words
        max_steps=2,
        trainer={
            "prompt_collator": lambda rows: collator.prompts([row["sample"] for row in rows]),
            "peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        },
    )
    trainer.train()
    assert training_logs(trainer)[-1]["loss/craft_contrast"] > 0


def test_hidden_states_can_be_asked_of_the_model_instead_of_hooked(tmp_path, tokenizer):
    found = []
    for hooked in (True, False):
        trainer = make(tmp_path / str(hooked), tokenizer, "self_align", craft_use_hidden_state_hook=hooked)
        trainer.train()
        found.append(weights(trainer))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
