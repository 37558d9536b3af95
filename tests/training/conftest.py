"""A tiny text model with its tokenizer, a jsonl data set for it, and the parameters of runs on both."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from params import BasicParams, LoRAParams, MUNIChusLoadConfig, QLoRAParams, SFTParams, TrainParams

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_text_dir(
    tmp_path_factory: pytest.TempPathFactory, make_byte_tokenizer: Callable[[str], PreTrainedTokenizerFast]
) -> Path:
    """A saved LlamaForCausalLM of 35,000 random weights and a byte tokenizer."""
    path = tmp_path_factory.mktemp("tiny_text")
    make_byte_tokenizer(TEMPLATE).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def captions_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl with 40 rows and validation.jsonl with 13, in two languages, answers of 3 to 13 letters."""
    path = tmp_path_factory.mktemp("captions")
    draw = random.Random(0)
    for split, count in (("train", 40), ("validation", 13)):
        rows = [
            {
                "title": f"{split} {i}",
                "content": "".join(draw.choices("abcdef ", k=20)).strip(),
                "caption": "".join(draw.choices("xyz", k=draw.randrange(3, 14))),
                "language": ("en", "si")[i % 2],
            }
            for i in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (path / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return path


def run_params(root: Path, model: Path, data: Path, **changes: Any) -> TrainParams:
    """Eight steps on the tiny model, written below ``root``; ``changes`` are dotted with two underscores."""
    params = TrainParams(
        model="text",
        output_dir=str(root / "run"),
        best_model_dir=str(root / "run" / "best"),
        model_name=str(model),
        processor_name=str(model),
        task="text_basic",
        basic=BasicParams(dtype="float32", max_length=256, logs_dir=str(root / "logs"), num_threads=1),
        data=MUNIChusLoadConfig(data=str(data), languages=("en", "si"), num_workers=0),
        qlora=QLoRAParams(load_in_4bit=False),
        lora=LoRAParams(r=4, alpha=8, dropout=0.1),
        sft=SFTParams(
            max_steps=8,
            lr=1e-2,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=5,
            gradient_accumulation_steps=2,
            gradient_checkpointing=False,
            logging_steps=1,
            save_steps=3,
            eval_steps=2,
            early_stopping_patience=0,
        ),
    )
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            part = dataclasses.replace(getattr(params, section), **{field: value})
            params = dataclasses.replace(params, **{section: part})
        else:
            params = dataclasses.replace(params, **{name: value})
    return params


@pytest.fixture(scope="session")
def params_below(tiny_text_dir: Path, captions_dir: Path) -> Callable[..., TrainParams]:
    """run_params below a directory, for fixtures that tests share."""

    def make(root: Path, **changes: Any) -> TrainParams:
        return run_params(root, tiny_text_dir, captions_dir, **changes)

    return make


@pytest.fixture
def make_params(tmp_path: Path, tiny_text_dir: Path, captions_dir: Path) -> Callable[..., TrainParams]:
    """run_params below tmp_path, or below ``root``."""

    def make(root: Path | None = None, **changes: Any) -> TrainParams:
        return run_params(root or tmp_path, tiny_text_dir, captions_dir, **changes)

    return make


@pytest.fixture(scope="session")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four preferences in two languages, and seven held out, whose answers differ in length."""
    path = tmp_path_factory.mktemp("preferences")
    for split, count in (("train", 24), ("validation", 7)):
        rows = [
            {
                "title": f"{split} {i}",
                "content": "abc" * (i % 3 + 1),
                "chosen": "xy" * (i % 4 + 1),
                "rejected": "z" * (i % 5 + 2),
                "language": ("en", "si")[i % 2],
            }
            for i in range(count)
        ]
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def of(make_params: Callable[..., TrainParams], preferences: Path) -> Callable[..., TrainParams]:
    """of(method, root=None, **changes): the parameters of a short run."""

    def make(method: str, root: Path | None = None, **changes: Any) -> TrainParams:
        own: dict[str, Any] = {"method": method, "lora__dropout": 0.0}
        if method in ("dpo", "orpo"):
            own["data__data"] = str(preferences)
        else:
            own |= {"sft__best_metric": "reward", "rl__max_completion_length": 6, "rl__num_generations": 4}
            own["rl__rewards"] = ("length",)
        if method == "ppo":
            own |= {"rl__num_iterations": 2, "rl__kl_coef": 0.05}
        return make_params(root, **{**own, **changes})

    return make
