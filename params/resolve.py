"""From a command line to checked parameters, and from checked parameters to a file and back.

Later layers win: defaults, the preset of (model, mode, method), the chosen CRAFT preset, the YAML file, ``--set``, the
other flags. Everything that is wrong in any of them is reported at once.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from params.basic import BasicParams
from params.check import TRAIN
from params.contradictions import contradictions
from params.craft import CRAFT_PRESETS, CraftParams
from params.layers import Layer, directories, merged, set_layers, user_error
from params.presets import METHODS, MODEL_FIELDS, MODEL_NAMES, OUTPUT_FIELDS, TRAINING_MODES, preset
from params.sft import SFTParams
from params.train import Method, ModelName, TrainingMode, TrainParams
from params.yamlfile import Given, read_yaml, write_yaml

# What each flag of `inft train` sets. model_name and output_dir stand for the fields of the run's family and mode.
FLAGS: Mapping[str, tuple[str, ...]] = {
    "model": ("model_name",),
    "output_dir": ("output_dir",),
    "task": ("task",),
    "data": ("data.data",),
    "languages": ("data.languages",),
    "max_rows_per_lang": ("data.max_rows_per_lang",),
    "eval_fraction": ("data.eval_fraction",),
    "max_bad_fraction": ("data.max_bad_fraction",),
    "epochs": ("sft.num_epochs",),
    "max_steps": ("sft.max_steps",),
    "eval_captions": ("sft.eval_captions",),
    "best_metric": ("sft.best_metric",),
    "rewards": ("rl.rewards",),
    "quantize": ("qlora.load_in_4bit",),
    "seed": ("basic.seed", "data.seed"),
    "craft": ("craft.enabled",),
    "craft_preset": ("craft.preset",),
    "craft_pairs": ("craft.pairs",),
}


class Identity(NamedTuple):
    """What a run is: it picks the preset, the directories and the fields that name the model."""

    model: ModelName
    training_mode: TrainingMode
    method: Method
    demo: bool

    @property
    def task(self) -> str:
        """The tag of the run's log: "aya_basic", "aya_basic_dpo_demo"."""
        return f"{self.model}_{self.training_mode}{self.suffix}"

    @property
    def suffix(self) -> str:
        """What tells the run's log and directory from those of a fine-tuning run: "", "_dpo", "_dpo_demo"."""
        return f"{'' if self.method == 'sft' else f'_{self.method}'}{'_demo' if self.demo else ''}"

    def own_names(self) -> dict[str, str]:
        """The section fields that TrainParams' own fields stand for in this run."""
        model, processor = MODEL_FIELDS[self.model]
        output, best = OUTPUT_FIELDS[self.model, self.training_mode]
        return {
            "model_name": f"basic.{model}",
            "processor_name": f"basic.{processor}",
            "output_dir": f"sft.{output}",
            "best_model_dir": f"sft.{best}",
        }


