"""The baseline of the training client: the smoke test, its golden files, and facts that only real training meets."""

import importlib.util
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM

from inft.client import LossInputs, LossOutput, ServiceClient, TrainingClient, deterministic
from inft.client.losses.supervised import supervised_tokens, token_extra

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "baseline_sft_smoke.py"
EMBEDDED = ROOT / "inft" / "embedded" / "text"
LOSS_TOLERANCE = 0.05  # relative, where the platform is another one: rounding grows over twenty steps
ROWS = {"prompt": ["star, blue: ", "tree: "], "completion": ["A blue star.", "A large red tree at the top."]}
BETA = 0.1


@pytest.fixture(scope="module")
def smoke() -> ModuleType:
    spec = importlib.util.spec_from_file_location("baseline_sft_smoke", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def outcome(smoke: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A run of the smoke test in this process; with what it changes for the process put back."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    deterministic()
    try:
        yield smoke.run(tmp_path_factory.mktemp("smoke"), say=lambda line: None)
    finally:
        deterministic(False)
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceClient]:
    with ServiceClient({"state_dir": tmp_path / "state", "device": "cpu"}) as made:
        yield made


def client_of(service: ServiceClient, **config: Any) -> TrainingClient:
    return service.create_training_client(
        {"model_ref": "embedded/text", "optimizer": {"learning_rate": 1e-2}, "seed": 7, **config}
    )


# The smoke test and its golden files


def test_the_script_prints_what_the_guide_shows():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False, timeout=120)

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    steps = [re.fullmatch(r"\[Step (\d+)/20\] loss=(\d+\.\d{3}), grad_norm=\d+\.\d{3}", line) for line in lines[2:22]]
    assert [int(step[1]) for step in steps] == list(range(1, 21))
    rest = "\n".join([*lines[:2], *lines[22:]])
    expected = (
        r"=== TenSafe Baseline SFT Smoke Test ===\n\n\nTraining complete!\n  Initial loss: (.+)\n  Final loss: (.+)\n"
        r"  Loss decreased: True\n\nSampling from trained model\.\.\.\n  Prompt: \"Once upon a time\"\n"
        r"  Completion: .+\n\nCheckpoint test\.\.\.\n  Saved checkpoint: art-[0-9a-f]{24}\n"
        r"  Loaded checkpoint successfully\n\n=== All baseline tests passed! ==="
    )
    found = re.fullmatch(expected, rest)
    assert found, done.stdout
    assert (found[1], found[2]) == (steps[0][2], steps[-1][2])


def test_the_smoke_test_trains(outcome: Any):
    assert outcome.passed
    assert outcome.losses[-1] < outcome.losses[0] / 2
    # The guide's own project computed its loss from the step alone.
    assert not np.allclose(np.diff(outcome.losses), -0.01)
    assert outcome.completion.startswith("A ")
    assert outcome.completion.endswith(".")


def test_the_run_is_as_in_the_golden_files(smoke: ModuleType, outcome: Any):
    assert mismatches(smoke, outcome, exact=is_exact(smoke)) == []


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"losses": lambda losses: [*losses[:-1], losses[-1] * 1.2]},
        {"losses": lambda losses: losses[:-1]},
        {"tokens": lambda tokens: [*tokens[:-1], tokens[-1] + 1]},
        {"grad_norms": lambda norms: [0.0, *norms[1:]]},
    ],
)
def test_another_run_is_told_from_the_golden_one(smoke: ModuleType, outcome: Any, exact: bool, change: dict[str, Any]):
    other = replace(outcome, **{name: make(getattr(outcome, name)) for name, make in change.items()})
    assert mismatches(smoke, other, exact=exact)


def test_where_the_platform_is_the_same_one_bit_is_a_difference(smoke: ModuleType, outcome: Any):
    golden = golden_outcome(smoke, outcome)
    one_bit = replace(golden, losses=[math.nextafter(golden.losses[0], 9.0), *golden.losses[1:]])
    other_adapter = replace(golden, adapter_sha256="0" * 64)
    assert mismatches(smoke, golden, exact=True) == []
    for other in (one_bit, other_adapter):
        assert mismatches(smoke, other, exact=True)
        assert mismatches(smoke, other, exact=False) == []


