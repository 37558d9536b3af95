"""Which weights a checkpoint holds, told in a second however large it is."""

import hashlib
from pathlib import Path

SAMPLED = 16  # numbers of each tensor


def weights_fingerprint(name: str) -> str | None:
    """Return a SHA-256 over some numbers of every tensor of a checkpoint; None where its files are not at hand.

    ``name`` is a directory, or a hub id that lies in the cache. Equal for the same weights under other tensor names, in
    other shards, with tied weights stored or not, and in bfloat16 or float32.
    """
    directory = _directory(name)
    files = (
        [] if directory is None else [f for f in directory.glob("*.safetensors") if not f.name.startswith("adapter")]
    )
    if not files:
        return None
    digests = {digest for file in files for digest in _digests(file)}
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _directory(name: str) -> Path | None:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors"], local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _digests(file: Path) -> set[str]:
    """A digest of each tensor: its shape, and numbers from its middle rounded to bfloat16."""
    import torch
    from safetensors import safe_open

    found = set()
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 -- not a mapping
            piece = tensors.get_slice(name)
            shape = piece.get_shape()
            middle = shape[0] // 2 if shape else 0
            numbers = (piece[middle : middle + 1] if shape else tensors.get_tensor(name)).flatten()[:SAMPLED]
            rounded = numbers.to(torch.bfloat16).view(torch.int16) if numbers.is_floating_point() else numbers
            found.add(hashlib.sha256(f"{shape} {rounded.tolist()}".encode()).hexdigest())
    return found
