"""The numbers and target modules of each (model, mode), those of each method, and where each of them writes.

Nothing else in the project asks which mode a run has. To change what ``inft train X --demo`` does, change DEMO, and
METHOD_DEMO for ``--method``; to change what is adapted, change TARGETS and WIDER.
"""

from collections.abc import Mapping
from typing import Any, get_args

from params.lora import LoRAParams
from params.train import Method, ModelName, TrainingMode

MODEL_NAMES: tuple[ModelName, ...] = get_args(ModelName)
TRAINING_MODES: tuple[TrainingMode, ...] = get_args(TrainingMode)
METHODS: tuple[Method, ...] = get_args(Method)
Values = Mapping[str, Mapping[str, Any]]  # section -> field -> value

# BasicParams' fields of each family: model name, processor name.
MODEL_FIELDS: Mapping[str, tuple[str, str]] = {
    "llama32": ("llama_model_name", "llama_processor_name"),
    "aya": ("aya_model_name", "aya_processor_name"),
    "text": ("text_model_name", "text_processor_name"),
}

# SFTParams' fields of each (model, mode): output directory, directory of the best adapter.
OUTPUT_FIELDS: Mapping[tuple[str, str], tuple[str, str]] = {
    ("llama32", "basic"): ("llama_32_output_dir", "llama32_best_model_dir"),
    ("llama32", "advanced"): ("llama32_adv_output_dir", "llama32_adv_best_model_dir"),
    ("aya", "basic"): ("aya_output_dir", "aya_best_model_dir"),
    ("aya", "advanced"): ("aya_adv_output_dir", "aya_adv_best_model_dir"),
    ("text", "basic"): ("text_output_dir", "text_best_model_dir"),
    ("text", "advanced"): ("text_adv_output_dir", "text_adv_best_model_dir"),
}

