"""Where a ServiceClient finds its engine: from what it is given, then from the environment.

INFT_BASE_URL and INFT_API_KEY stand in for a URL and a key that are not given; settings of an engine in process, when
given, keep it in process whatever the environment says.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from params.client import EngineParams
from params.errors import UserError

URL_VARIABLE, KEY_VARIABLE = "INFT_BASE_URL", "INFT_API_KEY"
LOCAL_TENANT = "local"
_ENGINE_FIELDS = tuple(each.name for each in fields(EngineParams))
_OWN_FIELDS = ("base_url", "api_key", "tenant_id", "timeout")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A service's address, or the parameters of an engine in process."""

    base_url: str | None  # none: in process
    api_key: str | None = field(default=None, repr=False)
    tenant_id: str | None = None
    timeout: float | None = None  # seconds
    engine: EngineParams = field(default_factory=EngineParams)


def settings_of(config: Mapping[str, Any] | str | None, given: Mapping[str, Any]) -> Settings:
    """Return the settings that a configuration (None, a URL, a mapping), arguments and the environment make together.

    Errors: UserError for what is named twice, unknown or of another type, and for what belongs to the other place.
    """
    own, engine = _parts(config)
    for name, value in given.items():
        if value is not None and own.get(name) is not None:
            raise UserError(f"{name} is given both in config and as an argument: leave one out.")
    own |= {name: value for name, value in given.items() if value is not None}
    base_url, api_key = own.get("base_url"), own.get("api_key")
    if base_url is None and not engine:
        base_url = os.environ.get(URL_VARIABLE) or None
    if base_url is not None:
        api_key = api_key or os.environ.get(KEY_VARIABLE) or None
        if engine:
            raise UserError(f"{', '.join(engine)}: settings of an engine in process, beside a base_url: leave one out.")
    elif api_key is not None:
        raise UserError("api_key is for a service: give base_url too, or leave it out.")
    _check(base_url, api_key, own)
    return Settings(
        base_url=base_url,
        api_key=api_key,
        tenant_id=own.get("tenant_id"),
        timeout=own.get("timeout"),
        engine=_engine_params(engine),
    )


def _parts(config: Mapping[str, Any] | str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our own fields, and those of the engine."""
    if config is None:
        return {}, {}
    if isinstance(config, str):
        return {"base_url": config}, {}
    if not isinstance(config, Mapping):
        raise UserError(f"config is {type(config).__name__}: give a URL, or a mapping such as {{'state_dir': ...}}.")
    own = {name: value for name, value in config.items() if name in _OWN_FIELDS and value is not None}
    return own, {name: value for name, value in config.items() if name not in _OWN_FIELDS}


def _engine_params(values: Mapping[str, Any]) -> EngineParams:
    if not values:
        return EngineParams()
    from params.client_resolve import ENGINE, flat_params  # brings pydantic, which a service's address does not need

    unknown = [name for name in values if name not in _ENGINE_FIELDS]
    if unknown:
        known = ", ".join((*_OWN_FIELDS, *_ENGINE_FIELDS))
        raise UserError(f"config: {', '.join(map(repr, unknown))} is not known; it takes {known}.")
    return flat_params(ENGINE, EngineParams, {name: _path_texts(value) for name, value in values.items()})


def _path_texts(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {name: _path_texts(item) for name, item in value.items()}
    return value


def _check(base_url: Any, api_key: Any, own: Mapping[str, Any]) -> None:
    for name, value in (("base_url", base_url), ("api_key", api_key), ("tenant_id", own.get("tenant_id"))):
        if value is not None and (not isinstance(value, str) or not value):
            raise UserError(f"{name} is {type(value).__name__ if value != '' else 'empty'}: give a text.")
    # Such as the line end of a file that was read; the key itself is not for a message.
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise UserError("api_key holds a space, a line end or a sign beyond ASCII: give the key alone.")
    tenant_id = own.get("tenant_id")
    if tenant_id is not None and not (tenant_id.isascii() and tenant_id.isprintable()):
        raise UserError("tenant_id holds a line end or a sign beyond ASCII: give its name alone.")
    timeout = own.get("timeout")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0):
        raise UserError(f"timeout is {timeout!r}: give seconds above 0, or leave it out.")
