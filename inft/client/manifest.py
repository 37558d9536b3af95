"""The hash of a checkpoint: over its state.json, and so over the hashes of all files. Imports no torch."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def content_hash(stored: Mapping[str, Any]) -> str:
    """Return the SHA-256 of state.json without its own "content_hash", as JSON with sorted keys and no spaces."""
    text = json.dumps(stored, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