# Each pattern must match the whole name of a linear layer. The vision towers are in none of them.
TARGETS: Mapping[str, tuple[str, ...]] = {
    "llama32": (r".*language_model\.layers\.\d+\.(self_attn|cross_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",),
    "aya": (r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",),
    # Attention and MLP of Llama-like models, then of Phi, GPT-NeoX, OPT and GPT-2.
    "text": (
        r".*\.((q|k|v|o|gate|up|down|qkv|gate_up|out)_proj"
        r"|query_key_value|dense|dense_h_to_4h|dense_4h_to_h|fc1|fc2|fc_in|fc_out|c_attn|c_fc|c_proj)",
    ),
}

# What the advanced mode adapts besides.
WIDER: Mapping[str, tuple[str, ...]] = {
    "llama32": (r".*multi_modal_projector",),
    "aya": (r".*multi_modal_projector\.linear_[12]",),
    "text": (r"(?!(lm_head|embed_out|output|output_layer)$).+",),  # every linear layer but the head
}

# LoRAParams' field that replaces the whole list in advanced mode.
ADVANCED_FIELD: Mapping[str, str] = {
    "llama32": "advanced_target_modules",
    "aya": "aya_advanced_target_modules",
    "text": "advanced_target_modules",
}

# A demo runs on the embedded models, whose weights are too small to quantise and whose base knows seven languages.
_DEMO_SFT: Mapping[str, Any] = {
    "max_steps": 400,  # with 16 rows a step: 40 s on one core, 97 % exact captions and more with either mode
    "lr": 3e-3,
    "warmup_ratio": 0.05,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "logging_steps": 25,
    "save_steps": 100,
    "eval_steps": 100,
    "early_stopping_threshold": 0.0,
}


def _demo(model: str, *, r: int = 16, alpha: int = 32, max_length: int = 512, **sft: Any) -> Values:
    """Every section of a demo preset; keywords replace entries of _DEMO_SFT."""
    embedded = dict.fromkeys(MODEL_FIELDS[model], "")
    return {
        "basic": {"dtype": "float32", "max_length": max_length, **embedded},
        "data": {"data": "sample", "num_workers": 0},
        "qlora": {"load_in_4bit": False},
        "lora": {"r": r, "alpha": alpha, "dropout": 0.0},
        "sft": {**_DEMO_SFT, **sft},
    }


DEMO: Mapping[tuple[str, str], Values] = {
    ("llama32", "basic"): _demo("llama32"),
    ("llama32", "advanced"): _demo("llama32"),
    ("aya", "basic"): _demo("aya"),
    ("aya", "advanced"): _demo("aya"),
    ("text", "basic"): _demo("text", max_steps=200),
    ("text", "advanced"): _demo("text", max_steps=200),
}

# The released models run on the defaults of the dataclasses; a row here changes that for one of them.
RELEASED: Mapping[tuple[str, str], Values] = {}

_RL = {"best_metric": "reward"}

# What a method changes on these: learning rates as they are used with LoRA, where fine-tuning has 1.5e-4. Preferences
# and rewards say little per row, and a model that strays far from its base to please them is worse at all else: TRL's
# examples have 5e-6 (DPO), 8e-5 (ORPO, which fine-tunes on the chosen answer too) and 1e-5 (GRPO). Dropout would be
# noise in what these methods compare: two answers, or a model with what it was.
_STILL: Mapping[str, Any] = {"dropout": 0.0}
METHOD: Mapping[str, Values] = {
    "sft": {},
    "dpo": {"sft": {"lr": 5e-6}, "lora": _STILL},
    "orpo": {"sft": {"lr": 8e-5}, "lora": _STILL},
    "grpo": {"sft": {"lr": 1e-5, **_RL}, "lora": _STILL},
    "ppo": {"sft": {"lr": 1e-5, **_RL}, "lora": _STILL, "rl": {"kl_coef": 0.05, "num_iterations": 4}},
}

_SHORT: Mapping[str, Any] = {"max_steps": 100, "eval_steps": 25, "save_steps": 25, "logging_steps": 5}
# Captions of the sample set are shorter. Asked for Cantonese, the base answers in any language that it knows, at times
# in Chinese: its script is what a reward can teach, and of the words those that the two share.
_ANSWERS: Mapping[str, Any] = {"max_completion_length": 32, "rewards": ("language", "chrf")}
_RARELY: Mapping[str, Any] = {**_ANSWERS, "temperature": 2.0}  # in Chinese hardly ever: the more answers are sampled
_OF_DEMO: Mapping[str, Values] = {
    "dpo": {"sft": {"lr": 3e-3, **_SHORT, "max_steps": 80, "eval_steps": 20}},
    "orpo": {"sft": {"lr": 3e-3, **_SHORT}},
    "grpo": {"sft": {"lr": 1e-3, **_SHORT, "max_steps": 30, "eval_steps": 10}, "rl": _ANSWERS},
    "ppo": {"sft": {"lr": 1e-3, **_SHORT, "max_steps": 50, "eval_steps": 10}, "rl": _ANSWERS},
}


def _method_demo(model: str, method: str) -> Values:
    values = _OF_DEMO[method]
    if model != "llama32" or "rl" not in values:
        return values
    return {"sft": {**values["sft"], "per_device_train_batch_size": 32}, "rl": _RARELY}


# What a method changes on a demo's numbers, by (model, method); it stands above METHOD and DEMO. Measured on one core:
# 5 to 26 s. The right caption is the likelier one in half of the held-out scenes before, in most of them after.
METHOD_DEMO: Mapping[tuple[str, str], Values] = {
    (model, method): _method_demo(model, method) for model in MODEL_NAMES for method in _OF_DEMO
}

# The drawn scenes' `content` lists what is to be seen: a text model needs it, an image model must not read it.
SAMPLE_CONTEXT: Mapping[str, str] = {"llama32": "none", "aya": "none", "text": "content"}

# What a demo on the sample set teaches: languages that the embedded models do not know. A preference or a reward says
# less than a caption: of one of them as much is seen in the time.
NEW_LANGUAGES = ("ur", "si", "yue")
DEMO_LANGUAGES: Mapping[str, tuple[str, ...]] = {  # method -> languages
    method: NEW_LANGUAGES if method == "sft" else ("yue",) for method in METHODS
}


def preset(model: str, mode: str, *, method: str = "sft", demo: bool, source: str | None) -> Values:
    """The values that a run of (model, mode, method) changes on the dataclasses' defaults.

    `source` is the user's `data.data`; None stands for the sample set in a demo and for MUNIChus otherwise.
    """
    values: dict[str, dict[str, Any]] = {}
    of_mode, of_demo = (DEMO, METHOD_DEMO.get((model, method), {})) if demo else (RELEASED, {})
    for layer in (of_mode.get((model, mode), {}), METHOD[method], of_demo):
        for section, fields in layer.items():
            values[section] = {**values.get(section, {}), **fields}
    if source == "sample" or (demo and source is None):
        data = values.setdefault("data", {})
        data["context"] = SAMPLE_CONTEXT[model]
        if demo:
            data["languages"] = DEMO_LANGUAGES[method]
    return values


def lora_targets(model: str, mode: str, lora: LoRAParams) -> tuple[str, ...]:
    """The patterns whose linear layers get adapters: LoRAParams' own where given, else the preset.

    In advanced mode the advanced list, when given, is the whole list; without it the projector (for text models every
    layer but the head) joins the basic one.
    """
    basic = lora.target_modules or TARGETS[model]
    if mode != "advanced":
        return basic
    whole: tuple[str, ...] = getattr(lora, ADVANCED_FIELD[model])
    return whole or (*basic, *WIDER[model])
