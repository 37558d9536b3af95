"""The stored adapter: how it is chosen; written whole or not at all, described by best.json, loadable on the base."""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PretrainedConfig

from inft.evaluation.metrics import METRICS, Metric
from inft.models.weights import weights_fingerprint
from inft.training.processes import is_main
from inft.training.runlog import JsonlLogger
from inft.training.storage import BEST_FILE, file_sha256, staged
from params import SFTParams, TrainParams, UserError

ADAPTER_NAME = "default"
VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "quantization_config", "use_cache", "dtype")


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """The figure of the held-out rows that chooses the best adapter and stops a run early."""

    name: str  # "eval_loss", "eval_chrf", "eval_reward": in the metrics of an evaluation, in best.json and in the log
    metric: Metric
    why: str  # of the adapter that is stored by it

    def improves(self, value: float, reference: float | None, *, by: float = 0.0) -> bool:
        """Whether ``value`` is better than ``reference`` by more than ``by``; any value is better than None."""
        if reference is None:
            return True
        return value > reference + by if self.metric.higher_is_better else value < reference - by

    def said(self, value: float) -> str:
        """A value as a person is told it: "held-out loss 1.2345", "held-out chrF 63.2"."""
        return f"{self.title} {self.metric.shown(value)}"

    @property
    def title(self) -> str:
        """ "held-out loss", "held-out chrF"."""
        return f"held-out {self.metric.title}"

    @property
    def best(self) -> str:
        """ "lowest", "highest"."""
        return "highest" if self.metric.higher_is_better else "lowest"


LOSS = Criterion(
    name="eval_loss",
    metric=Metric(title="loss", decimals=4, higher_is_better=False),
    why="lowest loss per supervised token on the held-out rows so far",
)


REWARD = Criterion(
    name="eval_reward",
    metric=Metric(title="reward", decimals=4, higher_is_better=True),
    why="highest mean reward of the model's own answers to held-out prompts so far",
)


def criterion_of(sft: SFTParams, method: str = "sft") -> Criterion:
    """What ``sft.best_metric`` stands for in a run of ``method``."""
    if sft.best_metric == "loss":
        return (
            LOSS if method == "sft" else replace(LOSS, why=f"lowest {method.upper()} loss on the held-out rows so far")
        )
    if sft.best_metric == "reward":
        return REWARD
    metric = METRICS[sft.best_metric]
    why = f"highest {metric.title} of the captions generated for held-out rows so far (higher is better)"
    return Criterion(name=f"eval_{sft.best_metric}", metric=metric, why=why)


@dataclass(frozen=True, kw_only=True)
class BestRecord:
    """What best.json says of the adapter beside it."""

    step: int  # optimizer step whose weights these are
    metric: str | None  # "eval_loss", "eval_chrf"; None: not chosen by a metric
    value: float | None
    why: str  # one sentence: how this step came to be the stored one
    model: str  # family: llama32, aya, text
    base_model: str  # hub id or path; "" for the embedded model
    base_config_sha256: str
    params: Mapping[str, Any]  # the resolved parameters of the run
    base_weights_sha256: str | None = None  # of weights_fingerprint; None where the files were not at hand


def store_best(
    model: PeftModel, processor: Any, directory: Path, record: BestRecord, *, initial: "InitialAdapter | None"
) -> None:
    """Write adapter, processor and best.json to ``directory``, replacing what is there in one step.

    ``initial`` is the adapter at step 0 when its initialisation changed the base weights (PiSSA); the stored adapter
    is then the difference to it, a plain LoRA of twice the rank for the unchanged base. A full disk is a UserError
    and leaves ``directory`` as it was.
    """
    with staged(directory, what="the best adapter") as staging:
        if initial is None:
            save_adapter(model, staging)
        else:
            initial.save_difference(model, staging)
        processor.save_pretrained(str(staging))
        files = {
            path.relative_to(staging).as_posix(): file_sha256(path)
            for path in sorted(staging.rglob("*"))
            if path.is_file()
        }
        text = json.dumps({**record.__dict__, "files": files}, indent=2, ensure_ascii=False, allow_nan=False)
        (staging / BEST_FILE).write_text(text + "\n", encoding="utf-8")


