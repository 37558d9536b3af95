"""Twenty steps of supervised fine-tuning through the training client, sampled from, saved and loaded again.

    python scripts/baseline_sft_smoke.py

Trains the embedded tiny text model in this process on captions of drawn scenes, on one thread of the CPU, in a few
seconds; everything is seeded. Exits with 1 where the loss does not fall or a checkpoint does not bring back what it
was made of. What it measured last is in tests/golden, which tests/test_baseline_sft.py compares;

    python scripts/baseline_sft_smoke.py --update-golden

is the only thing that writes there, and prints what it changes.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from inft.client import SampleResult, ServiceClient, TrainingClient, UserError, deterministic, set_seed
from inft.client.losses.determinism import float_hex, platform_fingerprint
from inft.data.sample import scenes
from inft.data.scene_captions import caption
from inft.training.storage import file_sha256, write_text

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
METRICS, CURVE = "baseline_sft_metrics.json", "baseline_loss_curve.json"
SEED, STEPS, BATCH_SIZE = 42, 20, 8
ROUNDS = 3  # over the scenes that are trained on: enough rows for all steps
PROMPT = "Once upon a time"
CONFIG = {
    "model_ref": "embedded/text",
    "lora_config": {"rank": 16, "alpha": 32.0, "dropout": 0.05},
    "optimizer": {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.01},
    "batch_size": BATCH_SIZE,
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run measured."""

    losses: list[float]
    grad_norms: list[float]
    tokens: list[int]
    completion: str
    adapter_sha256: str
    restored: bool  # a checkpoint brought back what the model said when it was made

    @property
    def passed(self) -> bool:
        return self.losses[-1] < self.losses[0] and self.restored


def batches() -> Iterator[dict[str, list[str]]]:
    """Captions of drawn scenes, all after the same words."""
    captions = [caption(scene.attributes, "en") for scene in scenes("train", rounds=ROUNDS)]
    for start in range(0, len(captions), BATCH_SIZE):
        rows = captions[start : start + BATCH_SIZE]
        yield {"prompt": [PROMPT] * len(rows), "completion": rows}


def run(state_dir: Path, *, say: Callable[[str], None] = print) -> Outcome:
    """Train, sample, save and load; a state directory of its own."""
    set_seed(SEED)
    say("=== TenSafe Baseline SFT Smoke Test ===\n")
    with ServiceClient({"state_dir": state_dir, "device": "cpu"}) as service:
        client = service.create_training_client({**CONFIG, "seed": SEED})
        losses, grad_norms, tokens = train(client, say)
        completion = sample(client).samples[0].completion
        say(f'\nSampling from trained model...\n  Prompt: "{PROMPT}"\n  Completion: {completion}')
        artifact_id, restored = checkpoint(client, say)
        pulled = service.pull_artifact(artifact_id, state_dir / "pulled")
        outcome = Outcome(
            losses=losses,
            grad_norms=grad_norms,
            tokens=tokens,
            completion=completion,
            adapter_sha256=file_sha256(pulled / "adapter_model.safetensors"),
            restored=restored,
        )
    say("\n=== All baseline tests passed! ===" if outcome.passed else "\n=== Baseline tests FAILED ===")
    return outcome


def train(client: TrainingClient, say: Callable[[str], None]) -> tuple[list[float], list[float], list[int]]:
    """Each step's loss, gradient norm and tokens."""
    losses, grad_norms, tokens = [], [], []
    for batch in islice(batches(), STEPS):
        future = client.forward_backward(batch)
        step = client.optim_step().result().step
        found = future.result()
        losses.append(found.loss)
        grad_norms.append(found.grad_norm)
        tokens.append(found.tokens_processed)
        say(f"[Step {step}/{STEPS}] loss={found.loss:.3f}, grad_norm={found.grad_norm:.3f}")
    say(f"\nTraining complete!\n  Initial loss: {losses[0]:.3f}\n  Final loss: {losses[-1]:.3f}")
    say(f"  Loss decreased: {losses[-1] < losses[0]}")
    return losses, grad_norms, tokens


def sample(client: TrainingClient) -> SampleResult:
    return client.sample([PROMPT], max_tokens=32, temperature=0.7, seed=SEED, include_logprobs=True)


def checkpoint(client: TrainingClient, say: Callable[[str], None]) -> tuple[str, bool]:
    """Save, train on, and load: the model says what it said, which it does not in between."""
    before = sample(client)
    say("\nCheckpoint test...")
    saved = client.save_state(metadata={"notes": "baseline smoke test"})
    say(f"  Saved checkpoint: {saved.artifact_id}")
    client.forward_backward(next(batches()))
    client.optim_step()
    between = sample(client)
    loaded = client.load_state(saved.artifact_id)
    restored = sample(client) == before != between and loaded.step == saved.step == client.step == STEPS
    say(
        "  Loaded checkpoint successfully"
        if restored
        else "  The checkpoint did not bring back the state it was made of"
    )
    return saved.artifact_id, restored


def golden_files(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """What belongs into tests/golden, by file name."""
    fingerprint = golden_fingerprint()
    metrics = {
        "schema_version": 1,
        "fingerprint": fingerprint,
        "seed": SEED,
        "config": CONFIG,
        "steps": STEPS,
        "initial_loss": float_hex(outcome.losses[:1])[0],
        "final_loss": float_hex(outcome.losses[-1:])[0],
        "grad_norms": float_hex(outcome.grad_norms),
        "tokens_processed": outcome.tokens,
        "completion": outcome.completion,
        "adapter_sha256": outcome.adapter_sha256,
    }
    curve = {
        "schema_version": 1,
        "fingerprint": fingerprint,
        "seed": SEED,
        "loss_hex": float_hex(outcome.losses),
        "loss": [round(loss, 6) for loss in outcome.losses],  # the same, to read
    }
    return {METRICS: metrics, CURVE: curve}


def golden_fingerprint() -> dict[str, Any]:
    """What decides the last bits of this run, which is on the CPU whatever else the machine has."""
    return {**platform_fingerprint(), "device": "cpu", "peft": metadata.version("peft"), "processor": processor()}


def processor() -> str:
    """Maker, family and model of the CPU: a matrix product is summed in another order on another one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return " ".join(fields.get(name, "?") for name in ("vendor_id", "cpu family", "model"))


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """A line for each value that is not the same."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        return [line for name in names for line in differences(old.get(name), new.get(name), f"{place}.{name}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for index, pair in pairs for line in differences(*pair, f"{place}[{index}]")]
    return [] if old == new else [f"  {place.lstrip('.')}: {old!r} -> {new!r}"]


def update_golden(outcome: Outcome, directory: Path = GOLDEN) -> None:
    """Write the golden files and print what changes in them."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, values in golden_files(outcome).items():
        path = directory / name
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        lines = differences(old, json.loads(json.dumps(values)))
        print("\n".join([f"{name}: {len(lines) or 'no'} values change", *lines]))
        write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update-golden", action="store_true", help="write tests/golden and print what changes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # sums in one order, whatever the machine has
    deterministic()
    with tempfile.TemporaryDirectory(prefix="inft-smoke-") as directory:
        try:
            outcome = run(Path(directory))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if options.update_golden and outcome.passed:
        update_golden(outcome)
    return 0 if outcome.passed else 1


if __name__ == "__main__":
    sys.exit(main())
