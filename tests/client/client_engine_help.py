"""What tests of the engine share: a small configuration, batches that differ, and waiting for results."""

from inft.client.engine import Engine
from params.client import EngineParams

TENANT = "local"
SECONDS = 60.0  # far longer than anything here takes
CONFIG = {
    "model_ref": "embedded/text",
    "lora_config": {"rank": 4, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
    "optimizer": {"learning_rate": 1e-2},
    "seed": 7,
}


def open_engine(directory, **params):
    return Engine(EngineParams(state_dir=str(directory), **params))


def batch(number=0):
    """Two rows of eight tokens that depend on the number."""
    return {"input_ids": [[5 + (number * 13 + row * 7 + i * 3) % 900 for i in range(8)] for row in range(2)]}


def forward(number=0, **extra):
    return {"batch": batch(number), **extra}


def run(engine, client_id, kind, payload, *, tenant=TENANT, **options):
    """Submit and return the FutureInfo of the ended operation."""
    future = engine.submit(tenant, client_id, kind, payload, **options)
    ended = engine.wait(tenant, future["id"], SECONDS)
    assert ended["status"] in ("completed", "failed", "cancelled"), ended
    return ended


def result(engine, client_id, kind, payload, **options):
    """Submit and return the result."""
    ended = run(engine, client_id, kind, payload, **options)
    assert ended["status"] == "completed", ended["error"]
    return ended["result"]


def train(engine, client_id, steps, *, first=0, **options):
    """Take steps; return their losses."""
    losses = []
    for number in range(first, first + steps):
        losses.append(result(engine, client_id, "forward_backward", forward(number), **options)["loss"])
        result(engine, client_id, "optim_step", {}, **options)
    return losses
