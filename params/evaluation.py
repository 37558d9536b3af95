"""EvalParams: everything one `inft evaluate` or `inft caption` was resolved to, from an adapter's record onwards.

Later layers win: defaults, the demo preset, the parameters of the adapter's run, ``--set``, the other flags.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from params.basic import BasicParams
from params.bounds import Count, CountOrZero
from params.check import SECTIONS, TRAIN
from params.contradictions import language_problems
from params.errors import UserError
from params.layers import Layer, directories, merged, set_layers, user_error
from params.lora import QLoRAParams
from params.methods import RL_METHODS
from params.munichus import LANGUAGE_NAMES, MUNIChusLoadConfig
from params.presets import MODEL_FIELDS, MODEL_NAMES, SAMPLE_CONTEXT, preset
from params.rl import RLParams
from params.train import Method, ModelName
from params.yamlfile import Given

BEST = "best"  # where a run stores its adapter: the name of the run is then that of the directory above
HELDOUT = "heldout"  # the split of rows that the adapter's run held out of its training data
ShotChoice = Literal["random", "similar"]

# What each flag sets.
FLAGS: Mapping[str, tuple[str, ...]] = {
    "data": ("data.data",),
    "languages": ("data.languages",),
    "split": ("data.split",),
    "max_new_tokens": ("basic.gen_max_new_tokens",),
    "sample": ("basic.gen_do_sample",),
    "temperature": ("basic.gen_temperature",),
    "top_p": ("basic.gen_top_p",),
    "num_beams": ("basic.gen_num_beams",),
    "seed": ("basic.seed", "data.seed"),
    "quantize": ("qlora.load_in_4bit",),
}
READ_SECTIONS = ("basic", "data", "qlora")
# Fields that say how a run trained or where it wrote, not how its model is to be used.
OF_TRAINING = ("data.split", "data.max_rows_per_lang", "data.num_workers", "data.eval_fraction", "basic.gen_do_sample")


@dataclass(frozen=True, kw_only=True)
class EvalParams:
    """The resolved parameters of an evaluation."""

    model: ModelName
    adapter: str | None = None  # directory of a stored adapter; None: the base model alone
    demo: bool = False  # the embedded tiny model
    model_name: str  # hub id or local path; "" means the embedded model
    processor_name: str  # the adapter's own directory is tried first
    trained: MUNIChusLoadConfig | None = None  # what the adapter's run read: its held-out rows are told by it
    method: Method = "sft"  # of that run: what a row of its data is
    rewards: tuple[str, ...] = ()  # of that run, with grpo and ppo: whether its rows need a caption
    limit: Count | None = None  # rows at most, spread evenly over the languages
    batch_size: Count = 8  # rows captioned at the same time
    shots: CountOrZero = 0  # examples of the train split before each row
    shot_choice: ShotChoice = "random"  # similar: nearest images by the model's own vision features
    forgetting: MUNIChusLoadConfig | None = None  # rows that the base could do, scored for base and adapter
    drift: CountOrZero = 0  # rows whose hidden states are compared between base and adapter
    resamples: Count = 1000  # of the bootstrap behind the intervals
    basic: BasicParams = field(default_factory=BasicParams)
    data: MUNIChusLoadConfig = field(default_factory=MUNIChusLoadConfig)
    qlora: QLoRAParams = field(default_factory=QLoRAParams)


def resolve_eval(
    model: str,
    *,
    adapter: str | None = None,
    trained: Mapping[str, Any] | None = None,
    demo: bool = False,
    model_name: str | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    **own: Any,
) -> EvalParams:
    """Return the parameters of one evaluation; raises one UserError that lists everything wrong.

    ``trained`` are the parameters in the adapter's best.json: its base model, prompt, columns and precision are then
    the defaults. ``flags`` are the command line's, keyed as in FLAGS; None is not given. ``own`` are other fields.
    """
    if model not in MODEL_NAMES:
        near = difflib.get_close_matches(model, MODEL_NAMES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(MODEL_NAMES)}."
        raise UserError(f"unknown model {model!r}; {hint}")
    problems: list[str] = []
    layers = [*set_layers(overrides, problems), _flag_layer(flags or {})]
    layers = [directories(layer, problems) for layer in layers]
    for layer in layers:
        problems += [_unread(key, given.origin) for key, given in layer.items() if _section(key) not in READ_SECTIONS]
    demo = demo or bool(trained and trained.get("demo") and model_name is None)
    told = [given.value for layer in layers for key, given in layer.items() if key == "data.data"]
    own_data = (trained or {}).get("data", {}).get("data")
    source = told[-1] if told else own_data
    other_data = bool(told) and told[-1] != own_data
    below = [_preset_layer(model, demo=demo), _trained_layer(trained, other_data=other_data)]
    if source == "sample" or (demo and source is None):
        below.append({"data.context": Given(SAMPLE_CONTEXT[model], "preset")})
    values = merged([*below, *layers], problems)
    values.setdefault("data.languages", tuple(values.get("data.language_names", LANGUAGE_NAMES)))
    names = [values.get(f"basic.{name}", getattr(BasicParams(), name)) for name in MODEL_FIELDS[model]]
    if model_name is not None:
        names = [model_name, model_name]
    if not names[0] and not demo:
        problems.append("the model name is empty: name a hub id or a local path with --model, or give --demo.")
    sections = {name: section for name, section in TRAIN.sections_of(values).items() if name in READ_SECTIONS}
    problems += language_problems(sections["data"])
    method = (trained or {}).get("method", "sft")
    if problems:
        raise user_error(problems)
    return EvalParams(
        model=model,
        adapter=adapter,
        demo=demo,
        model_name=names[0],
        processor_name=names[1],
        trained=_trained_data(trained),
        method=method,
        rewards=_trained_rewards(trained) if method in RL_METHODS else (),
        **sections,
        **{name: value for name, value in own.items() if value is not None},
    )


def _section(key: str) -> str:
    return key.partition(".")[0]


def _unread(key: str, origin: str) -> str:
    if _section(key) in SECTIONS:
        return f"{origin} {key}: it is a parameter of training and has no effect here: leave it out."
    return f"{origin} {key}: not a parameter; the sections are {', '.join(READ_SECTIONS)}."


def _flag_layer(flags: Mapping[str, Any]) -> Layer:
    layer: Layer = {}
    for name, value in flags.items():
        if value is None:
            continue
        origin = f"--{'no-' * (value is False)}{name.replace('_', '-')}"
        layer.update(dict.fromkeys(FLAGS[name], Given(value, origin, isinstance(value, str))))
    return layer


def _preset_layer(model: str, *, demo: bool) -> Layer:
    """What a demo changes on the defaults; all the languages instead of those that a demo teaches."""
    values = preset(model, "basic", demo=demo, source="")
    layer = {
        f"{section}.{name}": Given(value, "preset")
        for section, fields in values.items()
        for name, value in fields.items()
        if section in READ_SECTIONS and f"{section}.{name}" not in OF_TRAINING
    }
    layer.pop("data.languages", None)
    return {**layer, "data.split": Given("test", "default"), "basic.gen_do_sample": Given(False, "default")}


def _trained_layer(trained: Mapping[str, Any] | None, *, other_data: bool) -> Layer:
    """What the adapter's run says of its model, prompt and data; columns and languages are those of its own data."""
    if trained is None:
        return {}
    layer = {
        f"{section}.{name}": Given(value, "best.json")
        for section in READ_SECTIONS
        for name, value in (trained.get(section) or {}).items()
    }
    left_out = (*OF_TRAINING, *(("data.columns", "data.languages") if other_data else ()))
    return {key: given for key, given in layer.items() if key not in left_out}


