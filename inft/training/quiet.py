"""What libraries say that a user can do nothing about."""

import warnings

from transformers.utils import logging


def quiet_libraries(*, progress_bars: bool) -> None:
    """Silence deprecations between libraries and, unless ``progress_bars``, the bars of loaded weights."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl|accelerate|torch)\..*")
    if not progress_bars:
        logging.disable_progress_bar()
