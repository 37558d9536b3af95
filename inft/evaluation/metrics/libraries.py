"""The libraries that compute the metrics, imported when they are first needed."""

import warnings
from importlib import import_module
from types import ModuleType

from params.errors import UserError


def load_library(module: str) -> ModuleType:
    """Import a library by the name of its module; UserError with the remedy when it is not installed."""
    try:
        # jieba's old string literals and its look for pkg_resources would warn the user of nothing that he can mend.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"the metrics need {module.partition('.')[0]}, and {error.name} is not installed here: "
            "pip install 'inft[eval]'."
        ) from error
