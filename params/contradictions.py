"""Parameters that are each right but cannot hold together, or that a run would ignore."""

import difflib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from params.check import SECTIONS
from params.craft import CRAFT_PRESETS, LEARNABLE_TEMPERATURE, CraftParams
from params.methods import FOR_SFT, method_problems
from params.munichus import MUNIChusLoadConfig
from params.train import TrainParams

# Fields for evaluation, which `inft train` does not read, and why it does not.
FOR_EVALUATION = {
    "basic.metric_dir": "which writes no tables",
    **dict.fromkeys(
        ("basic.gen_do_sample", "basic.gen_top_p", "basic.gen_temperature", "basic.gen_num_beams"),
        "whose captions are greedy",
    ),
}

# Fields of CRAFT that only the mixing of two data sets reads: self-alignment takes both losses from one batch.
FOR_PAIRS = (
    "beta",
    "beta_mode",
    "length_strategy",
    "contrastive_batch_size",
    "use_gradcache",
    "gradcache_chunk_size",
)
# Fields of CRAFT that are read under some values of another field only.
CRAFT_DEPENDS: Mapping[str, tuple[str, Sequence[Any]]] = {
    "negative_queue_size": ("negative_strategy", ["queue"]),
    "gradcache_chunk_size": ("use_gradcache", [True]),
    "gradnorm_alpha": ("gradient_balancing", ["gradnorm"]),
    "loss_scale_momentum": ("gradient_balancing", ["loss_scale"]),
    "balancing_max_ratio": ("gradient_balancing", ["loss_scale", "gradnorm"]),
    "gradient_clip_value": ("gradient_clip_per_task", [True]),
}


def contradictions(params: TrainParams, told: Collection[str] = ()) -> list[str]:
    """One message per contradiction, each with its remedy; empty when the parameters agree.

    ``told`` are the fields that the command line names, whatever it says of them.
    """
    return [
        *language_problems(params.data),
        *_data(params),
        *_model(params),
        *_craft(params),
        *_best_metric(params),
        *method_problems(params, told),
        *_unread(params),
    ]


def language_problems(data: MUNIChusLoadConfig) -> list[str]:
    """What is wrong with the languages that are asked for."""
    problems = []
    unnamed = [code for code in data.languages if code not in data.language_names]
    if not data.languages:
        problems.append("data.languages is empty: name at least one language, such as --languages en,ur.")
    if len(set(data.languages)) < len(data.languages):
        problems.append(f"data.languages names a language twice: {', '.join(data.languages)}.")
    if unnamed:
        code = _code_of(unnamed[0], data.language_names)
        remedy = f"did you mean {code}?" if code else f"add it: --set data.language_names.{unnamed[0]}=NAME."
        problems.append(f"data.languages: {', '.join(unnamed)} has no name for the prompt; {remedy}")
    return problems


def _data(params: TrainParams) -> list[str]:
    if params.data.batch_size == 1:
        return []
    return [
        "data.batch_size belongs to build_processed_dataset and has no effect here; "
        "set sft.per_device_train_batch_size."
    ]


def _code_of(word: str, names: Mapping[str, str]) -> str | None:
    """The code of the language that someone wrote out, in another case or with a typing error; None without one."""
    codes = {name.casefold(): code for code, name in names.items()} | {code.casefold(): code for code in names}
    near = difflib.get_close_matches(word.casefold(), codes, n=1, cutoff=0.75)
    return codes[near[0]] if near else None


