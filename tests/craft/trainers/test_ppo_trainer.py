"""PPOTrainer: it learns, its step is the one of the equations, its parts are saved, and it goes on where it stopped."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, PeftModel
from ppo_runs import TARGET, WORDS, letters, make_ppo, prompt_rows, share_of_target, training_logs
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from craft.ppo.experience import model_inputs
from craft.ppo.policy import score_tokens


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def weights(trainer):
    return [p.detach().clone() for p in (*trainer.model.parameters(), *trainer.value_head.parameters())]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_reward_for_a_target_token_rises_from_chance_to_above_090(tmp_path, tokenizer):
    trainer = make_ppo(
        tmp_path,
        tokenizer,
        rows=prompt_rows(64),
        reward_funcs=share_of_target,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        max_completion_length=6,
        learning_rate=5e-3,
        kl_coef=0.001,
        max_steps=160,
        logging_steps=8,
        trainer={"eval_dataset": prompt_rows(8)},
    )
    before = trainer.evaluate()
    trainer.train()
    rewards = [entry["reward"] for entry in training_logs(trainer)]
    assert rewards[0] < 0.02  # chance is 1 in 260
    assert before["eval_reward"] < 0.2
    assert sum(rewards[-5:]) / 5 > 0.9
    assert trainer.evaluate()["eval_reward"] > 0.9


def test_a_completion_that_no_function_rewards_is_refused_and_one_of_several_may_give_none(tmp_path, tokenizer):
    def none(completions, **columns):
        return [None] * len(completions)

    def most(completions, **columns):
        return [None, *[1.0] * (len(completions) - 1)]

    trainer = make_ppo(tmp_path / "none", tokenizer, reward_funcs=[none, most])
    with pytest.raises(ValueError, match=r"^row 0 \('.*\) has no reward: none, most returned None for it"):
        trainer.train()
    trainer = make_ppo(tmp_path / "beside", tokenizer, reward_funcs=[none, letters], max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_log_has_every_figure_and_no_nan(tmp_path, tokenizer):
    trainer = make_ppo(tmp_path, tokenizer, reward_funcs=[letters, share_of_target], logging_steps=2)
    trainer.train()
    logs = training_logs(trainer)
    assert len(logs) == 2
    for entry in logs:
        assert {
            "reward",
            "reward_std",
            "rewards/letters/mean",
            "rewards/share_of_target/mean",
            "kl",
            "entropy",
            "policy_loss",
            "value_loss",
            "clip_fraction",
            "value_clip_fraction",
            "advantages",
            "explained_variance",
            "completions/mean_length",
            "completions/ended",
        } <= set(entry)
        assert all(math.isfinite(value) for value in entry.values())
        own = entry["policy_loss"] + trainer.args.vf_coef * entry["value_loss"]
        assert entry["loss"] == pytest.approx(own, abs=1e-5)
    assert logs[0]["reward"] == pytest.approx(
        logs[0]["rewards/letters/mean"] + logs[0]["rewards/share_of_target/mean"], abs=1e-6
    )
    assert logs[0]["kl"] == pytest.approx(0.0, abs=1e-6)  # of the first rollout


def test_a_rollout_s_advantages_and_the_loss_equal_a_float64_reference(tmp_path, tokenizer):
    args = {"gamma": 0.9, "lam": 0.8, "kl_coef": 0.3, "missing_eos_penalty": 0.5, "kl_estimator": "k3"}
    trainer = make_ppo(tmp_path, tokenizer, **args, max_steps=2)
    trainer.train()
    # Values of the head and a KL that is not 0: the second rollout of the same trainer.
    trainer.model.train()
    batches = trainer._roll_out([prompt_rows(8)[n] for n in range(8)])
    raw, losses = [], []
    for batch in batches:
        mask, width = batch["completion_mask"], batch["completion_mask"].shape[1]
        reference = trainer.reference.logprobs(model_inputs(batch), width, temperature=1.0)
        for b in range(len(mask)):
            length = int(mask[b].sum())
            ids = batch["input_ids"][b, -width:][:length].tolist()
            score = letters([ids])[0] - (0.5 if ids[-1] != tokenizer.eos_token_id else 0.0)
            rewards = []
            for t in range(length):
                d = float(reference[b, t]) - float(batch["old_logprobs"][b, t])
                rewards.append(-0.3 * (math.exp(d) - 1 - d) + (score if t == length - 1 else 0.0))
            values = [*batch["old_values"][b, :length].tolist(), 0.0]
            deltas = [rewards[t] + 0.9 * values[t + 1] - values[t] for t in range(length)]
            for t in range(length):
                advantage = sum(0.72 ** (k - t) * deltas[k] for k in range(t, length))
                raw.append(advantage)
                assert float(batch["returns"][b, t]) == pytest.approx(advantage + values[t], abs=1e-4)
    mean = math.fsum(raw) / len(raw)
    deviation = math.sqrt(math.fsum((a - mean) ** 2 for a in raw) / (len(raw) - 1))
    white = iter([(a - mean) / deviation for a in raw])
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    found = []
    assert any(batch["old_values"].any() for batch in batches)
    for batch in batches:
        mask, width = batch["completion_mask"], batch["completion_mask"].shape[1]
        with torch.no_grad():
            now = score_tokens(
                trainer.model, model_inputs(batch), width, temperature=1.0, value_head=trainer.value_head
            )
        found.append(float(trainer.compute_loss(trainer.model, batch).detach()))
        for b, t in mask.nonzero().tolist():
            advantage = next(white)
            assert float(batch["advantages"][b, t]) == pytest.approx(advantage, abs=1e-4)
            ratio = math.exp(float(now.logprobs_BC[b, t]) - float(batch["old_logprobs"][b, t]))
            policy = -min(ratio * advantage, max(min(ratio, 1.2), 0.8) * advantage)
            v, old, target = (float(x[b, t]) for x in (now.values_BC, batch["old_values"], batch["returns"]))
            value = 0.5 * max((v - target) ** 2, (old + max(min(v - old, 0.2), -0.2) - target) ** 2)
            losses.append(policy + 0.1 * value)
    assert sum(found) / len(found) == pytest.approx(math.fsum(losses) / len(losses), abs=1e-5)


def test_the_step_does_not_depend_on_how_the_rollout_is_split(tmp_path, tokenizer):
    # Completions of different lengths; greedy, so that the same are written in either split.
    rows, gradients = prompt_rows(8), []
    whole = make_ppo(tmp_path / "a", tokenizer, top_k=1, rows=rows, per_device_train_batch_size=8)
    parts = make_ppo(tmp_path / "b", tokenizer, top_k=1, rows=rows, per_device_train_batch_size=2)
    for trainer in (whole, parts):
        trainer._end_ids = list(range(0, 260, 5))
        trainer.model.train()
        batches = trainer._roll_out([rows[n] for n in range(8)])
        assert len({int(mask.sum()) for batch in batches for mask in batch["completion_mask"]}) > 1
        for batch in batches:
            (trainer.compute_loss(trainer.model, batch) / len(batches)).backward()
        gradients.append([p.grad for p in (*trainer.model.parameters(), *trainer.value_head.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_a_rollout_is_used_for_its_ppo_epochs_and_then_made_anew(tmp_path, tokenizer):
    seen = []

    def watched(prompts, completion_ids, **columns):
        seen.append((list(prompts), columns["number"]))
        return letters(completion_ids)

    trainer = make_ppo(tmp_path, tokenizer, reward_funcs=watched, num_ppo_epochs=3, max_steps=12)
    trainer.train()
    assert len(seen) == 4
    order = [number for _, numbers in seen for number in numbers]
    assert sorted(order[:16]) == sorted(order[16:]) == list(range(16))  # one pass in 6 steps
    assert order[:16] != order[16:]
    assert trainer.state.epoch == 2.0
    assert all(
        prompt.endswith(f" {n}") for prompts, numbers in seen for prompt, n in zip(prompts, numbers, strict=True)
    )


@pytest.mark.parametrize("steps", [2, 4, 5])  # between rollouts; at the end of an epoch; within a rollout
def test_a_resumed_run_goes_on_where_it_stopped(steps, tmp_path, tokenizer):
    config = {"max_steps": 8, "save_strategy": "steps", "save_steps": steps, "lr_scheduler_type": "constant"}
    whole = make_ppo(tmp_path, tokenizer, **config)
    whole.train()
    seen = []

    def watched(completion_ids, **columns):
        seen.append(columns["number"])
        return letters(completion_ids)

    resumed = make_ppo(tmp_path, tokenizer, reward_funcs=watched, **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert resumed.state.global_step == 8
    assert same(weights(whole), weights(resumed)) == (steps != 5)
    if steps == 5:  # the rows of the rollout that was cut short, completed by the policy as it was then
        assert len(seen) == 2
        assert not set(seen[0]) & set(seen[1])


def test_a_trainer_that_trains_again_begins_with_a_new_rollout(tmp_path, tokenizer):
    config = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    used = make_ppo(tmp_path, tokenizer, **config)
    used.train()
    fresh = make_ppo(tmp_path, tokenizer, **config)
    for trainer in (used, fresh):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))  # within a rollout
    assert same(weights(used), weights(fresh))


def test_the_value_head_is_trained_saved_and_kept_out_of_the_adapter(tmp_path, tokenizer):
    config = {"save_strategy": "steps", "save_steps": 4, "value_head_learning_rate": 0.05}
    trainer = make_ppo(tmp_path, tokenizer, trainer={"peft_config": lora()}, **config)
    trainer.train()
    assert trainer.value_head.weight.any()
    group = trainer.optimizer.param_groups[-1]
    assert group["initial_lr"] == 0.05
    assert {id(p) for p in group["params"]} == {id(p) for p in trainer.value_head.parameters()}
    saved = load_file(tmp_path / "checkpoint-4" / "ppo_value_head.safetensors")
    assert torch.equal(saved["weight"], trainer.value_head.weight)
    trainer.save_model(str(tmp_path / "export"))
    assert not list((tmp_path / "export").glob("ppo_*"))
    adapter = load_file(tmp_path / "export" / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapter)
    (tmp_path / "checkpoint-4" / "ppo_value_head.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks ppo_value_head"):
        make_ppo(tmp_path, tokenizer, trainer={"peft_config": lora()}).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )


def test_gradient_accumulation_clears_the_value_head_s_gradient(tmp_path, tokenizer):
    # plain SGD: a gradient that is left over would move it on
    trainer = make_ppo(tmp_path, tokenizer, optim="sgd", max_steps=3, max_grad_norm=0.0, lr_scheduler_type="constant")
    seen = []
    step = trainer.training_step

    def watched(*args, **kwargs):
        before = trainer.value_head.weight.grad is None
        loss = step(*args, **kwargs)
        seen.append(before)
        return loss

    trainer.training_step = watched
    trainer.train()
    assert seen == [True, False] * 3


def test_a_new_adapter_a_whole_model_and_a_given_reference_train(tmp_path, tokenizer, make_model):
    for name, given in {
        "whole": {},
        "adapter": {"peft_config": lora()},
        "reference": {"ref_model": make_model()},
    }.items():
        trainer = make_ppo(tmp_path / name, tokenizer, trainer=given, gradient_checkpointing=name == "adapter")
        before = weights(trainer)
        trainer.train()
        assert not same(before, weights(trainer))
        assert training_logs(trainer)[0]["kl"] == pytest.approx(0.0, abs=1e-6)
        assert training_logs(trainer)[-1]["kl"] != 0.0
        assert isinstance(trainer.model, PeftModel) == (name == "adapter")


def test_without_a_kl_penalty_there_is_no_reference(tmp_path, tokenizer, make_model):
    trainer = make_ppo(tmp_path, tokenizer, kl_coef=0.0)
    trainer.train()
    assert trainer.reference is None
    assert "kl" not in training_logs(trainer)[0]
    with pytest.raises(ValueError, match="kl_coef=0"):
        make_ppo(tmp_path, tokenizer, kl_coef=0.0, trainer={"ref_model": make_model()})


def test_a_model_is_loaded_from_its_path_with_its_tokenizer(tmp_path, tokenizer, make_model):
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = make_ppo(tmp_path, None, model=str(tmp_path / "model"), model_init_kwargs={"dtype": torch.float64})
    assert trainer.model.dtype == torch.float64
    with pytest.raises(ValueError, match="model_init_kwargs are for a model given as a path"):
        make_ppo(tmp_path, tokenizer, model_init_kwargs={"dtype": "float32"})


def test_an_evaluation_reports_rewards_and_leaves_training_as_it_was(tmp_path, tokenizer):
    def half(completion_ids, number, **columns):
        return [None if n % 2 else 1.0 for n in number]

    config = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3}
    found = {}
    for name, given in (("with", config), ("without", {})):
        trainer = make_ppo(
            tmp_path / name,
            tokenizer,
            reward_funcs=[half, letters],
            reward_weights=[0.5, 2.0],
            trainer={"eval_dataset": prompt_rows(7)},
            **given,
        )
        trainer.train()
        found[name] = weights(trainer)
    assert same(found["with"], found["without"])
    metrics = trainer.evaluate()
    again = trainer.evaluate()
    assert metrics["eval_reward"] == again["eval_reward"]
    assert metrics["eval_rewards/half"] == 1.0  # rows without a reward are left out of its mean, and count 0
    assert metrics["eval_reward"] == pytest.approx(0.5 * 4 / 7 + 2.0 * metrics["eval_rewards/letters"])
    assert {"eval_kl", "eval_completions/mean_length", "eval_runtime"} <= set(metrics)
    assert "eval_loss" not in metrics


def test_reward_models_score_prompts_with_completions(tmp_path, tokenizer, make_model):
    config = copy.deepcopy(make_model().config)
    config.num_labels = 1
    torch.manual_seed(1)
    judge = AutoModelForSequenceClassification.from_config(config)
    given = {"reward_processing_classes": [tokenizer, None]}
    trainer = make_ppo(tmp_path, tokenizer, reward_funcs=[judge, letters], trainer=given, max_steps=1)
    completions = [[TARGET, TARGET + 1], [TARGET + 2]]
    rows = [{"prompt": word} for word in WORDS[:2]]
    found = trainer.rewards(rows, completions, trainer.state)
    for row, ids, reward in zip(rows, completions, found[:, 0], strict=True):
        tokens = torch.tensor([tokenizer(row["prompt"] + tokenizer.decode(ids))["input_ids"]])
        with torch.no_grad():
            assert float(judge(input_ids=tokens).logits) == pytest.approx(float(reward), abs=1e-5)
    assert found[:, 1].tolist() == pytest.approx(letters(completions))
    trainer.train()
    assert "rewards/LlamaForSequenceClassification/mean" in training_logs(trainer)[0]


def test_chat_prompts_give_chat_completions(tmp_path, tokenizer):
    seen = []

    def judge(prompts, completions, completion_ids, **columns):
        seen.append((prompts[0], completions[0]))
        return letters(completion_ids)

    rows = [{"prompt": [{"role": "user", "content": word}]} for word in WORDS]
    make_ppo(tmp_path, tokenizer, rows=rows, reward_funcs=judge, max_steps=1).train()
    prompt, completion = seen[0]
    assert prompt[0]["role"] == "user"
    assert [message["role"] for message in completion] == ["assistant"]


def test_images_are_trained_on(vlm, make_sample, tmp_path):
    collator = vlm.collator()
    samples = [make_sample(colour=colour) for colour in ("red", "blue", "green", "black")]
    rows = [{"prompt": sample.prompt.text, "sample": sample} for sample in samples]
    trainer = make_ppo(
        tmp_path,
        vlm.processor,
        model=vlm.model(),
        rows=rows,
        per_device_train_batch_size=2,
        max_steps=2,
        trainer={
            "prompt_collator": lambda rows: collator.prompts([row["sample"] for row in rows]),
            "peft_config": lora(),
        },
    )
    before = weights(trainer)
    trainer.train()
    assert not same(before, weights(trainer))
    assert math.isfinite(training_logs(trainer)[-1]["loss"])


def test_images_of_a_column_are_trained_on(vlm, tmp_path):
    from PIL import Image

    rows = [
        {"prompt": [{"role": "user", "content": "What?"}], "image": Image.new("RGB", (48, 32), colour)}
        for colour in ("red", "blue")
    ]
    given = {"peft_config": lora()}
    config = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 1}
    trainer = make_ppo(tmp_path, vlm.processor, model=vlm.model(), rows=rows, trainer=given, **config)
    trainer.train()
    assert trainer.state.global_step == 1


def test_what_cannot_be_trained_on_is_refused(tmp_path, tokenizer, make_model):
    def refused(words, error=ValueError, **given):
        with pytest.raises(error, match=words):
            make_ppo(tmp_path, tokenizer, **given).train()

    refused("row 1 of train_dataset has an empty prompt", rows=[{"prompt": "a"}, {"prompt": ""}])
    refused("no column 'prompt'", rows=[{"question": "a"}])
    refused("row 0 of held_out has an empty prompt", trainer={"eval_dataset": {"held_out": [{"prompt": " "}]}})
    refused("needs at least one reward function", reward_funcs=[])
    refused("needs at least one reward function", reward_funcs=None)
    refused("cannot be called", TypeError, reward_funcs=[3])
    refused("reward_weights has 3 weights for 1 reward functions", reward_weights=[1.0, 1.0, 1.0])
    refused("has 2 entries for 1 reward", trainer={"reward_processing_classes": [None, None]})
    refused("vocabulary of 300 tokens", trainer={"ref_model": resized(make_model())})
    refused("leaves no room for a prompt", max_completion_length=256)
    refused("has 5 tokens; .* leaves 4", rows=[{"prompt": "four "}], max_completion_length=252)
    refused("'broken' raised KeyError for row 0", reward_funcs=broken)
    refused("split_batches", accelerator_config={"split_batches": True})

    async def later(**columns):
        return []

    refused("'later' is async", TypeError, reward_funcs=later)
    adapted = make_ppo(tmp_path, tokenizer, trainer={"peft_config": lora()}).model
    refused("has an adapter already", model=adapted, trainer={"peft_config": lora()})


def broken(**columns):
    raise KeyError("no such thing")


def resized(model):
    model.resize_token_embeddings(300)
    return model


def test_dropout_is_as_the_settings_say(tmp_path, tokenizer, make_model):
    with pytest.warns(UserWarning, match="dropout was turned off"):
        trainer = make_ppo(tmp_path, tokenizer, model=make_model(dropout=0.2), num_ppo_epochs=1, max_steps=1)
    trainer.train()
    assert training_logs(trainer)[0]["clip_fraction"] == 0.0  # the ratio is 1 in the first step
    kept = make_ppo(
        tmp_path, tokenizer, model=make_model(dropout=0.5), num_ppo_epochs=1, max_steps=1, disable_dropout=False
    )
    kept.train()
    assert kept.model.model.layers[0].self_attn.attention_dropout == 0.5
    assert training_logs(kept)[0]["policy_loss"] != pytest.approx(training_logs(trainer)[0]["policy_loss"], abs=1e-7)


def test_unused_columns_are_kept_unless_they_are_to_go(tmp_path, tokenizer):
    def judge(completion_ids, **columns):
        assert "number" not in columns
        return letters(completion_ids)

    make_ppo(tmp_path, tokenizer, reward_funcs=judge, remove_unused_columns=True, max_steps=1).train()


def test_bf16_autocast_trains_with_float32_figures(tmp_path, tokenizer):
    trainer = make_ppo(tmp_path, tokenizer, bf16=True, trainer={"peft_config": lora()}, gradient_checkpointing=True)
    trainer.train()
    assert trainer.value_head.weight.dtype == torch.float32
    batch = trainer._rollout[0]
    assert {batch[name].dtype for name in ("old_logprobs", "old_values", "advantages", "returns")} == {torch.float32}
    # Old and new figures come from the same kind of pass: the first step's ratios are 1.
    first = training_logs(trainer)[0]
    assert first["clip_fraction"] == first["value_clip_fraction"] == 0.0
    assert math.isfinite(training_logs(trainer)[-1]["loss"])


def test_a_scheduler_that_knows_nothing_of_the_value_head_is_refused(tmp_path, tokenizer, make_model):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match=r"optimizers=\(optimizer, None\)"):
        make_ppo(tmp_path, tokenizer, model=model, trainer={"optimizers": (optimizer, scheduler)}).train()
    trainer = make_ppo(tmp_path, tokenizer, model=model, trainer={"optimizers": (optimizer, None)})
    trainer.train()
    assert trainer.value_head.weight.any()
