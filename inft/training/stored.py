"""A stored adapter read back: its files checked before torch is imported, its tensors one by one on the base model."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from inft.models import MODELS
from inft.models.loading import OURS
from inft.training.storage import BEST_FILE, STATE_FILE, file_sha256
from params.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from inft.models.spec import ModelSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
RUN_BEST = "best"  # where a run stores its adapter unless best_model_dir says otherwise
COPY_AGAIN = "Copy the directory again."
NAMED = 3  # tensors or files that a message names before it counts the others
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What the weights file says of one tensor."""

    shape: Shape
    dtype: str  # as safetensors writes it: "F32", "BF16"


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """An adapter on the disk; its weights are not read yet."""

    directory: Path
    config: Mapping[str, Any]  # adapter_config.json
    record: Mapping[str, Any] | None  # best.json; None: not stored by a run of inft
    state: Mapping[str, Any] | None = None  # state.json; None: not a checkpoint of the training client
    family: str | None  # llama32, aya, text; None: nothing says
    base_model: str | None  # hub id or path, "" for the embedded model; None: nothing says
    sha256: str  # of the weights file
    tensors: Mapping[str, StoredTensor]

    @property
    def parameters(self) -> int:
        """How many numbers the adapter holds."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def quantised(self) -> bool:
        """Whether it was trained on 4-bit weights (QLoRA)."""
        qlora = ((self.record or {}).get("params") or {}).get("qlora") or {}
        return bool(qlora.get("load_in_4bit"))

    @property
    def base_title(self) -> str:
        """The base model in words."""
        return base_title(self.base_model, self.family)

    def section(self, name: str) -> Any:
        """One section of the run's parameters, such as "basic"; the defaults where there is no record.

        Errors: UserError for a parameter that does not exist here: another version of inft trained the adapter.
        """
        from params.check import TRAIN
        from params.layers import merged, user_error
        from params.yamlfile import Given

        fields = ((self.record or {}).get("params") or {}).get(name) or {}
        origin = str(self.directory / BEST_FILE)
        problems: list[str] = []
        values = merged([{f"{name}.{key}": Given(value, origin) for key, value in fields.items()}], problems)
        if problems:
            raise user_error(problems)
        return TRAIN.sections_of(values)[name]


def read_adapter(directory: Path) -> StoredAdapter:
    """Read what a stored adapter is, and make sure that its files are whole; imports no torch.

    A run's directory stands for the ``best`` within it. Errors: UserError for a directory without an adapter, one of
    another kind than LoRA, pickled weights, and files that are missing, cut or not as best.json lists them.
    """
    found = adapter_directory(directory)
    stored = read_unchecked(found)
    wrong = changed_files(stored)
    if wrong:
        raise UserError(
            f"{found} is half copied or changed: {listed(wrong)} {'is' if len(wrong) == 1 else 'are'} missing or not "
            f"as {lister(stored)} says. {COPY_AGAIN}"
        )
    return stored


def adapter_directory(directory: Path) -> Path:
    """Return the directory of the adapter itself, given that or its run's; UserError when there is none."""
    directory = directory.expanduser()
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}: give the one that holds {CONFIG_FILE}.")
    for place in (directory, directory / RUN_BEST):
        if any((place / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE, BEST_FILE)):
            return place
    raise UserError(
        f"{directory} holds no adapter: neither it nor its directory {RUN_BEST} has {CONFIG_FILE}. "
        "Give the adapter's directory; a run says at its end where that is."
    )


def read_unchecked(directory: Path) -> StoredAdapter:
    """Read an adapter's directory without comparing its files with the checksums in best.json."""
    config = _json_object(directory / CONFIG_FILE)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{directory / CONFIG_FILE} describes an adapter of kind {kind}; inft reads LORA only.")
    weights = directory / WEIGHTS_FILE
    if not weights.is_file():
        raise _no_weights(directory)
    record = _json_object(directory / BEST_FILE) if (directory / BEST_FILE).exists() else None
    state = _json_object(directory / STATE_FILE) if record is None and (directory / STATE_FILE).exists() else None
    if state is not None and not (state.get("version") == 1 and isinstance(state.get("base"), Mapping)):
        state = None  # of another program
    family, base_model = _origin(config, record, state)
    return StoredAdapter(
        directory=directory,
        config=config,
        record=record,
        state=state,
        family=family,
        base_model=base_model,
        sha256=file_sha256(weights),
        tensors=_tensors(weights),
    )


