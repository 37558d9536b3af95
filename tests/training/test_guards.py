import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from trl.trainer.utils import add_fused_lm_head

from inft.models import load_spec
from inft.models.loading import load_model, load_processor
from inft.sample import Sample
from inft.training import run
from inft.training.guards import GuardResult, run_guards
from inft.training.runlog import read_events
from params import BasicParams, TrainParams, UserError

Make = Callable[..., TrainParams]
QUIET = Console(quiet=True)
ALL = [
    "trainable parameters",
    "supervised tokens",
    "labels in the vocabulary",
    "image tokens match features",
    "the image changes the logits",
    "every adapter gets a gradient",
]


class Subject:
    """An embedded model with adapters, a batch for it, and what the guards say."""

    def __init__(self, family: str, samples: list[Sample], targets: str = r".*language_model.*(q|up)_proj") -> None:
        self.spec = load_spec(family)
        self.processor = load_processor(self.spec, "")
        base = load_model(self.spec, "", basic=BasicParams(dtype="float32"))
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        torch.manual_seed(0)
        self.model: PeftModel = get_peft_model(base, LoraConfig(r=2, target_modules=targets))
        self.samples = samples
        self.batch: dict[str, torch.Tensor] = self.spec.collator(self.processor)(samples)

    def check(self) -> dict[str, GuardResult]:
        found: dict[str, GuardResult] = {}
        run_guards(
            self.model,
            self.spec,
            self.processor,
            [(self.samples, self.batch)],
            forward=lambda batch: self.model(**batch, fused_lm_head=True, use_cache=False),
            report=lambda result: found.update({result.name: result}),
        )
        return found


@pytest.fixture(params=["llama32", "aya"])
def subject(request: pytest.FixtureRequest, make_sample: Callable[..., Sample]) -> Subject:
    return Subject(request.param, [make_sample(), make_sample("A blue disc.", colour="blue", where="line 18")])


def test_a_sound_run_passes_every_guard(subject: Subject) -> None:
    found = subject.check()
    assert list(found) == ALL
    assert all(result.ok for result in found.values())


def test_nothing_trainable_is_refused(subject: Subject) -> None:
    subject.model.requires_grad_(False)
    with pytest.raises(UserError, match="no parameter is trained"):
        subject.check()


def test_a_row_whose_answer_was_lost_is_named(subject: Subject) -> None:
    subject.batch["labels"][1] = -100
    with pytest.raises(UserError, match=r"supervised tokens: .* none in line 18"):
        subject.check()


def test_a_label_outside_the_vocabulary_is_refused(subject: Subject) -> None:
    subject.batch["labels"][0, -1] = 10**6
    with pytest.raises(UserError, match=r"labels reach 1,000,000 of .* does not belong to this model"):
        subject.check()


def test_a_lost_image_token_is_refused(subject: Subject) -> None:
    image = subject.processor.image_token_id
    row, place = (subject.batch["input_ids"] == image).nonzero()[0].tolist()
    subject.batch["input_ids"][row, place] = 5
    with pytest.raises(UserError, match="image tokens match features"):
        subject.check()


def test_a_model_that_does_not_look_at_its_image_is_refused(make_sample: Callable[..., Sample]) -> None:
    subject = Subject("llama32", [make_sample()])
    for name, parameter in subject.model.named_parameters():
        if "cross_attn_attn_gate" in name or "cross_attn_mlp_gate" in name:
            parameter.data.zero_()
    with pytest.raises(UserError, match="does not look at its image"):
        subject.check()


def test_an_adapter_without_a_gradient_is_named(make_sample: Callable[..., Sample]) -> None:
    subject = Subject("llama32", [make_sample(image=False)], targets=r".*language_model.*(q|up)_proj")
    with pytest.raises(UserError, match=r"none reaches .*cross_attn.*lora\.target_modules"):
        subject.check()


def test_an_infinite_gradient_is_refused(subject: Subject) -> None:
    weights = [p for name, p in subject.model.named_parameters() if "lora_A" in name]
    weights[0].data[0, 0] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        subject.check()


def test_guards_leave_random_states_modes_and_gradients_as_they_were(subject: Subject) -> None:
    subject.model.eval()
    subject.model.get_base_model().lm_head.train()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    modes = [module.training for module in subject.model.modules()]
    subject.check()
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert [module.training for module in subject.model.modules()] == modes
    assert all(parameter.grad is None for parameter in subject.model.parameters())


def test_losses_are_the_same_with_and_without_guards(
    make_params: Make, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(params: TrainParams) -> list[float]:
        result = run.fit(params, console=QUIET)
        return [event["loss"] for event in read_events(result.log_file) if event["event"] in ("log", "eval")]

    guarded = losses(make_params(tmp_path / "guarded"))
    monkeypatch.setattr(run, "run_guards", lambda *args, **options: None)
    assert losses(make_params(tmp_path / "bare")) == guarded
