"""The gradient of an optimizer step is that of the objective, written out plainly."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from craft.spans import self_align_spans
from craft.trainers.window import CONTRASTIVE, SFT


def plain_objective(trainer: Any, batches: list[dict[str, Any]], *, alpha: float) -> torch.Tensor:
    """alpha · Σ l_t / N_S + (1 − alpha) · Σ l_i / N_C over the micro-batches of one step, by loops, in float64."""
    tokens, anchors = [], []
    for batch in batches:
        if batch.get("craft_batch_type", "sft") == "sft":
            tokens.append(token_losses(trainer.model, batch))
        if trainer.craft_bundle.strategy == "self_align":
            spans = self_align_spans(batch, strategy="auto", mask_key=None)
            hidden = last_state(trainer.model, batch["input_ids"], batch["attention_mask"])
            found = [(pooled(hidden, spans.anchor_BT), pooled(hidden, spans.positive_BT))]
        elif batch.get("craft_batch_type") == "craft":
            sides = [
                pooled(last_state(trainer.model, batch["input_ids" + end], mask), mask)
                for end in ("", "_tgt")
                for mask in [batch["attention_mask" + end]]
            ]
            found = [tuple(sides)]
        else:
            found = []
        for anchor, positive in found:
            anchors += pair_losses(trainer, head(trainer, anchor), head(trainer, positive))
    sft = torch.cat(tokens).sum() / sum(map(len, tokens))
    return alpha * sft + (1 - alpha) * sum(anchors) / len(anchors)


def token_losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return F.cross_entropy(logits[labels != -100].double(), labels[labels != -100], reduction="none")


def last_state(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    outputs = model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
    return outputs.hidden_states[-1]


def pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.stack([row[kept.nonzero()[-1, 0]] for row, kept in zip(hidden, mask, strict=True)])


def head(trainer: Any, vectors: torch.Tensor) -> torch.Tensor:
    projected = trainer.craft_loss.projector.net(vectors.to(next(trainer.craft_loss.parameters()).dtype))
    return projected / projected.norm(dim=-1, keepdim=True)


def pair_losses(trainer: Any, anchors: torch.Tensor, positives: torch.Tensor) -> list[torch.Tensor]:
    tau = trainer.craft_loss.temperature
    losses = []
    for i, anchor in enumerate(anchors):
        sims = [(anchor @ positive) / tau for positive in positives]
        forth = torch.logsumexp(torch.stack(sims), 0) - sims[i]
        back = [(other @ positives[i]) / tau for other in anchors]
        symmetric = trainer.craft_args.craft_symmetric
        losses.append((forth + torch.logsumexp(torch.stack(back), 0) - back[i]) / 2 if symmetric else forth)
    return losses


def relative_error(found: dict[str, torch.Tensor], trainer: Any) -> float:
    """Norm of the difference to the parameters' .grad, over the norm of that."""
    named = dict([*trainer.model.named_parameters(), *trainer.craft_loss.named_parameters(prefix="head")])
    wanted = {name: p.grad.double() for name, p in named.items() if p.grad is not None}
    assert found.keys() == wanted.keys()
    difference = math.sqrt(sum(float((found[name].double() - wanted[name]).pow(2).sum()) for name in wanted))
    return difference / math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in wanted.values()))


def check(trainer: Any, spy: Any, *, alpha: float = 0.6) -> None:
    """Every optimizer step's gradient against the plain one at the weights that the step began with."""
    errors = []

    def compare() -> None:
        state = {id(p): p.grad for p in trainer.model.parameters()}
        own = {id(p): p.grad for p in trainer.craft_loss.parameters()}
        for parameter in (*trainer.model.parameters(), *trainer.craft_loss.parameters()):
            parameter.grad = None
        plain_objective(trainer, spy.batches[-1], alpha=alpha).backward()
        errors.append(relative_error(spy.gradients[-1], trainer))
        for parameter in (*trainer.model.parameters(), *trainer.craft_loss.parameters()):
            parameter.grad = {**state, **own}[id(parameter)]

    before = spy.on_pre_optimizer_step

    def noted(*args: Any, **kwargs: Any) -> None:
        before(*args, **kwargs)
        compare()

    spy.on_pre_optimizer_step = noted
    trainer.craft_loss.double()
    trainer.train()
    assert len(errors) == trainer.args.max_steps
    assert max(errors) <= 2e-7, errors


