"""Which of the requested languages a data set has, and what to say of one that it has not."""

import difflib
import re
from collections.abc import Collection

from params.errors import UserError
from params.munichus import LANGUAGE_NAMES, MUNIChusLoadConfig


def any_language_will_do(config: MUNIChusLoadConfig) -> bool:
    """Whether the languages are all, the default ten or all that have a name: some of them are then no mistake."""
    return config.languages in (tuple(LANGUAGE_NAMES), tuple(config.language_names))


def known_code(config: MUNIChusLoadConfig, code: str) -> str:
    """Return the configured code that this one spells in another case (``EN``), else the code itself; both stripped.

    A region (``en-US``) makes another code.
    """
    code = code.strip()
    if code in config.language_names:
        return code
    return next((known for known in config.language_names if known.casefold() == code.casefold()), code)


def available_languages(config: MUNIChusLoadConfig, available: Collection[str], *, source: str) -> list[str]:
    """Return the requested languages that are available, in the requested order.

    Errors: UserError when a requested one is missing (with the default, only when all of them are).
    """
    present = [language for language in config.languages if language in available]
    missing = [language for language in config.languages if language not in available]
    if missing and not (present and any_language_will_do(config)):
        raise missing_language(config, missing[0], available, source=source)
    return present


def missing_language(config: MUNIChusLoadConfig, missing: str, available: Collection[str], *, source: str) -> UserError:
    """Return the error of a language without rows, with the data's languages and the nearest of them."""
    names = {name.casefold(): code for code, name in config.language_names.items()}
    wanted = missing.strip().casefold()
    near = (
        [code for code in available if code == names.get(wanted)]
        or [code for code in sorted(available) if _without_region(code) == _without_region(wanted)]
        or difflib.get_close_matches(wanted, available, n=1)
    )
    hint = f" Did you mean {near[0]!r}?" if near else ""
    has = ", ".join(sorted(available)) or "none"
    return UserError(f"no rows in language {missing!r}: {source} has {has}.{hint} Choose with --languages.")


def _without_region(code: str) -> str:
    return re.split("[-_]", code.casefold())[0]
