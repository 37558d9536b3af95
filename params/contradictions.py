"""Parameters that are each right but cannot hold together, or that a run would ignore."""

import difflib
import re
from collections.abc import Mapping

from params.check import SECTIONS
from params.train import TrainParams

# Fields for evaluation, which `inft train` does not read.
FOR_EVALUATION = (
    "basic.metric_dir",
    "basic.gen_do_sample",
    "basic.gen_top_p",
    "basic.gen_temperature",
    "basic.gen_num_beams",
    "data.cjk_tokens",
)


def contradictions(params: TrainParams) -> list[str]:
    """One message per contradiction, each with its remedy; empty when the parameters agree."""
    return [*_data(params), *_model(params), *_unread(params)]


def _data(params: TrainParams) -> list[str]:
    data, problems = params.data, []
    unnamed = [code for code in data.languages if code not in data.language_names]
    if not data.languages:
        problems.append("data.languages is empty: name at least one language, such as --languages en,ur.")
    if len(set(data.languages)) < len(data.languages):
        problems.append(f"data.languages names a language twice: {', '.join(data.languages)}.")
    if unnamed:
        code = _code_of(unnamed[0], data.language_names)
        remedy = f"did you mean {code}?" if code else f"add it: --set data.language_names.{unnamed[0]}=NAME."
        problems.append(f"data.languages: {', '.join(unnamed)} has no name for the prompt; {remedy}")
    if data.batch_size != 1:
        problems.append(
            "data.batch_size belongs to build_processed_dataset and has no effect here; "
            "set sft.per_device_train_batch_size."
        )
    return problems


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


def _unread(params: TrainParams) -> list[str]:
    problems = [
        f"{key} has no effect in inft train, which does not evaluate captions: leave it out."
        for key in FOR_EVALUATION
        if _is_changed(params, key)
    ]
    if _is_changed(params, "basic.gen_max_new_tokens") and not (params.demo and params.data.data == "sample"):
        problems.append(
            "basic.gen_max_new_tokens has no effect: only a demo on the sample set generates captions. Leave it out."
        )
    return problems


def _is_changed(params: TrainParams, key: str) -> bool:
    """Whether a field has another value than its default."""
    section, _, name = key.partition(".")
    return bool(getattr(getattr(params, section), name) != getattr(SECTIONS[section](), name))