def _model(params: TrainParams) -> list[str]:
    problems = []
    if not params.model_name and not params.demo:
        problems.append("the model name is empty: name a hub id or a local path with --model, or give --demo.")
    if params.qlora.quantize_vision and not params.qlora.load_in_4bit:
        problems.append("qlora.quantize_vision has no effect without 4 bit: drop it or set qlora.load_in_4bit=true.")
    if params.lora.init == "pissa" and params.qlora.load_in_4bit:
        problems.append("lora.init=pissa takes the principal components of unquantised weights: add --no-quantize.")
    dtype, compute = params.basic.dtype, params.qlora.bnb_4bit_compute_dtype
    if params.qlora.load_in_4bit and {dtype, compute} == {"bfloat16", "float16"}:
        problems.append(
            f"basic.dtype={dtype} and qlora.bnb_4bit_compute_dtype={compute} mix two 16-bit formats in one model: give "
            f"--set basic.dtype={compute} or --set qlora.bnb_4bit_compute_dtype={dtype}."
        )
    if not re.fullmatch(r"[\w.-]+", params.task):
        problems.append(
            f"--task {params.task!r} names the log file: letters, digits, dots, dashes and underscores only."
        )
    return problems


def _craft(params: TrainParams) -> list[str]:
    craft, problems = params.craft, []
    chosen = _chosen(craft)
    if not craft.enabled:
        if chosen:
            verb = "has" if len(chosen) == 1 else "have"
            problems.append(f"{_named(chosen)} {verb} no effect without CRAFT: add --craft, or leave out what sets it.")
        return problems
    if craft.pooling == "cls":
        problems.append(
            "craft.pooling=cls takes the first token, which in these models has seen no other, so that no text could "
            "be told from another: set last_token, mean or weighted_mean, or leave it out."
        )
    if craft.alpha == 1:
        problems.append(
            "craft.alpha=1 gives the contrastive loss no weight: set a smaller one, such as 0.6, or turn CRAFT off "
            "with --no-craft."
        )
    orders = params.method == "sft"  # of batches of pairs among the rows'; method_problems tells it of the others
    for_pairs = [name for name in FOR_PAIRS if name in chosen and (orders or name not in FOR_SFT)]
    if for_pairs and not craft.pairs:
        verb = "is" if len(for_pairs) == 1 else "are"
        problems.append(
            f"{_named(for_pairs)} {verb} read with pairs only, and without them each row is contrasted with its own "
            "answer: add --craft-pairs translations (or a file of pairs), or leave out what sets it."
        )
    for name, (field, values) in CRAFT_DEPENDS.items():
        told_already = name in for_pairs and not craft.pairs
        if name in chosen and not told_already and getattr(craft, field) not in values:
            needed = " or ".join(str(value).lower() if isinstance(value, bool) else value for value in values)
            problems.append(f"craft.{name} has no effect without craft.{field}={needed}: set that, or leave it out.")
    if craft.learnable_temperature and not LEARNABLE_TEMPERATURE.holds(craft.temperature):
        problems.append(
            f"craft.temperature must be {LEARNABLE_TEMPERATURE.words} with craft.learnable_temperature=true, which "
            f"keeps it there, got {craft.temperature:g}: set such a one, or keep it fixed with --set "
            "craft.learnable_temperature=false."
        )
    found = craft.beta_mode == "auto" or craft.length_strategy == "auto_beta"  # then the batches make beta
    if orders and craft.pairs and "beta" in chosen and found:
        field = "beta_mode=fixed" if craft.beta_mode == "auto" else "length_strategy=oversample"
        problems.append(
            f"craft.beta has no effect, since craft.beta_mode={craft.beta_mode} and craft.length_strategy="
            f"{craft.length_strategy} find it from the batches: set craft.{field} too, or leave it out."
        )
    elif orders and craft.pairs and craft.beta in (0, 1) and not found:
        problems.append(
            f"craft.beta={craft.beta:g} leaves no micro-batch for "
            f"{'fine-tuning' if craft.beta == 0 else 'the pairs'}: set a share between 0 and 1, or turn CRAFT off with "
            "--no-craft."
        )
    return [*problems, *_no_negatives(params)]


