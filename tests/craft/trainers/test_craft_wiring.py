"""How the parts of a CRAFT trainer are wired: queue, optimizer, balancing, experts, checkpoints, loaders."""

import json
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.data_loader import DataLoaderShard
from datasets import Dataset
from safetensors import safe_open
from test_craft_bad_input import plain
from test_craft_objective import head, last_state, pair_losses, pooled, token_losses
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, TrainerCallback
from trl import SFTTrainer

from craft import CRAFTCollator
from craft.negatives import hash_tokens
from craft.spans import self_align_spans
from craft.trainers.state import STATE_FILE
from craft.trainers.tasks import TaskGradients

Gradients = dict[str, Tensor]
STRATEGIES = ["self_align", "paired_dataset"]
STILL = {"learning_rate": 0.0, "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}


@pytest.fixture
def make(make_trainer, make_model, rows, pairs) -> Callable[..., Any]:
    """A trainer in float64, head included: make(strategy, rows=…, pairs=…, **config)."""

    def made(strategy: str, *, sft: Dataset | None = None, contrastive: Dataset | None = None, **config: Any) -> Any:
        if strategy == "paired_dataset" and contrastive is None:
            contrastive = pairs(16, seed=100)
        settings = {"model": make_model(dtype=torch.float64), "max_steps": 1, **STILL, **config}
        trainer = make_trainer(rows(16) if sft is None else sft, contrastive, **settings)
        trainer.craft_loss.double()
        return trainer

    return made


def named(trainer: Any) -> dict[str, nn.Parameter]:
    return dict([*trainer.model.named_parameters(), *trainer.craft_loss.named_parameters(prefix="head")])


def gradient_of(trainer: Any, loss: Tensor) -> Gradients:
    parameters = named(trainer)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {name: value for name, value in zip(parameters, found, strict=True) if value is not None}


def norm(gradients: Gradients) -> float:
    return math.sqrt(sum(float(value.double().pow(2).sum()) for value in gradients.values()))


def of_model(gradients: Gradients) -> Gradients:
    return {name: value for name, value in gradients.items() if not name.startswith("head.")}


def weighed(*parts: tuple[float, Gradients]) -> Gradients:
    found: Gradients = {}
    for factor, gradients in parts:
        for name, value in gradients.items():
            found[name] = found.get(name, 0) + factor * value
    return found


def assert_close(found: Gradients, wanted: Gradients, *, limit: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    assert norm({name: found[name] - wanted[name] for name in wanted}) <= limit * norm(wanted)


def sides(trainer: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of a batch's anchors and positives, and the ids [B, 3] of its rows."""
    states = {}
    if trainer.craft_bundle.strategy == "self_align":
        spans = self_align_spans(batch, strategy="auto", mask_key=None)
        hidden = last_state(trainer.model, batch["input_ids"], batch["attention_mask"])
        states = {"": (hidden, spans.anchor_BT), "_tgt": (hidden, spans.positive_BT)}
        texts = {"": batch["input_ids"], "_tgt": batch["input_ids"]}
    else:
        texts = {end: batch["input_ids" + end] for end in ("", "_tgt")}
        masks = {end: batch["attention_mask" + end] for end in ("", "_tgt")}
        states = {end: (last_state(trainer.model, texts[end], masks[end]), masks[end]) for end in texts}
    anchors, positives = (head(trainer, pooled(*states[end])) for end in ("", "_tgt"))
    texts_ids = [hash_tokens(texts[end], states[end][1]) for end in ("", "_tgt")]
    samples = batch.get("craft_sample_ids", torch.zeros_like(texts_ids[0]))
    return anchors, positives, torch.stack([samples, *texts_ids], dim=1)


def kind(batch: dict[str, Any]) -> str:
    return batch.get("craft_batch_type", "sft")


def contrasted(trainer: Any, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    own = "sft" if trainer.craft_bundle.strategy == "self_align" else "craft"
    return [batch for batch in batches if kind(batch) == own]


def plain_losses(trainer: Any, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The two losses of a step without any weight."""
    tokens = torch.cat([token_losses(trainer.model, batch) for batch in batches if kind(batch) == "sft"])
    anchors = [
        loss for batch in contrasted(trainer, batches) for loss in pair_losses(trainer, *sides(trainer, batch)[:2])
    ]
    return {"sft": tokens.mean(), "contrastive": torch.stack(anchors).mean()}


def before_each_step(trainer: Any, function: Callable[[], Any]) -> list[Any]:
    """What a function finds when the gradients are ready, at each optimizer step."""
    found: list[Any] = []

    class Before(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            found.append(function())

    trainer.add_callback(Before())
    return found


def craft_logs(trainer: Any) -> list[dict[str, float]]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{key: value for key, value in entry.items() if "craft" in key} for entry in logs]


# The queue


def same(first: list[int], second: list[int]) -> bool:
    """Whether two rows' ids tell that neither is a negative of the other."""
    texts = {first[1], first[2]} & {second[1], second[2]}
    return first[0] == second[0] != 0 or bool(texts - {0})


@pytest.mark.parametrize("samples", [None, [1, 1, 2, 3, 4, 5, 6, 7]], ids=["texts", "samples"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_queue_holds_the_last_positives_and_no_row_meets_its_own_copy(make, rows, pairs, spy, strategy, samples):
    sft, contrastive = rows(8), pairs(8) if strategy == "paired_dataset" else None
    if samples is not None and contrastive is not None:
        contrastive = contrastive.add_column("sample_id", samples)
    elif samples is not None:
        sft = sft.add_column("sample_id", samples)
    trainer = make(
        strategy,
        sft=sft,
        contrastive=contrastive,
        max_steps=2,
        gradient_accumulation_steps=4 if strategy == "paired_dataset" else 2,  # each step sees every row once
        craft_negative_strategy="queue",
        craft_negative_queue_size=8,
    )
    spy.watch(trainer)
    trainer.train()
    queue: deque[tuple[Tensor, list[int]]] = deque(maxlen=8)
    met = 0
    for number, step in enumerate(spy.batches):
        losses = []
        for batch in contrasted(trainer, step):
            anchors, positives, ids = sides(trainer, batch)
            columns = [*zip(positives, ids.tolist(), strict=True), *queue]
            met += sum(same(own, other) for own in ids.tolist() for _, other in queue)
            for i, (anchor, own) in enumerate(zip(anchors, ids.tolist(), strict=True)):
                kept = [vector for j, (vector, other) in enumerate(columns) if j == i or not same(own, other)]
                sims = torch.stack([anchor @ vector for vector in kept]) / 0.05
                losses.append(torch.logsumexp(sims, 0) - anchor @ positives[i] / 0.05)
            queue.extend(zip(positives.detach(), ids.tolist(), strict=True))
        contrast = torch.stack(losses).mean()
        # The queue is float32.
        assert craft_logs(trainer)[number]["loss/craft_contrast"] == pytest.approx(contrast.item(), rel=1e-6)
        tokens = torch.cat([token_losses(trainer.model, batch) for batch in step if kind(batch) == "sft"])
        assert_close(spy.gradients[number], gradient_of(trainer, 0.6 * tokens.mean() + 0.4 * contrast))
    assert met >= 4  # stale copies there were
    held = trainer._craft_objective.queue
    order = [[tuple(own) for own in held.get_ids().tolist()].index(tuple(own)) for _, own in queue]
    assert sorted(order) == list(range(8))
    vectors = torch.stack([vector for vector, _ in queue])
    assert torch.allclose(held.get_negatives()[order].double(), vectors, atol=1e-6)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(8, dtype=torch.float64))


# The optimizer


def test_every_parameter_of_craft_is_in_one_group_with_its_own_decay_and_rate(make):
    trainer = make(
        "self_align",
        craft_learnable_temperature=True,
        craft_gradient_balancing="uncertainty",
        weight_decay=0.3,
        learning_rate=2e-3,
    )
    groups = trainer.create_optimizer().param_groups
    found = {
        id(parameter): [group for group in groups if any(parameter is member for member in group["params"])]
        for parameter in (*trainer.model.parameters(), *trainer.craft_parameters())
    }
    assert {len(held) for held in found.values()} == {1}
    for name, parameter in trainer.craft_loss.named_parameters():
        (group,) = found[id(parameter)]
        assert group["weight_decay"] == (0.3 if name.endswith(".weight") else 0.0), name
        assert group["lr"] == 2e-3
    assert len(trainer._craft_balance.parameters()) == 2
    for parameter in trainer._craft_balance.parameters():
        (group,) = found[id(parameter)]
        assert (group["lr"], group["weight_decay"]) == (0.025, 0.0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_head_is_clipped_on_its_own(make, spy, strategy):
    trainer = make(strategy, max_grad_norm=1e-3)
    spy.watch(trainer)
    trainer.train()
    losses = plain_losses(trainer, spy.batches[0])
    whole = gradient_of(trainer, 0.6 * losses["sft"] + 0.4 * losses["contrastive"])
    model = of_model(whole)
    own = {name: value for name, value in whole.items() if name not in model}
    assert min(norm(model), norm(own)) > 1e-2
    wanted = [
        {name: value * (1e-3 / (norm(part) + 1e-6)) for name, value in part.items()}  # as torch clips
        for part in (model, own)
    ]
    assert_close(spy.gradients[0], wanted[0] | wanted[1])
    assert norm({name: spy.gradients[0][name] for name in own}) <= 1e-3 * (1 + 1e-6)


@pytest.mark.parametrize(("push", "edge"), [(1.0, 0.01), (-1.0, 1.0)])
def test_a_temperature_that_is_driven_out_of_its_range_ends_on_the_edge(make, push, edge):
    trainer = make("self_align", craft_learnable_temperature=True, learning_rate=10.0)
    with torch.no_grad():
        trainer.craft_loss.log_temperature.fill_(math.log(edge) + 1e-3 * push)  # just inside
    before_each_step(trainer, lambda: trainer.craft_loss.log_temperature.grad.fill_(push))
    trainer.train()
    assert trainer.craft_loss.temperature.item() == pytest.approx(edge, rel=1e-6)


# Balancing


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_uncertainty_penalty_counts_once_a_step(make, spy, strategy):
    trainer = make(strategy, craft_gradient_balancing="uncertainty")
    log_vars = trainer._craft_balance.balancer.log_vars
    starts = {"sft": 0.3, "contrastive": -0.2}
    with torch.no_grad():
        for task, start in starts.items():
            log_vars[task].fill_(start)
    found = before_each_step(trainer, lambda: {task: s.grad.item() for task, s in log_vars.items()})
    spy.watch(trainer)
    trainer.train()
    losses = plain_losses(trainer, spy.batches[0])
    # d/ds (½ e^{-s} L + s/2), times alpha (Kendall 2018, eq. 7)
    for task, alpha in (("sft", 0.6), ("contrastive", 0.4)):
        wanted = alpha * (0.5 - 0.5 * math.exp(-starts[task]) * losses[task].item())
        assert found[0][task] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("balancing", ["loss_scale", "gradnorm"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_task_gets_its_own_weight_and_gradnorm_sees_norms_without_weights(make, spy, strategy, balancing):
    trainer = make(strategy, craft_gradient_balancing=balancing)
    trainer._craft_balance.weights = {"sft": 1.5, "contrastive": 0.25}
    fed = []
    if balancing == "gradnorm":
        balancer = trainer._craft_balance.balancer
        update = balancer.update
        balancer.update = lambda norms, losses: fed.append((norms, losses)) or update(norms, losses)
    spy.watch(trainer)
    trainer.train()
    losses = plain_losses(trainer, spy.batches[0])
    parts = {task: gradient_of(trainer, loss) for task, loss in losses.items()}
    assert_close(spy.gradients[0], weighed((0.6 * 1.5, parts["sft"]), (0.4 * 0.25, parts["contrastive"])))
    for norms, seen in fed:
        for task in losses:
            assert norms[task] == pytest.approx(norm(of_model(parts[task])), rel=1e-5)
            assert seen[task] == pytest.approx(losses[task].item(), rel=1e-5)
    assert len(fed) == (balancing == "gradnorm")


def test_a_faint_gradient_against_a_large_one_is_projected_and_stays_finite():
    generator = torch.Generator().manual_seed(0)
    shared = [nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(3))]
    large = [1e-2 * torch.randn(len(p), generator=generator) for p in shared]
    faint = [1e-24 * (torch.randn(len(p), generator=generator) - 50 * g) for p, g in zip(shared, large, strict=True)]
    tasks = TaskGradients(("sft", "contrastive"), shared=shared, own=[])
    for task, gradients in (("sft", large), ("contrastive", faint)):
        with tasks.running(task):
            for parameter, gradient in zip(shared, gradients, strict=True):
                parameter.grad = gradient.clone()
    tasks.combine(project=True)
    s, c = torch.cat(large).double(), torch.cat(faint).double()
    assert s @ c < 0
    wanted = s - (s @ c) / (c @ c) * c + c - (c @ s) / (s @ s) * s
    found = torch.cat([p.grad for p in shared])
    assert found.isfinite().all()
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-8)


# What the trainer's own loss averages


def tiny_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=3,
    )
    return MixtralForCausalLM(config)


def test_the_loss_of_experts_is_averaged_over_the_sft_part_alone(make, spy):
    trainer = make("paired_dataset", model=tiny_mixtral())
    spy.watch(trainer)
    trainer.train()
    batches = [batch for batch in spy.batches[0] if kind(batch) == "sft"]
    assert len(batches) == 2
    outputs = [
        trainer.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True
        ).aux_loss
        for batch in batches
    ]
    losses = plain_losses(trainer, spy.batches[0])
    aux = 0.5 * torch.stack(outputs).mean()
    assert norm(gradient_of(trainer, 0.6 * aux)) > 1e-3
    wanted = gradient_of(trainer, 0.6 * (losses["sft"] + aux) + 0.4 * losses["contrastive"])
    assert_close(spy.gradients[0], wanted, limit=1e-5)  # float32


class TakesNoLossKeywords(LlamaForCausalLM):
    """A model whose loss is the mean over its micro-batch, whatever else the step holds."""

    accepts_loss_kwargs = False


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_that_is_a_mean_over_the_micro_batch_is_averaged_over_micro_batches(
    make_model, rows, pairs, spy, tmp_path, strategy
):
    made = make_model(dtype=torch.float64)
    model = TakesNoLossKeywords(made.config).double()
    model.load_state_dict(made.state_dict())
    trainer = plain(
        model,
        rows(16),
        tmp_path,
        trainer={"contrastive_dataset": pairs(16)} if strategy == "paired_dataset" else None,
        gradient_accumulation_steps=4,
        **{**STILL, "max_steps": 1},
    )
    trainer.craft_loss.double()
    spy.watch(trainer)
    trainer.train()
    losses = plain_losses(trainer, spy.batches[0])
    means = [token_losses(model, batch).mean() for batch in spy.batches[0] if kind(batch) == "sft"]
    assert abs(torch.stack(means).mean() - losses["sft"]) > 1e-3
    wanted = 0.6 * torch.stack(means).mean() + 0.4 * losses["contrastive"]
    assert_close(spy.gradients[0], gradient_of(trainer, wanted))


# Checkpoints


def test_gradnorm_between_the_kinds_goes_on_to_the_bit(make_trainer, make_model, rows, pairs, tmp_path):
    def trainer(directory: str) -> Any:
        return make_trainer(
            rows(22),
            pairs(15),
            model=make_model(),
            output_dir=str(tmp_path / directory),
            gradient_accumulation_steps=1,
            craft_gradient_balancing="gradnorm",
            craft_balancing_max_ratio=100,  # every update shows
            max_steps=8,
            save_strategy="steps",
            save_steps=1,
            data_seed=3,
        )

    whole = trainer("whole")
    whole.train()
    seen = {step: saved(tmp_path / "whole" / f"checkpoint-{step}")["balance"]["seen"] for step in range(3, 8)}
    # One kind has run, and the other comes next: what the first left is part of that update.
    between = next(step for step, tasks in seen.items() if len(tasks) == 1 and not seen[step + 1])
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{between}"))
    for (name, ours), theirs in zip(named(resumed).items(), named(whole).values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert resumed._craft_balance.state() == whole._craft_balance.state()
    assert craft_logs(resumed) == craft_logs(whole)


def saved(checkpoint: Any) -> dict[str, Any]:
    with safe_open(checkpoint / STATE_FILE, framework="pt") as file:
        return json.loads(file.metadata()["craft"])


def test_what_is_saved_for_the_hub_holds_no_craft_file(make_trainer, rows, tmp_path):
    trainer = make_trainer(rows(16), max_steps=1)
    trainer.train()
    trainer.save_model(_internal_call=True)  # as push_to_hub saves it
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert not [path for path in tmp_path.rglob("*") if "craft" in path.name.removeprefix(tmp_path.name)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"craft_gradient_balancing": "pcgrad"}, r"craft_gradient_balancing='none', and this run has 'pcgrad'"),
        ({"craft_learnable_temperature": True}, r"craft_learnable_temperature=False, and this run has True"),
        ({"strategy": "self_align"}, r"craft_strategy='paired_dataset', and this run has 'self_align'"),
    ],
    ids=str,
)
def test_a_checkpoint_of_other_settings_is_refused_by_name(make_trainer, rows, pairs, tmp_path, changes, words):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(rows(24), pairs(24), **settings).train()
    changes = dict(changes)
    contrastive = None if changes.pop("strategy", None) else pairs(24)
    with pytest.raises(ValueError, match=words):
        make_trainer(rows(24), contrastive, **settings, **changes).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1")
        )


@pytest.mark.parametrize("balancing", ["none", "gradnorm", "uncertainty", "loss_scale"])
@pytest.mark.parametrize("spoiled", ["sft", "contrastive", "gradient"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_that_is_not_finite_spoils_neither_log_nor_checkpoint(
    make, tmp_path, monkeypatch, strategy, spoiled, balancing
):
    trainer = make(
        strategy,
        max_steps=3,
        logging_steps=2,
        save_strategy="steps",
        save_steps=1,
        craft_gradient_balancing=balancing,
        craft_report_metrics=["contrastive_accuracy", "gradient_norm", "representation_consistency"],
    )
    overflow = {"times": 1}

    def once(value: Tensor) -> Tensor:
        overflow["times"] -= 1
        return value * (torch.inf if overflow["times"] == 0 else 1.0)

    if spoiled == "contrastive":
        own = trainer._compute_craft_contrastive_loss
        trainer._compute_craft_contrastive_loss = lambda *args, **kwargs: once(own(*args, **kwargs).losses_B)
    elif spoiled == "sft":
        loss = SFTTrainer.compute_loss
        monkeypatch.setattr(SFTTrainer, "compute_loss", lambda *args, **kwargs: once(loss(*args, **kwargs)))
    else:
        trainer.model.lm_head.weight.register_hook(once)

    def skip() -> None:  # what a GradScaler does
        for parameter in (*trainer.model.parameters(), *trainer.craft_parameters()):
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                parameter.grad = None

    before_each_step(trainer, skip)
    trainer.train()
    assert overflow["times"] <= 0
    logs = craft_logs(trainer)
    assert logs
    assert all(math.isfinite(value) for entry in logs for value in entry.values())
    assert {"loss/craft_sft", "loss/craft_contrast", "metrics/craft_gradient_norm_sft"} <= logs[0].keys()
    for step in (1, 2, 3):
        assert "NaN" not in json.dumps(saved(tmp_path / "run" / f"checkpoint-{step}"))
    assert all(math.isfinite(weight) for weight in trainer._craft_balance.weights.values())


def test_an_overflow_between_the_kinds_leaves_gradnorm_what_it_had(make, tmp_path, monkeypatch):
    settings = {"gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trainer = make("paired_dataset", craft_gradient_balancing="gradnorm", **settings)
    loss = SFTTrainer.compute_loss
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda *args, **kwargs: loss(*args, **kwargs) * torch.inf)

    def skip() -> None:  # what a GradScaler does
        for parameter in trainer.model.parameters():
            parameter.grad = None

    before_each_step(trainer, skip)
    trainer.train()
    for step in (1, 2, 3):
        state = saved(tmp_path / "run" / f"checkpoint-{step}")["balance"]
        assert "sft" not in state["seen"]
        assert state["weights"] == {"sft": 1.0, "contrastive": 1.0}


@pytest.mark.parametrize("calls", [1, 2], ids=["in the first micro-batch", "in the second"])
@pytest.mark.parametrize("balancing", ["none", "pcgrad"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interrupted_step_leaves_nothing_behind(make, spy, strategy, balancing, calls):
    fresh = make(strategy, craft_gradient_balancing=balancing)
    expected = spy.watch(fresh)
    fresh.train()
    trainer = make(strategy, craft_gradient_balancing=balancing)
    own, left = trainer.compute_loss, [calls]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return found

    trainer.compute_loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again = type(spy)().watch(trainer)
    trainer.train()
    assert_close(again.gradients[0], expected.gradients[0], limit=1e-7)


# Loaders and figures


class OwnLoader(DataLoader):
    """A user's own kind of DataLoader."""


def test_a_subclass_of_dataloader_is_divided_and_another_iterable_is_refused(make_trainer, rows, pairs, monkeypatch):
    trainer = make_trainer(rows(16), pairs(16))
    loader = OwnLoader(pairs(16), batch_size=4, collate_fn=CRAFTCollator())
    batches = list(loader)
    assert isinstance(trainer._craft_loaders._placed(loader), DataLoaderShard)
    assert trainer._craft_loaders._placed(batches) is batches
    monkeypatch.setattr("craft.trainers.placing.world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"type list cannot be divided among the 2 processes.*Pass a torch DataLoader"):
        trainer._craft_loaders._placed(batches)


def test_a_contrastive_loader_beside_self_align_is_refused(make_trainer, rows, pairs):
    loader = DataLoader(pairs(8), batch_size=4, collate_fn=CRAFTCollator())
    with pytest.raises(ValueError, match=r"self_align.*would not read craft_contrastive_loader\. Leave it out"):
        make_trainer(rows(8), trainer={"craft_contrastive_loader": loader})
    factory = {"craft_loader_factory": lambda trainer: (DataLoader(rows(8), batch_size=4), loader)}
    with pytest.raises(ValueError, match=r"would not read the second loader of craft_loader_factory"):
        make_trainer(rows(8), trainer=factory).train()


@pytest.mark.parametrize("copies", [1, 12])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_copies_of_one_pair_in_full_batches_are_said_to_be_nothing_to_contrast(make, rows, pairs, strategy, copies):
    contrastive = Dataset.from_list([pairs(1)[0]] * copies) if strategy == "paired_dataset" else None
    sft = rows(16) if strategy == "paired_dataset" else Dataset.from_list([rows(1)[0]] * copies)
    with pytest.warns(UserWarning, match="nothing to contrast"):
        make(strategy, sft=sft, contrastive=contrastive).train()


def test_the_plan_counts_the_rows_that_there_are_and_hard_negatives(make, rows, pairs):
    def negatives(strategy: str, **given: Any) -> int:
        return make(strategy, **given).craft_plan.negatives_per_anchor

    hard = pairs(16).add_column("input_ids_neg", [[200 + i] for i in range(16)])
    assert negatives("self_align") == 3
    assert negatives("self_align", sft=rows(2)) == 1
    assert negatives("paired_dataset") == 3
    assert negatives("paired_dataset", contrastive=pairs(3)) == 2
    assert negatives("paired_dataset", contrastive=pairs(1)) == 0
    assert negatives("paired_dataset", contrastive=hard) == 3 + 4
    assert negatives("paired_dataset", craft_contrastive_batch_size=6, contrastive=hard) == 5 + 6