def _origin(
    config: Mapping[str, Any], record: Mapping[str, Any] | None, state: Mapping[str, Any] | None
) -> tuple[str | None, str | None]:
    """Family and base model as best.json says, else as a checkpoint of the training client does, or PEFT's file."""
    if record is not None:
        return record.get("model"), record.get("base_model")
    named = config.get("base_model_name_or_path")
    embedded = named.removeprefix(OURS) if isinstance(named, str) and named.startswith(OURS) else None
    if embedded in MODELS:
        return embedded, ""
    family = (state or {}).get("base", {}).get("family")
    return family if family in MODELS else None, named


def changed_files(stored: StoredAdapter) -> list[str]:
    """Names of the files that best.json or state.json lists and that are missing or not as they were written."""
    listed = (stored.record or stored.state or {}).get("files") or {}
    if not isinstance(listed, Mapping):
        raise UserError(f"{stored.directory / lister(stored)} is damaged: its files are no object. {COPY_AGAIN}")
    known = {WEIGHTS_FILE: stored.sha256}

    def as_written(name: str, digest: str) -> bool:
        path = stored.directory / name
        return path.is_file() and (known.get(name) or file_sha256(path)) == digest

    return [name for name, digest in listed.items() if not as_written(name, digest)]


def lister(stored: StoredAdapter) -> str:
    """The name of the file that lists the others with their checksums."""
    return BEST_FILE if stored.state is None else STATE_FILE


def with_family(stored: StoredAdapter, family: str | None) -> StoredAdapter:
    """The adapter as one of ``family``, which a user names where best.json is missing.

    Errors: UserError when best.json says another family, and when neither says one.
    """
    if family is not None:
        refuse_other_family(stored, family)
    elif stored.family is None:
        raise UserError(
            f"{stored.directory} has no {BEST_FILE} that tells its family: say it with --family {'|'.join(MODELS)}."
        )
    return replace(stored, family=family or stored.family)


def refuse_other_family(stored: StoredAdapter, family: str) -> None:
    """UserError when the adapter is of another family than the one given."""
    if stored.family not in (None, family):
        raise UserError(
            f"the adapter in {stored.directory} is of the family {stored.family}, not {family}: "
            f"say {stored.family} instead of {family}."
        )


def load_adapter(base: "PreTrainedModel", stored: StoredAdapter, *, spec: "ModelSpec") -> "PeftModel":
    """Put a stored adapter on its base model, in evaluation mode, every weight as in its file.

    ``base`` may be quantised; a refusal leaves it as it was. Errors: UserError for an adapter of another family or of
    a base with another architecture, for tensors that are missing, unexpected or of another shape, and for values
    that are not finite.
    """
    from peft import PeftModel

    refuse_other_family(stored, spec.name)
    _refuse_other_base(base, stored, spec)
    config = _lora_config(stored)
    _refuse_other_tensors(base, stored, config)
    _refuse_not_finite(stored)
    model = PeftModel.from_pretrained(base, str(stored.directory), config=config, is_trainable=False)
    _refuse_other_values(model, stored)
    return model.eval()


def base_title(name: str | None, family: str | None) -> str:
    """A base model in words: its hub id or path, or that it is the embedded one."""
    return f"the embedded {family or 'model'}" if name == "" else name or "a model that nothing names"


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} is half copied: {path.name} is missing. {COPY_AGAIN}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is half copied or damaged: {error}. {COPY_AGAIN}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object. {COPY_AGAIN}")
    return found


def _no_weights(directory: Path) -> UserError:
    if (directory / PICKLED_FILE).exists():
        return UserError(
            f"{directory / PICKLED_FILE} is a pickle, which can run code when it is read: inft reads {WEIGHTS_FILE} "
            "only. Load the adapter in PEFT where you trust it and save it again: save_pretrained writes safetensors."
        )
    return UserError(f"{directory} is half copied: {WEIGHTS_FILE} is missing. {COPY_AGAIN}")


