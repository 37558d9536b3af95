"""The gradient of an optimizer step in joint mode is that of the objective, written out plainly."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from joint_trainers import NAMES, PLAIN, make_joint, tiny_reward_model
from test_craft_objective import head, last_state, pooled, relative_error
from tiny_runs import Spy, tiny_llama

CASES = [(method, strategy) for method in NAMES for strategy in ("self_align", "paired_dataset")]
CASES.remove(("reward", "self_align"))


def watch_micro_batches(trainer: Any) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each micro-batch as the loss is given it, with its pairs."""
    seen: list[tuple[dict[str, Any], dict[str, Any] | None]] = []
    compute = trainer.compute_loss

    def watched(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        waiting = trainer._craft_waiting
        seen.append((copy.copy(inputs), dict(waiting[0]) if waiting else None))
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    return seen


def own_loss(trainer: Any, method: str, inputs: dict[str, Any]) -> torch.Tensor:
    """TRL's loss of a micro-batch, as its mean."""
    inputs = {name: value for name, value in inputs.items() if not name.startswith("craft_")}
    loss = PLAIN[method].compute_loss(trainer, trainer.model, inputs)
    return loss * trainer.current_gradient_accumulation_steps if method == "grpo" else loss


def anchor_losses(trainer: Any, inputs: dict[str, Any], pairs: dict[str, Any] | None) -> list[torch.Tensor]:
    """InfoNCE of each anchor by loops; completions of one prompt, and equal ones, are no negatives of each other."""
    anchors, positives = (head(trainer, vectors) for vectors in sides(trainer, inputs, pairs))
    told = [] if pairs is not None else inputs_texts(trainer, inputs)
    losses = []
    for i, anchor in enumerate(anchors):
        kept = [j for j in range(len(positives)) if j == i or not told or not same(told[i], told[j])]
        sims = torch.stack([(anchor @ positives[j]) / trainer.craft_loss.temperature for j in kept])
        losses.append(torch.logsumexp(sims, 0) - sims[kept.index(i)])
    return losses


def inputs_texts(trainer: Any, inputs: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Tokens of each row's prompt and answer."""
    answers = trainer._craft_answers(inputs)
    rows = zip(answers.input_ids_BT, answers.prompt_BT, answers.answer_BT, strict=True)
    return [(ids[prompt].tolist(), ids[answer].tolist()) for ids, prompt, answer in rows]


def same(one: tuple[list[int], list[int]], other: tuple[list[int], list[int]]) -> bool:
    return one[0] == other[0] or one[1] == other[1]


def sides(trainer: Any, inputs: dict[str, Any], pairs: dict[str, Any] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled hidden states of anchors and positives, each side from a pass of its own."""
    if pairs is not None:
        found = [
            pooled(last_state(trainer.model, pairs["input_ids" + end], mask), mask)
            for end in ("", "_tgt")
            for mask in [pairs["attention_mask" + end]]
        ]
        return found[0], found[1]
    answers = trainer._craft_answers(inputs)
    whole = last_state(trainer.model, answers.input_ids_BT, (answers.prompt_BT | answers.answer_BT).long())
    return pooled(whole, answers.prompt_BT), pooled(whole, answers.answer_BT)


@pytest.mark.parametrize(("method", "strategy"), CASES)
def test_the_gradient_of_a_step_is_that_of_the_objective(method, strategy, tmp_path, tokenizer):
    model = (tiny_llama() if method != "reward" else tiny_reward_model()).double()
    reference = {"ref_model": tiny_llama(seed=1).double()} if method in ("dpo", "kto") else {}
    trainer = make_joint(
        method, tmp_path, tokenizer, strategy=strategy, model=model, trainer=reference, max_grad_norm=0.0
    )
    trainer.craft_loss.double()
    seen, spy = watch_micro_batches(trainer), Spy()
    spy.trainer = trainer
    errors = []

    def compare(*args: Any, **kwargs: Any) -> None:
        Spy.on_pre_optimizer_step(spy, *args, **kwargs)
        parameters = [*trainer.model.parameters(), *trainer.craft_loss.parameters()]
        kept = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        own = [own_loss(trainer, method, inputs) for inputs, _ in seen]
        anchors = [loss for inputs, pairs in seen for loss in anchor_losses(trainer, inputs, pairs)]
        (0.6 * sum(own) / len(own) + 0.4 * sum(anchors) / len(anchors)).backward()
        errors.append(relative_error(spy.gradients[-1], trainer))
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
        seen.clear()

    spy.on_pre_optimizer_step = compare
    trainer.add_callback(spy)
    trainer.train()
    assert len(errors) == 2
    assert max(errors) <= 1e-6  # the similarities and the trainers' own metrics are float32


def gradient_of(method: str, strategy: str, tmp_path: Any, tokenizer: Any) -> Callable[..., dict[str, torch.Tensor]]:
    def one_step(**config: Any) -> dict[str, torch.Tensor]:
        trainer = make_joint(method, tmp_path, tokenizer, strategy=strategy, max_steps=1, max_grad_norm=0.0, **config)
        spy = Spy().watch(trainer)
        trainer.train()
        return spy.gradients[0]

    return one_step


@pytest.mark.parametrize("strategy", ["self_align", "paired_dataset"])
def test_each_losss_gradient_is_clipped_by_itself(strategy, tmp_path, tokenizer):
    gradient = gradient_of("dpo", strategy, tmp_path, tokenizer)
    both, contrastive, own = (gradient(craft_alpha=alpha) for alpha in (0.6, 0.0, 1 - 1e-9))
    for name in both:
        wanted = 0.6 * own.get(name, 0) + 0.4 * contrastive[name]
        assert torch.allclose(both[name], wanted, atol=1e-5, rtol=1e-4)
    clipped = gradient(craft_gradient_clip_per_task=True, craft_gradient_clip_value=0.01)
    norms = [sum(float(g.pow(2).sum()) for g in found.values()) ** 0.5 for found in (own, contrastive)]
    assert min(norms) > 0.01  # or nothing would be clipped
    for name in both:
        wanted = 0.6 * 0.01 / norms[0] * own.get(name, 0) + 0.4 * 0.01 / norms[1] * contrastive[name]
        assert torch.allclose(clipped[name], wanted, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("strategy", ["self_align", "paired_dataset"])
@pytest.mark.parametrize("balancing", ["uncertainty", "gradnorm", "pcgrad"])  # loss_scale begins after 100 steps
def test_each_way_of_balancing_runs_and_differs(balancing, strategy, tmp_path, tokenizer):
    found = []
    for how in ("none", balancing):
        trainer = make_joint("orpo", tmp_path, tokenizer, strategy=strategy, craft_gradient_balancing=how, max_steps=4)
        trainer.train()
        found.append([p.detach() for p in trainer.model.parameters()])
    assert all(torch.isfinite(p).all() for p in found[1])
    assert any(not torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_orpo_may_take_the_likelihood_of_the_answers_alone(tmp_path, tokenizer):
    # Hong et al. 2024, eq. 6; TRL's is of the prompt too
    trainer = make_joint("orpo", tmp_path, tokenizer, craft_alpha=1.0)
    batch = next(iter(trainer.get_train_dataloader()))
    found = []
    for trainer.nll_of_answers in (False, True):
        with torch.no_grad():
            found.append(trainer.concatenated_forward(trainer.model, batch))
    ids, mask = batch["chosen_input_ids"], batch["chosen_attention_mask"]
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits
    for labels, outputs in zip((ids.masked_fill(mask == 0, -100), batch["chosen_labels"]), found, strict=True):
        wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert outputs[4].item() == pytest.approx(wanted.item(), rel=1e-5)
    for one, other in zip(found[0][:4], found[1][:4], strict=True):
        assert torch.equal(one, other)  # answers are scored after their whole prompts either way
