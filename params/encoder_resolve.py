"""From a configuration file and ``--section.key value`` arguments to checked EncoderParams, and to a file and back.

Later layers win: defaults, the demo's values, the YAML file, the arguments. Everything that is wrong in any of them is
reported at once.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from params.encoder import EncoderParams, EncoderTask
from params.encoder_contradictions import contradictions
from params.errors import UserError
from params.layers import Layer, directories, merged, user_error
from params.schema import Schema
from params.yamlfile import Given, read_yaml, write_yaml

_TYPES = get_type_hints(EncoderParams)
SECTIONS: Mapping[str, type] = {
    field.name: _TYPES[field.name] for field in fields(EncoderParams) if is_dataclass(_TYPES[field.name])
}
ENCODER = Schema(EncoderParams, SECTIONS, "--{}.FIELD VALUE")
SHIPPED = Path(__file__).parent / "configs"
WHICH_DATA = {"dataset.name", "dataset.path", "dataset.sources"}  # the one named last is read, with its config
OF_DATA = {*WHICH_DATA, "dataset.config"}
FOLDERS = ("pretraining", "contrastive")  # of SHIPPED, for encoders


def resolve_encoder(
    task: EncoderTask,
    *,
    config_file: Path | None = None,
    arguments: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
) -> EncoderParams:
    """Return the parameters of one run; raises one UserError that lists everything wrong.

    `arguments` are what a command line has left: ["--trainer.max_steps", "100"]. `flags` are values by dotted name;
    None is not given. `base` lies below the file: the demo's values, or those of the run that is gone on with.
    """
    file, problems = read_yaml(find_config(config_file)) if config_file else ({}, [])
    told = _arguments(arguments, problems)
    told |= {key: Given(value, f"--{key}") for key, value in (flags or {}).items() if value is not None}
    below = {key: Given(value, "defaults") for key, value in (base or {}).items()}
    lower = [below, file] if not file.keys() & WHICH_DATA else [_without(below, OF_DATA), file]
    if told.keys() & WHICH_DATA:  # data that a command line names takes the place of the file's
        lower = [_without(layer, OF_DATA) for layer in lower]
    layers = [directories(layer, problems) for layer in (*lower, *_mappings_apart(told))]
    values = merged(layers, problems, ENCODER)
    if values.setdefault("task", task) != task:
        problems.append(f"the configuration is of task {values['task']}: {_COMMANDS[values['task']]} runs it.")
    if not problems:
        params = _encoder_params(values)
        problems = contradictions(params, {**file, **told})
        if not problems:
            return params
    raise user_error(problems)


def task_of(config_file: Path | None) -> EncoderTask:
    """The task that a configuration names; pretraining where it names none. resolve_encoder checks the rest."""
    given = read_yaml(find_config(config_file))[0].get("task") if config_file else None
    return "contrastive" if given is not None and given.value == "contrastive" else "pretraining"


_COMMANDS = {"pretraining": "inft pretrain neobert", "contrastive": "inft finetune-encoder"}


def find_config(path: Path) -> Path:
    """The file itself, or the one that ships under that name: "configs/pretraining/pretrain_neobert.yaml".

    Errors: UserError that lists the files that ship.
    """
    if path.exists():
        return path
    parts = path.parts[path.parts.index("configs") + 1 :] if "configs" in path.parts else path.parts
    shipped = SHIPPED.joinpath(*parts)
    if not path.is_absolute() and ".." not in parts and shipped.is_file():
        return shipped
    known = [
        f"configs/{file.relative_to(SHIPPED)}" for folder in FOLDERS for file in sorted((SHIPPED / folder).glob("*"))
    ]
    raise UserError(f"{path}: no such file. These ship: {', '.join(known)}.")


def dump_encoder_yaml(params: EncoderParams) -> str:
    """The parameters as YAML text that load_encoder_params reads back to an equal EncoderParams."""
    return write_yaml(asdict(params))


def load_encoder_params(path: Path) -> EncoderParams:
    """Read a config.yaml that dump_encoder_yaml wrote; fields it lacks keep their defaults; UserError when wrong."""
    given, problems = read_yaml(path)
    values = ENCODER.checked(given, problems)
    if problems:
        raise user_error(problems)
    return _encoder_params(values)


def _encoder_params(values: Mapping[str, Any]) -> EncoderParams:
    plain = {key: value for key, value in values.items() if "." not in key}
    return EncoderParams(**ENCODER.sections_of(values), **plain)


def _without(layer: Layer, names: Collection[str]) -> Layer:
    return {key: given for key, given in layer.items() if key not in names}


def _arguments(arguments: Sequence[str], problems: list[str]) -> Layer:
    """What ``--key value`` and ``--key=value`` say; what is neither is a problem."""
    layer: Layer = {}
    rest = list(arguments)
    while rest:
        text = rest.pop(0)
        key, equals, value = text.removeprefix("--").partition("=")
        if not text.startswith("--") or not key:
            problems.append(f"{text}: expected --section.key value, such as --trainer.max_steps 1000.")
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                problems.append(f"--{key} needs a value: --{key} VALUE.")
                continue
            value = rest.pop(0)
        if key in layer:
            problems.append(f"--{key} is given twice.")
        layer[key] = Given(value, f"--{key}", is_text=True)
    return layer


def _mappings_apart(layer: Layer) -> list[Layer]:
    """The layer without entries of mappings (--dataset.sources.nli FILE), and one layer for each of these."""
    plain: Layer = {}
    entries: list[Layer] = []
    for key, given in layer.items():
        whole, entry = ".".join(key.split(".")[:2]), ".".join(key.split(".")[2:])
        if entry and ENCODER.is_mapping(whole):
            entries.append({whole: Given({entry: given.value}, given.origin)})
        else:
            plain[key] = given
    return [plain, *entries]