def test_the_golden_files_agree_with_each_other(smoke: ModuleType):
    metrics, curve = golden(smoke)
    losses = [float.fromhex(loss) for loss in curve["loss_hex"]]
    assert metrics["fingerprint"] == curve["fingerprint"]
    assert [metrics["initial_loss"], metrics["final_loss"]] == [curve["loss_hex"][0], curve["loss_hex"][-1]]
    assert curve["loss"] == [round(loss, 6) for loss in losses]
    assert len(losses) == len(metrics["grad_norms"]) == metrics["steps"] == smoke.STEPS
    assert (metrics["config"], metrics["seed"]) == (smoke.CONFIG, smoke.SEED)


def test_golden_files_are_rewritten_with_their_difference_told(
    smoke: ModuleType, outcome: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    smoke.update_golden(outcome, tmp_path)
    capsys.readouterr()
    smoke.update_golden(outcome, tmp_path)
    assert capsys.readouterr().out.count("no values change") == 2
    smoke.update_golden(replace(outcome, completion="Another."), tmp_path)
    told = capsys.readouterr().out
    assert f"completion: {outcome.completion!r} -> 'Another.'" in told
    assert json.loads((tmp_path / smoke.METRICS).read_text(encoding="utf-8"))["completion"] == "Another."


def golden(smoke: ModuleType) -> tuple[dict[str, Any], dict[str, Any]]:
    metrics, curve = (
        json.loads((smoke.GOLDEN / name).read_text(encoding="utf-8")) for name in (smoke.METRICS, smoke.CURVE)
    )
    return metrics, curve


def is_exact(smoke: ModuleType) -> bool:
    return bool(golden(smoke)[0]["fingerprint"] == smoke.golden_fingerprint())


def golden_outcome(smoke: ModuleType, outcome: Any) -> Any:
    """An outcome with the golden files' figures."""
    metrics, curve = golden(smoke)
    return replace(
        outcome,
        losses=[float.fromhex(loss) for loss in curve["loss_hex"]],
        grad_norms=[float.fromhex(norm) for norm in metrics["grad_norms"]],
        tokens=metrics["tokens_processed"],
        completion=metrics["completion"],
        adapter_sha256=metrics["adapter_sha256"],
    )


def mismatches(smoke: ModuleType, outcome: Any, *, exact: bool) -> list[str]:
    """What differs from the golden files: everything to the bit, or what rounding cannot explain."""
    wanted = golden_outcome(smoke, outcome)
    if exact:
        names = ("losses", "grad_norms", "tokens", "completion", "adapter_sha256")
        return [name for name in names if getattr(outcome, name) != getattr(wanted, name)]
    found = [] if outcome.tokens == wanted.tokens else ["tokens"]
    if outcome.losses != pytest.approx(wanted.losses, rel=LOSS_TOLERANCE):
        found.append("losses")
    if outcome.grad_norms != pytest.approx(wanted.grad_norms, rel=10 * LOSS_TOLERANCE):
        found.append("grad_norms")
    return found


# Facts that no mock can meet


def test_the_first_loss_of_a_random_model_is_the_logarithm_of_its_vocabulary(service: ServiceClient, tmp_path: Path):
    """Nothing is known, so every token is as likely; the logits' own spread adds half its variance, about 0.03."""
    config = LlamaConfig.from_pretrained(EMBEDDED, initializer_range=0.02)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "random")
        ids = torch.randint(0, config.vocab_size, (8, 32))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED / name, tmp_path / "random" / name)

    client = client_of(service, model_ref=str(tmp_path / "random"))
    loss = client.forward_backward({"input_ids": ids}).result().loss

    assert loss == pytest.approx(math.log(config.vocab_size), abs=0.1)


def dpo(inputs: LossInputs) -> LossOutput:
    """Rafailov et al. 2023, eq. 7, on rows chosen and rejected by turns; `old_logprobs` are the reference model's."""
    tokens = supervised_tokens(inputs)
    ratios_B = tokens.row_sums(tokens.logprobs_N - token_extra(inputs, tokens, "old_logprobs"))
    losses_P = -logsigmoid(BETA * (ratios_B[0::2] - ratios_B[1::2]))
    return LossOutput(loss=losses_P.mean(), denominator=len(losses_P))


