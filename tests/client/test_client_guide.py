"""The blocks of the training client's guide, run as they are written there, in process and over HTTP."""

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from client_services import served

CREATING = """
from tg_tinker import ServiceClient

# Connect to TenSafe service
client = ServiceClient(config)

# Create training client
tc = client.create_training_client({
    "model_ref": "meta-llama/Llama-3-8B",
    "lora_config": {
        "rank": 16,
        "alpha": 32.0,
        "dropout": 0.05,
        "target_modules": ["q_proj", "v_proj", "k_proj", "o_proj"]
    },
    "optimizer": {
        "name": "adamw",
        "learning_rate": 1e-4,
        "weight_decay": 0.01
    },
    "batch_size": 8
})
"""
LOOP = """
for batch in dataloader:
    # Forward-backward pass (async)
    fb_future = tc.forward_backward(batch)

    # Optimizer step (can overlap with next batch prep)
    opt_future = tc.optim_step()

    # Wait for results
    fb_result = fb_future.result()
    opt_result = opt_future.result()

    print(f"Step {opt_result.step}: loss={fb_result.loss:.4f}")
"""
CHECKPOINTING = """
# Save checkpoint
save_result = tc.save_state(metadata={"notes": "epoch 1"})
print(f"Saved: {save_result.artifact_id}")

# Load checkpoint
load_result = tc.load_state(save_result.artifact_id)
print(f"Loaded step: {load_result.step}")
"""
GENERATION = """
result = tc.sample(
    prompts=["Once upon a time"],
    max_tokens=100,
    temperature=0.7
)
print(result.samples[0].completion)
"""
REPRODUCIBLE = """
import torch
import random
import numpy as np

def set_seed(seed: int):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)

# Enable deterministic mode
torch.use_deterministic_algorithms(True)

# Set seeds before training
set_seed(42)
"""
MODELS = {"meta-llama/Llama-3-8B": "embedded/text"}
DATALOADER = [
    {"prompt": ["star, blue, small, top: "], "completion": ["A small blue star at the top."]},
    {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)},
    {"input_ids": np.array([[11, 12]]), "labels": [[-100, 12]]},
]


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """What the guide's last block changes for the whole process, put back."""
    python, numpy, seed = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    torch.use_deterministic_algorithms(False)
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(seed)


@pytest.fixture(params=["in process", "over HTTP"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """The guide's `config`, with its model's name for an embedded one."""
    settings = {"models": MODELS, "state_dir": tmp_path}
    if request.param == "in process":
        yield settings
        return
    with served(models=MODELS, state_dir=str(tmp_path)) as url:
        yield url


def run(blocks: list[str], names: dict[str, Any]) -> dict[str, Any]:
    try:
        for block in blocks:
            exec(compile(block, "<guide>", "exec"), names)
    finally:
        if "client" in names:
            names["client"].close()
    return names


def test_every_block_of_the_guide_runs_as_written(config: Any, capsys: pytest.CaptureFixture[str]):
    names = run([REPRODUCIBLE, CREATING, LOOP, CHECKPOINTING, GENERATION], {"config": config, "dataloader": DATALOADER})

    *training, saved, loaded = capsys.readouterr().out.splitlines()[:5]
    assert [re.fullmatch(r"Step (\d+): loss=\d+\.\d{4}", line)[1] for line in training] == ["1", "2", "3"]
    assert re.fullmatch(r"Saved: art-[0-9a-f]{24}", saved)
    assert loaded == "Loaded step: 3"
    assert names["load_result"].loaded_artifact_id == names["save_result"].artifact_id
    assert names["result"].model_step == 3
    assert 0 < names["result"].samples[0].tokens_generated <= 100


def test_the_guides_fields_are_there(config: Any):
    names = run([CREATING, LOOP, CHECKPOINTING, GENERATION], {"config": config, "dataloader": DATALOADER})

    assert names["fb_result"].grad_norm > 0
    assert names["fb_result"].tokens_processed == 2
    assert names["fb_result"].dp_metrics is None
    assert names["opt_result"].learning_rate == 1e-4
    assert names["save_result"].size_bytes > 0
    assert len(names["save_result"].content_hash) >= 64
    assert names["save_result"].created_at.endswith(("Z", "+00:00"))
    assert names["result"].samples[0].prompt == "Once upon a time"
    assert names["result"].samples[0].finish_reason in ("stop", "length")


def test_the_guides_seed_makes_a_run_repeatable(tmp_path: Path):
    def losses(place: str) -> list[str]:
        config = {"models": MODELS, "state_dir": tmp_path / place}
        loop = LOOP.replace("print(", "lines.append(").replace(":.4f", ".hex()")
        lines: list[str] = []
        found = run(
            [REPRODUCIBLE, CREATING, loop.replace("{fb_result.loss.hex()}", "{fb_result.loss.hex()}"), GENERATION],
            {"config": config, "dataloader": DATALOADER, "lines": lines},
        )
        return [*lines, found["result"].samples[0].completion]

    assert losses("one") == losses("two")


def test_the_models_name_is_the_guides_and_no_other_is_offered_by_accident(tmp_path: Path):
    names: dict[str, Any] = {"config": {"models": MODELS, "state_dir": tmp_path}}
    run([CREATING], names)

    assert names["tc"].config.model_ref == "meta-llama/Llama-3-8B"
    assert names["tc"].config.lora.rank == 16
    assert names["tc"].config.batch_size == 8


def test_the_guides_seed_function_and_ours_seed_alike():
    from tg_tinker import set_seed

    names: dict[str, Any] = {}
    exec(compile(REPRODUCIBLE, "<guide>", "exec"), names)

    def drawn(seed: Callable[[int], None]) -> tuple[float, float, float]:
        seed(7)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert drawn(names["set_seed"]) == drawn(set_seed)