EXACT = {"max_grad_norm": 0.0}


@pytest.mark.parametrize("more", [{}, {"craft_symmetric": True}, {"craft_learnable_temperature": True}], ids=str)
def test_self_align_has_the_gradient_of_the_objective(make_trainer, make_model, rows, spy, more):
    trainer = make_trainer(rows(40), model=make_model(dtype=torch.float64), **EXACT, **more)
    check(trainer, spy.watch(trainer))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"craft_use_gradcache": True, "craft_gradcache_chunk_size": 3},
        {"craft_contrastive_batch_size": 7, "craft_symmetric": True},
        {"craft_use_hidden_state_hook": False},
    ],
    ids=str,
)
def test_pairs_have_the_gradient_of_the_objective(make_trainer, make_model, rows, pairs, spy, more):
    # failures 4 (no gradient through GradCache) and 9 (alpha .6 acted as .115)
    trainer = make_trainer(rows(40), pairs(24), model=make_model(dtype=torch.float64), **EXACT, **more)
    check(trainer, spy.watch(trainer))


def test_the_short_last_step_of_an_epoch_has_it_too(make_trainer, make_model, rows, pairs, spy):
    # 18 rows: 5 batches, so that the second step of each epoch holds 3 SFT micro-batches; the last batch has 2 rows.
    trainer = make_trainer(rows(18), pairs(24), model=make_model(dtype=torch.float64), max_steps=4, **EXACT)
    check(trainer, spy.watch(trainer))
    kinds = [[batch["craft_batch_type"] for batch in step] for step in spy.batches]
    assert kinds[0] == ["sft", "sft", "craft", "craft"]
    assert all("sft" in step and "craft" in step for step in kinds)


@pytest.mark.parametrize("strategy", ["self_align", "paired_dataset"])
def test_combining_the_gradients_of_tasks_that_agree_leaves_the_objective(
    make_trainer, make_model, rows, pairs, spy, strategy
):
    # A task's gradient is kept apart when its norm is asked for; their sum is then the same.
    contrastive = pairs(24) if strategy == "paired_dataset" else None
    trainer = make_trainer(
        rows(40),
        contrastive,
        model=make_model(dtype=torch.float64),
        craft_report_metrics=["contrastive_accuracy", "gradient_norm"],
        **EXACT,
    )
    check(trainer, spy.watch(trainer))
    logged = trainer.craft_metrics
    assert logged["metrics/craft_gradient_norm_sft"] > 0
    assert logged["metrics/craft_gradient_norm_contrast"] > 0