def _trained_data(trained: Mapping[str, Any] | None) -> MUNIChusLoadConfig | None:
    """The data section of the adapter's run as it was."""
    if trained is None:
        return None
    layer = {f"data.{name}": Given(value, "best.json") for name, value in (trained.get("data") or {}).items()}
    found: MUNIChusLoadConfig = TRAIN.sections_of(merged([layer], []))["data"]
    return found


def _trained_rewards(trained: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The rewards of the adapter's run; the default where its record names none."""
    names = ((trained or {}).get("rl") or {}).get("rewards")
    return RLParams().rewards if names is None else tuple(names)


def evaluation_name(params: EvalParams) -> str:
    """The name of an evaluation's directory: "llama32_basic_demo-sample-test", "aya_base-emoji10-test-random3"."""
    who = f"{params.model}_base{'_demo' if params.demo else ''}"
    if params.adapter is not None:
        directory = Path(params.adapter).resolve()
        who = directory.parent.name if directory.name == BEST else directory.name
        if who.startswith("checkpoint-"):
            who = f"{directory.parent.name}_{who}"
    source = params.data.data or "munichus"
    what = source.removeprefix("hub:").strip("/").replace("/", "_") if source.startswith("hub:") else Path(source).stem
    parts = [who, what or "data", params.data.split]
    if params.shots:
        parts.append(f"{params.shot_choice}{params.shots}")
    return "-".join("".join(c if c.isalnum() or c in "._-" else "_" for c in part) for part in parts)
