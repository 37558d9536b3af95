"""The training client under the module name of its guide: everything that inft.client has, and nothing of its own."""

from typing import Any

import inft.client

__all__ = list(inft.client.__all__)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(inft.client, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