def test_alpha_one_is_plain_trl_to_the_bit(make_trainer, make_model, rows, pairs, tokenizer, tmp_path):
    trainer = make_trainer(rows(40), pairs(24), craft_alpha=1.0, max_steps=5, eval_strategy="no")
    trainer.train()
    config = {
        name: getattr(trainer.args, name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    }
    plain = SFTTrainer(
        model=make_model(),
        args=SFTConfig(
            output_dir=str(tmp_path / "plain"),
            max_steps=5,
            learning_rate=1e-3,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
            activation_checkpointing=False,
            **config,
        ),
        train_dataset=rows(40),
        processing_class=tokenizer,
    )
    plain.train()
    for (name, ours), theirs in zip(trainer.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not [key for entry in trainer.state.log_history for key in entry if "craft" in key]


def test_without_accumulation_both_kinds_train_and_keep_their_ratio(make_trainer, rows, pairs, spy):
    # failure 7: accumulation 1 trained no SFT
    trainer = make_trainer(rows(24), pairs(24), gradient_accumulation_steps=1, max_steps=10, craft_beta=0.6)
    spy.watch(trainer)
    trainer.train()
    kinds = [step[0]["craft_batch_type"] for step in spy.batches]
    assert kinds.count("sft") == 6
    assert kinds.count("craft") == 4
    shares = trainer._craft_loaders.shares
    # Averaged over the steps of an epoch each gradient weighs what alpha says.
    assert trainer._craft_alphas[SFT] * shares[SFT] == pytest.approx(0.6)
    assert trainer._craft_alphas[CONTRASTIVE] * shares[CONTRASTIVE] == pytest.approx(0.4)
    assert shares[SFT] == pytest.approx(0.6)


def test_the_evaluation_loss_is_trls_own_and_enters_no_train_log(
    make_trainer, make_model, rows, pairs, tokenizer, tmp_path
):
    # failure 10: 6.26 was reported as 0.94
    heldout = rows(8, seed=5)
    trainer = make_trainer(rows(40), pairs(24), trainer={"eval_dataset": heldout})
    plain = SFTTrainer(
        model=make_model(),
        args=SFTConfig(output_dir=str(tmp_path / "plain"), report_to="none", use_cpu=True, bf16=False),
        train_dataset=rows(40),
        eval_dataset=heldout,
        processing_class=tokenizer,
    )
    ours, theirs = trainer.evaluate(), plain.evaluate()
    assert ours["eval_loss"] == theirs["eval_loss"]
    assert not [key for key in ours if "craft" in key]
    trainer.train()
    evaluated = trainer.evaluate()
    assert not [key for key in evaluated if "craft" in key]


def test_a_plain_trainer_takes_the_mixin(make_model, rows, pairs, tmp_path, spy):
    from dataclasses import dataclass

    from transformers import TrainingArguments

    from craft import CRAFTCollator, CRAFTConfigMixin, CRAFTTrainerMixin

    @dataclass
    class Args(CRAFTConfigMixin, TrainingArguments):
        pass

    class ContrastiveTrainer(CRAFTTrainerMixin, Trainer):
        pass

    for contrastive in (None, pairs(24)):
        trainer = ContrastiveTrainer(
            model=make_model(dtype=torch.float64),
            args=Args(
                output_dir=str(tmp_path / "plain"),
                per_device_train_batch_size=4,
                gradient_accumulation_steps=4,
                max_steps=2,
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                save_strategy="no",
                max_grad_norm=0.0,
            ),
            train_dataset=rows(40),
            data_collator=CRAFTCollator(pad_token_id=3),
            contrastive_dataset=contrastive,
        )
        check(trainer, type(spy)().watch(trainer))


def test_the_logged_losses_are_means_over_tokens_and_anchors(make_trainer, rows, pairs):
    trainer = make_trainer(rows(40), pairs(24), max_steps=4, logging_steps=2, craft_learnable_temperature=True)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert entry["loss/craft_total"] == pytest.approx(
            0.6 * entry["loss/craft_sft"] + 0.4 * entry["loss/craft_contrast"]
        )
        # Two steps of equal weight: the log of the objective and the mean over tokens differ by the steps' sizes only.
        assert entry["loss"] == pytest.approx(entry["loss/craft_total"], rel=0.02)
        assert 0 <= entry["metrics/craft_contrastive_accuracy"] <= 1
        assert entry["metrics/craft_temperature"] == pytest.approx(0.05, rel=0.1)
        assert -1 <= entry["metrics/craft_representation_consistency"] <= 1  # failure 21: the first was NaN
        assert all(math.isfinite(value) for value in entry.values())
    assert trainer.craft_metrics == {key: value for key, value in logs[-1].items() if "craft" in key}


def test_the_head_and_the_temperature_are_trained(make_trainer, rows):
    # failure 1: they were not in the optimizer; failure 19: a clamp killed the temperature's gradient
    trainer = make_trainer(rows(40), max_steps=3, craft_learnable_temperature=True, learning_rate=1e-2)
    before = {name: value.clone() for name, value in trainer.craft_loss.state_dict().items()}
    trainer.train()
    after = trainer.craft_loss.state_dict()
    assert {name for name in before if torch.equal(before[name], after[name])} == set()


def test_a_learnable_temperature_stays_in_its_range(make_trainer, rows):
    trainer = make_trainer(
        rows(40), max_steps=3, craft_learnable_temperature=True, craft_temperature=0.0101, learning_rate=0.5
    )
    trainer.train()
    assert 0.01 * (1 - 1e-6) <= trainer.craft_loss.temperature.item() <= 1 + 1e-6
