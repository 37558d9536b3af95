"""What libraries say that a user can do nothing about."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Missing optional kernels and kernels of other GPUs, told at every import.
TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")
_DEPRECATIONS = r"(transformers|peft|trl|accelerate|torch)\..*"


def quiet_libraries(*, progress_bars: bool) -> None:
    """Silence deprecations between libraries and, unless ``progress_bars``, the bars of loaded weights."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module=_DEPRECATIONS)
    if not progress_bars:
        transformers_logging.disable_progress_bar()


@contextmanager
def quietly(*, progress_bars: bool = False) -> Iterator[None]:
    """Within it libraries say nothing below an error, and no bars unless ``progress_bars``; then all is as before.

    For use inside another program, whose logging and warnings are its own.
    """
    from transformers.utils import logging as transformers_logging

    levels = {name: logging.getLogger(name).level for name in TALKATIVE}
    bars = transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=_DEPRECATIONS)
        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        if not progress_bars:
            transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()