def read_best(directory: Path) -> dict[str, Any] | None:
    """What best.json in ``directory`` says; None when no adapter is stored there."""
    path = directory / BEST_FILE
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: {error}. Move {directory} away; a checkpoint beside it holds the same kind of adapter."
        ) from error
    return found


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json as they are at this moment."""
    # Embeddings are never adapted here; "auto" would ask the hub whether their size changed.
    model.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # a model card that says nothing yet
    for weights in directory.glob("*.safetensors"):  # which safetensors lets nobody but their owner read
        weights.chmod((directory / "adapter_config.json").stat().st_mode)


def config_sha256(config: PretrainedConfig) -> str:
    """Fingerprint of a base model's architecture; the same wherever its files lie and however it is loaded."""

    def lasting(value: Any) -> Any:  # text_config and vision_config have volatile fields of their own
        if not isinstance(value, dict):
            return value
        return {key: lasting(part) for key, part in value.items() if key not in VOLATILE_CONFIG}

    fields = json.dumps(lasting(config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(fields.encode()).hexdigest()


class BestKeeper:
    """Stores the adapter of a run under its best_model_dir, each time with the record of how it was chosen.

    Of several processes, which hold the same adapter, the first stores it.
    """

    def __init__(self, params: TrainParams, *, model: PeftModel, processor: Any, log: JsonlLogger) -> None:
        """Make it before the first step: PiSSA's conversion needs the adapter as it was initialised."""
        self.params = params
        self.model = model
        self.processor = processor
        self.log = log
        self.directory = Path(params.best_model_dir)
        self.initial = InitialAdapter(model) if params.lora.init == "pissa" else None
        self.base_config_sha256 = config_sha256(model.get_base_model().config)
        self.base_weights_sha256 = weights_fingerprint(model.get_base_model().name_or_path) if is_main() else None
        self.criterion = criterion_of(params.sft, params.method)

    def keep(self, step: int, value: float) -> None:
        """Store the adapter as the best one by ``sft.best_metric`` so far."""
        self._store(step, self.criterion.name, value, self.criterion.why)

    def finish(self, step: int, *, evaluated: bool) -> None:
        """Store the last step's adapter when none was chosen by an evaluation."""
        if not self.params.sft.load_best_model_at_end:
            self._store(step, None, None, "sft.load_best_model_at_end is off: the last step")
        elif not evaluated:
            self._store(step, None, None, "there are no held-out rows to choose by: the last step")

    def _store(self, step: int, metric: str | None, value: float | None, why: str) -> None:
        if not is_main():
            return
        record = BestRecord(
            step=step,
            metric=metric,
            value=value,
            why=why,
            model=self.params.model,
            base_model=self.params.model_name,
            base_config_sha256=self.base_config_sha256,
            params=asdict(self.params),
            base_weights_sha256=self.base_weights_sha256,
        )
        store_best(self.model, self.processor, self.directory, record, initial=self.initial)
        self.log.event("best", step=step, metric=metric, value=value, path=self.directory)


class InitialAdapter:
    """The adapter weights before the first step, kept because their initialisation was taken out of the base weights.

    PiSSA (Meng et al. 2024) replaces W by W - s B0 A0. An adapter (A, B) trained on that base equals, on the original
    W, the LoRA with A' = [A; A0] and B' = [B, -B0] at the same scale s, since s B' A' = s (B A - B0 A0). Exact up to
    the rounding of W - s B0 A0 in the weights' dtype.
    """

    def __init__(self, model: PeftModel) -> None:
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        self.weights = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def save_difference(self, model: PeftModel, directory: Path) -> None:
        """Write the plain LoRA of rank 2r that gives, on the original base, what ``model`` computes now."""
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        difference = {name: self._joined(name, tensor.detach().cpu()) for name, tensor in state.items()}
        config = copy.deepcopy(model.peft_config[ADAPTER_NAME])
        assert isinstance(config, LoraConfig)
        config.init_lora_weights = True
        config.lora_alpha = config.lora_alpha * (2**0.5 if config.use_rslora else 2)  # keeps the scale s
        config.r *= 2
        config.inference_mode = True
        config.save_pretrained(str(directory))
        save_file(difference, str(directory / "adapter_model.safetensors"), metadata={"format": "pt"})

    def _joined(self, name: str, now: torch.Tensor) -> torch.Tensor:
        before = self.weights[name]
        if "lora_A" in name:
            return torch.cat([now, before], dim=0).contiguous()
        if "lora_B" in name:
            return torch.cat([now, -before], dim=1).contiguous()
        return now.contiguous()