def test_the_first_dpo_loss_is_ln_2_and_then_it_falls(service: ServiceClient):
    ids = torch.randint(0, 1000, (4, 9), generator=torch.Generator().manual_seed(0))
    reference: list[torch.Tensor] = []

    def recorded(inputs: LossInputs) -> LossOutput:
        tokens = supervised_tokens(inputs)
        reference.append(tokens.logprobs_N.detach().reshape(4, 8))
        return LossOutput(loss=-tokens.logprobs_N.sum())

    lora = {"dropout": 0.0}
    client_of(service, lora_config=lora).forward_backward({"input_ids": ids}, loss=recorded).result()
    batch = {"input_ids": ids, "old_logprobs": torch.cat([torch.zeros(4, 1), reference[0]], dim=1)}

    policy = client_of(service, lora_config=lora, seed=8)
    losses = []
    for _ in range(3):
        future = policy.forward_backward(batch, loss=dpo)
        policy.optim_step()
        losses.append(future.result().loss)

    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[2] < losses[1] < losses[0] - 0.01


def test_padding_changes_nothing(service: ServiceClient):
    ids, mask, labels = ([[5, 6, 7], [8, 9, 10]], [[1, 1, 1], [1, 1, 0]], [[-100, 6, 7], [-100, 9, -100]])

    def wide(rows: list[list[int]], value: int) -> list[list[int]]:
        return [[*row, *[value] * 5] for row in rows]

    def measured(batch: dict[str, Any]) -> tuple[float, float, int, float]:
        client = client_of(service, lora_config={"dropout": 0.0})
        found = client.forward_backward(batch).result()
        client.optim_step()
        after = client.forward_backward(batch).result().loss
        return found.loss, found.grad_norm, found.tokens_processed, after

    plain = measured({"input_ids": ids, "attention_mask": mask, "labels": labels})
    padded = measured({"input_ids": wide(ids, 3), "attention_mask": wide(mask, 0), "labels": wide(labels, -100)})

    assert plain == pytest.approx(padded, rel=1e-5)
    assert plain[3] < plain[0]


def trained(client: TrainingClient, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        future = client.forward_backward(ROWS)
        client.optim_step().result()
        losses.append(future.result().loss)
    return losses


def adapter(service: ServiceClient, client: TrainingClient, place: Path) -> dict[str, torch.Tensor]:
    saved = client.save_state()
    return load_file(service.pull_artifact(saved.artifact_id, place) / "adapter_model.safetensors")


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(service: ServiceClient, tmp_path: Path):
    whole = client_of(service)
    losses = trained(whole, 3)
    saved = whole.save_state()
    losses += trained(whole, 3)

    resumed = client_of(service)
    trained(resumed, 1)  # whatever it did before is gone
    assert resumed.load_state(saved.artifact_id).step == 3
    assert trained(resumed, 3) == losses[3:]

    one, two = adapter(service, whole, tmp_path), adapter(service, resumed, tmp_path)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_without_its_optimizer_a_checkpoint_goes_on_otherwise(service: ServiceClient):
    """So the test above would see an optimizer that load_state forgets."""
    whole = client_of(service)
    trained(whole, 3)
    saved = whole.save_state(include_optimizer=False)
    losses = trained(whole, 3)

    resumed = client_of(service)
    resumed.load_state(saved.artifact_id)
    again = trained(resumed, 3)
    assert again[0] == losses[0], "the weights are the same"
    assert again[1:] != losses[1:]


def test_a_run_goes_on_in_another_process_as_in_one(tmp_path: Path):
    with ServiceClient({"state_dir": tmp_path / "one", "device": "cpu"}) as service:
        losses = trained(client_of(service), 4)
    with ServiceClient({"state_dir": tmp_path / "two", "device": "cpu"}) as service:
        client = client_of(service)
        halves = trained(client, 2)
    with ServiceClient({"state_dir": tmp_path / "two", "device": "cpu"}) as service:
        halves += trained(service.get_training_client(client.id), 2)
    assert halves == losses