def _chosen(craft: CraftParams) -> list[str]:
    """The fields of CRAFT with a value that is neither the default nor that of the chosen preset."""
    default = asdict(CraftParams())
    of_preset: Mapping[str, Any] = CRAFT_PRESETS.get(craft.preset or "", {})
    return [
        name
        for name, value in asdict(craft).items()
        if name != "enabled" and value not in (default[name], of_preset.get(name, default[name]))
    ]


def _no_negatives(params: TrainParams) -> list[str]:
    """What is wrong when no anchor has another row to be told apart from; rows of other processes are such."""
    craft, rows = params.craft, params.sft.per_device_train_batch_size
    field = "sft.per_device_train_batch_size"
    if craft.pairs and craft.contrastive_batch_size is not None:
        rows, field = craft.contrastive_batch_size, "craft.contrastive_batch_size"
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun and accelerate launch set it
    if craft.negative_strategy == "queue":
        return []
    if rows * processes > 1:
        return _one_prompt(params, processes)
    lower = " (with fewer sft.gradient_accumulation_steps a step has as many rows as before)" * (not craft.pairs)
    return [
        f"CRAFT has no negatives: with {field}=1 each row stands alone in its batch. Raise it{lower}, take negatives "
        "from earlier batches with --set craft.negative_strategy=queue, or turn CRAFT off with --no-craft."
    ]


def _one_prompt(params: TrainParams, processes: int) -> list[str]:
    """What is wrong when all answers of a step are to one prompt: those are no negatives of each other."""
    sft, answers = params.sft, params.rl.num_generations
    step = sft.per_device_train_batch_size * sft.gradient_accumulation_steps * processes
    if params.method != "grpo" or params.craft.pairs or step > answers:
        return []
    return [
        f"CRAFT has no negatives: the {step} answers of an optimizer step are all to one prompt (rl.num_generations="
        f"{answers}), and those are no negatives of each other. Raise sft.gradient_accumulation_steps or "
        "sft.per_device_train_batch_size, lower rl.num_generations, take negatives from earlier steps with --set "
        "craft.negative_strategy=queue, add --craft-pairs, or turn CRAFT off with --no-craft."
    ]


def _named(fields: list[str]) -> str:
    return ", ".join(f"craft.{name}" for name in fields)


def _best_metric(params: TrainParams) -> list[str]:
    sft, problems = params.sft, []
    if sft.best_metric in ("loss", "reward"):
        return []
    if not sft.eval_captions:
        problems.append(
            f"sft.best_metric={sft.best_metric} is a figure of generated captions, and none are generated: add "
            "--eval-captions N, such as 64, or leave --best-metric out."
        )
    if not sft.load_best_model_at_end and not sft.early_stopping_patience:
        problems.append(
            f"sft.best_metric={sft.best_metric} has no effect: with sft.load_best_model_at_end=false and "
            "sft.early_stopping_patience=0 nothing is chosen by it. Set one of these, or leave --best-metric out."
        )
    return problems


def _unread(params: TrainParams) -> list[str]:
    problems = [
        f"{key} has no effect in inft train, {why}: leave it out."
        for key, why in FOR_EVALUATION.items()
        if _is_changed(params, key)
    ]
    captioned = params.sft.eval_captions > 0
    if _is_changed(params, "data.cjk_tokens") and not captioned:
        problems.append(
            "data.cjk_tokens has no effect in inft train without captions to score: add --eval-captions N, or leave it "
            "out."
        )
    shown = params.demo and params.data.data == "sample"
    if _is_changed(params, "basic.gen_max_new_tokens") and not captioned and not shown:
        problems.append(
            "basic.gen_max_new_tokens has no effect: only a demo on the sample set and --eval-captions generate "
            "captions. Add --eval-captions N, or leave it out."
        )
    return problems


def _is_changed(params: TrainParams, key: str) -> bool:
    """Whether a field has another value than its default."""
    section, _, name = key.partition(".")
    return bool(getattr(getattr(params, section), name) != getattr(SECTIONS[section](), name))