def resolve_train(
    model: str,
    *,
    training_mode: str | None = None,
    method: str | None = None,
    demo: bool | None = None,
    config_file: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> TrainParams:
    """Return the parameters of one ``inft train`` run; raises one UserError that lists everything wrong.

    None for `training_mode`, `method` and `demo` leaves them to the file, and without one to basic, sft and False.
    `overrides` are the texts of ``--set``, such as "sft.lr=2e-4". `flags` are keyed as in FLAGS or by dotted names;
    None is not given.
    """
    file, problems = read_yaml(config_file) if config_file else ({}, [])
    set_by = set_layers(overrides, problems, identity=Identity._fields)
    told_layers = [file, *set_by, _flag_layer(flags or {}, problems)]
    told_layers[-1] |= _craft_switched_off(told_layers[1:], problems)
    layers = [directories(layer, problems) for layer in told_layers]
    told = {"model": model, "training_mode": training_mode, "method": method, "demo": demo}
    identity = _identity(told, file, problems)
    if identity is not None:
        layers = [_own(layer, identity, problems) for layer in layers]
        layers.insert(0, _craft_layer(_last(layers, "craft.preset")))
        layers.insert(0, _base_layer(identity, _last(layers, "data.data"), _last(layers, "basic.output_dir")))
    values = merged(layers, problems)
    if identity is not None and not problems:
        params = _train_params(identity, values)
        problems = contradictions(params, {key for layer in told_layers[1:] for key in layer})
        if not problems:
            return params
    raise user_error(problems)


def dump_yaml(params: TrainParams) -> str:
    """The parameters as YAML text that load_params reads back to an equal TrainParams."""
    return write_yaml(asdict(params))


def load_params(path: Path) -> TrainParams:
    """Read a params.yaml that dump_yaml wrote; fields it lacks keep their defaults; UserError when it is wrong."""
    given, problems = read_yaml(path)
    values = TRAIN.checked(given, problems)
    required = ("model", "output_dir", "best_model_dir", "model_name", "processor_name", "task")
    problems += [f"{path}: {name} is missing." for name in required if name not in given]
    if problems:
        raise user_error(problems)
    return TrainParams(**TRAIN.sections_of(values), **{key: value for key, value in values.items() if "." not in key})


def _identity(told: Mapping[str, Any], file: Layer, problems: list[str]) -> Identity | None:
    """What is told on the command line or, where that is silent, in the file; None when it is wrong."""
    before = len(problems)
    found: dict[str, Any] = {"training_mode": "basic", "method": "sft", "demo": False}
    stated = TRAIN.checked({key: file[key] for key in Identity._fields if key in file}, [])
    for key, value in told.items():
        found[key] = value if value is not None else stated.get(key, found.get(key))
        if value is not None and stated.get(key, value) != value:
            problems.append(f"{file[key].origin}: {key} is {stated[key]}, but the command line says {value}.")
    for key, known in {"model": MODEL_NAMES, "training_mode": TRAINING_MODES, "method": METHODS}.items():
        if found[key] not in known:
            near = difflib.get_close_matches(str(found[key]), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."
            problems.append(f"unknown {key.replace('_', ' ')} {found[key]!r}; {hint}")
    return Identity(**found) if len(problems) == before else None


def _flag_layer(flags: Mapping[str, Any], problems: list[str]) -> Layer:
    given = {name: value for name, value in flags.items() if value is not None}
    if "epochs" in given and "max_steps" in given:
        problems.append("--epochs and --max-steps: give one of them; steps end the run whatever the epochs.")
    layer: Layer = {}
    for name, value in given.items():
        negated = name == "quantize" or value is False
        origin = f"--{'no-' * negated}{name.replace('_', '-')}"
        layer.update(dict.fromkeys(FLAGS.get(name, (name,)), Given(value, origin, isinstance(value, str))))
    if given.get("craft_pairs"):  # whoever names pairs here wants them used; in a file they may wait for --craft
        layer.setdefault("craft.enabled", Given(True, "--craft-pairs"))
    return layer


def _own(layer: Layer, identity: Identity, problems: list[str]) -> Layer:
    """The layer in section fields only, with what follows from a field that is given alone.

    A model brings its own processor, an output directory holds its best adapter, epochs replace the steps of a lower
    layer, and a CRAFT preset turns CRAFT on.
    """
    names = identity.own_names()
    for name, field in names.items():
        if name in layer and field in layer and layer[name].value != layer[field].value:
            problems.append(f"{layer[name].origin}: {name} and {field} differ but mean the same: drop one.")
    own = {names.get(key, key): given for key, given in layer.items() if key not in Identity._fields}
    followers = {
        "model_name": ("processor_name", lambda name: name),
        "output_dir": ("best_model_dir", lambda directory: str(Path(directory) / "best")),
    }
    for leader, (follower, derive) in followers.items():
        given = own.get(names[leader])
        if given is not None and isinstance(given.value, str):
            own.setdefault(names[follower], given._replace(value=derive(given.value)))
    if "sft.num_epochs" in own:
        own.setdefault("sft.max_steps", Given(None, own["sft.num_epochs"].origin))
    preset_of_craft = own.get("craft.preset")
    if preset_of_craft is not None and _is_craft_preset(preset_of_craft.value):
        own.setdefault("craft.enabled", Given(True, preset_of_craft.origin))
    return own


def _is_craft_preset(name: Any) -> bool:
    return isinstance(name, str) and name in CRAFT_PRESETS


def _craft_layer(name: Any) -> Layer:
    """The values of a CRAFT preset, which replace those of (model, mode); nothing for a name that is none."""
    values = CRAFT_PRESETS[name] if _is_craft_preset(name) else {}
    return {f"craft.{key}": Given(value, f"CRAFT preset {name}") for key, value in values.items()}


def _craft_switched_off(command_line: Sequence[Layer], problems: list[str]) -> Layer:
    """What --no-craft sets besides: every field of the section to its default, whatever the file says of CRAFT.

    On the same command line a setting of CRAFT contradicts it.
    """
    switch = command_line[-1].get("craft.enabled")
    if switch is None or switch.value is not False:
        return {}
    for layer in command_line:
        for key, given in layer.items():
            if key.startswith("craft.") and key != "craft.enabled":
                option = f"--set {key}" if given.origin == "--set" else given.origin
                problems.append(f"{option} and {switch.origin} contradict each other: drop one.")
    return {f"craft.{name}": Given(value, switch.origin) for name, value in asdict(CraftParams()).items()}


def _base_layer(identity: Identity, source: Any, outputs: Any) -> Layer:
    """The preset, and the directories that SFTParams names under basic.output_dir, with the run's suffix."""
    names = identity.own_names()
    default_output, default_best = (
        Path(getattr(SFTParams(), names[key].removeprefix("sft."))) for key in ("output_dir", "best_model_dir")
    )
    beneath = default_output.relative_to(BasicParams().output_dir)
    output = Path(str(outputs or BasicParams().output_dir)) / f"{beneath}{identity.suffix}"
    best = output / default_best.relative_to(default_output)
    sections = preset(identity.model, identity.training_mode, method=identity.method, demo=identity.demo, source=source)
    values = {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
    values |= {names["output_dir"]: str(output), names["best_model_dir"]: str(best)}
    return {key: Given(value, "preset") for key, value in values.items()}


def _last(layers: Sequence[Layer], key: str) -> Any:
    """What the topmost layer that has the key says; None when no layer has it."""
    return next((layer[key].value for layer in reversed(layers) if key in layer), None)


def _train_params(identity: Identity, values: Mapping[str, Any]) -> TrainParams:
    sections = TRAIN.sections_of(values)
    names = {
        own: getattr(sections[section], name)
        for own, key in identity.own_names().items()
        for section, _, name in [key.partition(".")]
    }
    return TrainParams(**identity._asdict(), **names, task=values.get("task", identity.task), **sections)