def _tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors that a safetensors file announces, once its length fits them; reads the header only."""
    try:
        with safe_open(path, framework="numpy") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {
                name: StoredTensor(shape=tuple(part.get_shape()), dtype=part.get_dtype())
                for name, part in parts.items()
            }
    except SafetensorError as error:
        raise UserError(f"{path} is half copied or damaged ({error}). {COPY_AGAIN}") from error
    if not found:
        raise UserError(f"{path} holds no tensor: it is no adapter.")
    return found


def _refuse_other_base(base: "PreTrainedModel", stored: StoredAdapter, spec: "ModelSpec") -> None:
    """UserError when best.json tells of a base with another architecture, or with other weights."""
    from inft.models.weights import weights_fingerprint
    from inft.training.best import config_sha256

    record, trained_base = stored.record or {}, (stored.state or {}).get("base", {})
    was = f"the adapter in {stored.directory} was trained on {base_title(stored.base_model, spec.name)}, and "
    expected = record.get("base_config_sha256")
    if expected is not None and config_sha256(base.config) != expected:
        raise UserError(f"{was}{base.name_or_path} has another architecture. Give the adapter's own base with --model.")
    trained_on = record.get("base_weights_sha256") or trained_base.get("fingerprint")
    given = weights_fingerprint(base.name_or_path)
    if trained_on is not None and given is not None and given != trained_on:
        raise UserError(
            f"{was}{base.name_or_path} has other weights. Give the adapter's own base with --model. (A copy that went "
            "through float16 differs too: use the original.)"
        )


def _lora_config(stored: StoredAdapter) -> "LoraConfig":
    from peft import LoraConfig

    try:
        config: LoraConfig = LoraConfig.from_pretrained(str(stored.directory))
    except (TypeError, ValueError) as error:
        raise UserError(f"{stored.directory / CONFIG_FILE} cannot be used: {error}.") from error
    return config


def _refuse_other_tensors(base: "PreTrainedModel", stored: StoredAdapter, config: "LoraConfig") -> None:
    """UserError when the file's tensors are not, by name and shape, those of such an adapter on such a base.

    They are compared on a model without weights: PEFT changes the one it is given before it looks at the file.
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict

    misfit = f"the adapter in {stored.directory} does not fit {base.name_or_path}"
    try:
        with torch.device("meta"):
            empty = PeftModel(type(base)(copy.deepcopy(base.config)), copy.deepcopy(config), low_cpu_mem_usage=True)
    except ValueError as error:  # no layer has the name of a target
        raise UserError(f"{misfit}: {error} Give the adapter's own base with --model.") from error
    state = get_peft_model_state_dict(empty, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = _differences({name: tensor.shape for name, tensor in stored.tensors.items()}, expected)
    if problems:
        raise UserError(
            f"{misfit}: {'; '.join(problems)}. Give the adapter's own base with --model, or copy the directory again."
        )


def _differences(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    """What sets the tensors of a file apart from those of the model, in words."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    other = [
        f"{name} ({'×'.join(map(str, shape))}, not {'×'.join(map(str, expected[name]))})"
        for name, shape in found.items()
        if shape != expected.get(name, shape)
    ]
    return [
        f"{len(names)} {what}: {listed(names)}"
        for names, what in (
            (unexpected, "of its tensors belong to layers that the model lacks or the adapter's config leaves out"),
            (missing, "tensors are missing in its file"),
            (other, "of its tensors have another shape"),
        )
        if names
    ]


def _refuse_not_finite(stored: StoredAdapter) -> None:
    wrong = [name for name, tensor in _read_weights(stored).items() if not tensor.isfinite().all()]
    if wrong:
        raise UserError(
            f"{stored.directory / WEIGHTS_FILE} holds values that are not finite, in {listed(wrong)}: the training "
            "diverged. Use an earlier checkpoint, or train again with a lower sft.lr."
        )


def _refuse_other_values(model: "PeftModel", stored: StoredAdapter) -> None:
    """UserError when a weight of the model is not the file's; those kept off the devices are not looked at."""
    from peft import get_peft_model_state_dict

    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    saved = _read_weights(stored)
    wrong = [
        name
        for name, tensor in saved.items()
        if not loaded[name].is_meta and not loaded[name].cpu().to(tensor.dtype).equal(tensor)
    ]
    if wrong:
        raise UserError(
            f"PEFT did not take over {listed(wrong)} from {stored.directory}: this release of it reads the adapter "
            "otherwise than it was written. Install the release with which it was trained."
        )


def _read_weights(stored: StoredAdapter) -> "dict[str, Tensor]":
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(str(stored.directory / WEIGHTS_FILE))
    return found


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
