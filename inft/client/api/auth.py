"""Who asks: tenants by their keys, or without keys the one tenant of this machine."""

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from inft.client.errors import Forbidden, Unauthorized
from params.client import MOST_NAME
from params.errors import UserError

LOCAL = "local"  # the tenant of a service without keys
SHORTEST_KEY = 16  # characters
Header = tuple[bytes, bytes]
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:]+)(?::\d+)?")


class _Key(NamedTuple):
    digest: bytes
    tenant: str
    line: int


class Keys:
    """The tenants' keys, kept as their SHA-256."""

    def __init__(self, keys: Sequence[_Key]) -> None:
        self._keys = tuple(keys)

    @property
    def tenants(self) -> tuple[str, ...]:
        """The names, in the order of the file."""
        return tuple(dict.fromkeys(key.tenant for key in self._keys))

    def tenant_of(self, key: bytes) -> str | None:
        """Return the tenant of a key, or None; takes as long for every key, known or not."""
        digest, found = _digest(key), None
        for known in self._keys:
            if hmac.compare_digest(known.digest, digest):
                found = known.tenant
        return found


def read_keys(path: Path) -> Keys:
    """Return the keys of a file: lines of "tenant key", and comments that begin with #.

    Errors: UserError that names the file and the line, never a key: others can read the file, a line is not a tenant
    and a key, a key is short, is not plain text or is there twice, there is no key at all.
    """
    keys: dict[bytes, _Key] = {}
    for number, line in enumerate(_private_text(path).splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key = _key(line.split(), number, path)
        if key.digest in keys:
            raise UserError(f"{path}: lines {keys[key.digest].line} and {number} have the same key: give each its own.")
        keys[key.digest] = key
    if not keys:
        raise UserError(f"{path} has no key: add lines of a tenant's name and its key.")
    return Keys(tuple(keys.values()))


def bearer_tenant(keys: Keys, headers: Iterable[Header]) -> str:
    """Return the tenant whose key a request carries as `Authorization: Bearer KEY`. Errors: Unauthorized."""
    given = _values(headers, b"authorization")
    if not given:
        raise Unauthorized("no key: send the header Authorization: Bearer KEY.")
    scheme, _, key = given[0].partition(b" ")
    if len(given) > 1 or scheme.lower() != b"bearer" or not key.strip():
        raise Unauthorized("the key is not readable: send one header Authorization: Bearer KEY.")
    tenant = keys.tenant_of(key.strip())
    if tenant is None:
        raise Unauthorized("this key is not known here.")
    return tenant


def require_tenant(tenant: str, headers: Iterable[Header]) -> None:
    """Forbidden where the header X-Tenant-Id names another tenant than the key's."""
    for value in _values(headers, b"x-tenant-id"):
        if not hmac.compare_digest(value, tenant.encode()):
            raise Forbidden("X-Tenant-Id is not the tenant of this key: leave it out, or send that tenant's key.")


def require_local_host(headers: Iterable[Header]) -> None:
    """Forbidden unless the header Host names this machine: a web page may point a name of its own here (rebinding)."""
    hosts = _values(headers, b"host")
    name = _HOST.fullmatch(hosts[0].decode("latin-1")) if len(hosts) == 1 else None
    if name is None or not is_loopback(name[1].strip("[]")):
        raise Forbidden("this service is for this machine alone: ask for it as localhost or 127.0.0.1.")


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine: localhost, or an address such as 127.0.0.1 and ::1."""
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host.lower() == "localhost"


def _values(headers: Iterable[Header], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key.lower() == name]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _key(words: list[str], number: int, path: Path) -> _Key:
    where = f"{path}, line {number}"
    if len(words) != 2:
        raise UserError(f"{where}: give a tenant's name and its key, with a space between.")
    tenant, key = words
    if len(tenant) > MOST_NAME or not tenant.isprintable():
        raise UserError(f"{where}: the tenant's name has more than {MOST_NAME} characters: choose a shorter one.")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{where}: the key has characters that are not ASCII: a header cannot carry them.")
    if len(key) < SHORTEST_KEY:
        raise UserError(
            f"{where}: the key of {tenant} has {len(key)} characters, and {SHORTEST_KEY} are needed: draw one with "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))'."
        )
    return _Key(_digest(key.encode()), tenant, number)


def _private_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise UserError(f"{path} can be read by others than its owner: chmod 600 {path}.")
            return file.read().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}): give the file of keys.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text in UTF-8: give lines of a tenant's name and its key.") from error
