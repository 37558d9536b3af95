"""The training client: fine-tuning driven step by step from Python, in process or over HTTP.

    from inft.client import ServiceClient

    with ServiceClient() as service:
        client = service.create_training_client({"model_ref": "embedded/text"})
        result = client.forward_backward({"prompt": ["a red"], "completion": [" circle"]}).result()
        client.optim_step().result()

`sdk` is what a program calls, `engine` what does it, `api` the service in between; `losses` and `privacy` are its
mathematics. Importing this loads no torch.
"""

import importlib
from collections.abc import Mapping
from typing import Any

# Public name -> module; nothing is imported before it is asked for.
_MODULES: Mapping[str, str] = {
    "ServiceClient": "inft.client.sdk.service",
    "TrainingClient": "inft.client.sdk.training",
    "Future": "inft.client.sdk.futures",
    "ForwardBackwardResult": "inft.client.sdk.results",
    "OptimStepResult": "inft.client.sdk.results",
    "SampleResult": "inft.client.sdk.results",
    "Completion": "inft.client.sdk.results",
    "SaveStateResult": "inft.client.sdk.results",
    "LoadStateResult": "inft.client.sdk.results",
    "TrainingConfig": "params.client",
    "LoRAConfig": "params.client",
    "OptimizerConfig": "params.client",
    "DPConfig": "params.client",
    "EngineParams": "params.client",
    "Engine": "inft.client.engine",
    "register_loss": "inft.client.losses.registry",
    "resolve_loss": "inft.client.losses.registry",
    "loss_names": "inft.client.losses.registry",
    "LossInputs": "inft.client.losses.inputs",
    "LossOutput": "inft.client.losses.inputs",
    "train_round": "inft.client.rollouts",
    "advantages_of": "inft.client.losses.advantages",
    "set_seed": "inft.client.losses.determinism",
    "deterministic": "inft.client.losses.determinism",
    "NoiseSource": "inft.client.privacy.noise",
    "poisson_batches": "inft.client.privacy.noise",
    "calibrate_noise": "inft.client.privacy.calibrate",
    "UserError": "params.errors",
    "ClientError": "inft.client.errors",
    "InvalidRequest": "inft.client.errors",
    "Unauthorized": "inft.client.errors",
    "Forbidden": "inft.client.errors",
    "NotFound": "inft.client.errors",
    "Conflict": "inft.client.errors",
    "ClientPoisoned": "inft.client.errors",
    "OperationCancelled": "inft.client.errors",
    "NotFinite": "inft.client.errors",
    "PrivacyBudgetExhausted": "inft.client.errors",
    "RateLimited": "inft.client.errors",
    "QueueFull": "inft.client.errors",
    "Closed": "inft.client.errors",
    "ClientUnavailable": "inft.client.errors",
    "StorageFull": "inft.client.errors",
    "TimedOut": "inft.client.errors",
    "InternalError": "inft.client.errors",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
