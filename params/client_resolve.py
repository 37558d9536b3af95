"""From mappings, as Python, JSON and YAML have them, to checked client configurations, and back."""

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from params.client import DPConfig, EngineParams, LoRAConfig, OptimizerConfig, ServeParams, TrainingConfig
from params.errors import UserError
from params.schema import Schema
from params.yamlfile import Given

SECTIONS: Mapping[str, type] = {"lora_config": LoRAConfig, "optimizer": OptimizerConfig, "dp_config": DPConfig}
TRAINING = Schema(TrainingConfig, SECTIONS, "{}.FIELD")
ENGINE = Schema(EngineParams, {}, "{}")
SERVE = Schema(ServeParams, {}, "{}")

Flat = TypeVar("Flat", EngineParams, ServeParams)


def training_config(given: TrainingConfig | Mapping[str, Any]) -> TrainingConfig:
    """Return the checked configuration of a client; raises one UserError that lists everything wrong."""
    values = asdict(given) if isinstance(given, TrainingConfig) else given
    if not isinstance(values, Mapping):
        raise UserError(f"a training configuration is a mapping, not {type(values).__name__}: give model_ref and more.")
    problems: list[str] = []
    flat, present = _flattened(values, problems)
    found = TRAINING.checked(flat, problems)
    if "model_ref" not in found and "model_ref" not in flat:
        problems.append("model_ref is missing: name a hub id, a directory, or embedded/text.")
    if "dp_config" in present and not any(key.startswith("dp_config.dataset_size") for key in flat):
        problems.append("dp_config.dataset_size is missing: give the number of rows that batches are drawn from.")
    if not problems:
        config = _training_config(found, present)
        problems = _contradictions(config)
        if not problems:
            return config
    raise UserError("\n".join(problems))


def flat_params(schema: Schema, kind: type[Flat], given: Mapping[str, Any]) -> Flat:
    """Return EngineParams or ServeParams of a mapping; raises one UserError that lists everything wrong."""
    problems: list[str] = []
    found = schema.checked({key: Given(value, "config") for key, value in given.items()}, problems)
    if problems:
        raise UserError("\n".join(problems))
    return kind(**found)


def as_mapping(config: TrainingConfig) -> dict[str, Any]:
    """Return the configuration as plain values that JSON takes and `training_config` reads back to an equal one."""
    return {key: _plain(value) for key, value in asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _flattened(values: Mapping[str, Any], problems: list[str]) -> tuple[dict[str, Given], set[str]]:
    """Dotted values, and the sections that are there; a section that is None is not."""
    flat: dict[str, Given] = {}
    present: set[str] = set()
    for key, value in values.items():
        if key not in SECTIONS:
            flat[str(key)] = Given(value, "config")
            continue
        section = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        if section is None and NoneType in get_args(get_type_hints(TrainingConfig)[key]):
            continue
        if not isinstance(section, Mapping):
            problems.append(f"config: {key} is {section!r:.60}: give a mapping of its fields.")
            continue
        present.add(key)
        flat |= {f"{key}.{name}": Given(item, "config") for name, item in section.items()}
    return flat, present


def _training_config(found: Mapping[str, Any], present: set[str]) -> TrainingConfig:
    plain = {key: value for key, value in found.items() if "." not in key}
    sections = {
        name: kind(**{key.partition(".")[2]: value for key, value in found.items() if key.startswith(f"{name}.")})
        for name, kind in SECTIONS.items()
        if name in present
    }
    return TrainingConfig(**plain, **sections)


def _contradictions(config: TrainingConfig) -> list[str]:
    """Settings that cannot hold together, each with the remedy."""
    problems = []
    optimizer, dp = config.optimizer, config.dp
    defaults = OptimizerConfig()
    if optimizer.name == "sgd" and (optimizer.betas, optimizer.eps) != (defaults.betas, defaults.eps):
        problems.append("optimizer.betas and optimizer.eps do nothing with sgd: leave them out, or choose adamw.")
    if not all(0 <= beta < 1 for beta in optimizer.betas):  # the schema looks at the bounds of plain fields alone
        problems.append(f"optimizer.betas are {list(optimizer.betas)}: give two numbers of at least 0 and below 1.")
    if not config.lora.target_modules:
        problems.append("lora_config.target_modules is empty: name the layers to adapt, such as q_proj and v_proj.")
    if dp is None:
        return problems
    if not 0 < dp.target_delta < 1:
        problems.append(f"dp_config.target_delta is {dp.target_delta}: give a number between 0 and 1.")
    elif dp.target_delta >= 1 / dp.dataset_size:
        problems.append(
            f"dp_config.target_delta is {dp.target_delta:g}, and with {dp.dataset_size} rows it must be below 1 / "
            f"{dp.dataset_size}: above, publishing a whole row would count as private."
        )
    if dp.sample_rate is None and config.batch_size > dp.dataset_size:
        problems.append(
            f"batch_size {config.batch_size} is more than dp_config.dataset_size {dp.dataset_size}: lower it, or give "
            "dp_config.sample_rate."
        )
    if dp.noise_multiplier is None and dp.target_epsilon is None:
        problems.append("dp_config has neither noise_multiplier nor target_epsilon: give one or both.")
    elif dp.noise_multiplier is None and config.max_steps is None:
        problems.append(
            "dp_config has no noise_multiplier, and max_steps is needed to find one for target_epsilon: give either."
        )
    if optimizer.max_grad_norm is not None:
        problems.append("optimizer.max_grad_norm is not for private clients: dp_config.max_grad_norm clips each row.")
    if config.gradient_accumulation_steps != 1:
        problems.append(
            "gradient_accumulation_steps is 1 with dp_config: an optim_step takes all rows since the last, however "
            "many forward_backwards brought them."
        )
    return problems
