"""A request's body: counted as it comes, and read as JSON that means one thing alone.

Refused besides what is no JSON: numbers that are not finite or have more than 64 bits, names that are there twice,
texts that UTF-8 cannot hold, nesting past `MOST_DEPTH`, and more lists and objects than `MOST_PARTS`.
"""

import asyncio
import json
import math
from itertools import chain
from typing import Any, NoReturn

from starlette.requests import Request

from inft.client.errors import InvalidRequest, PayloadTooLarge, TimedOut, UnsupportedMediaType

MOST_DEPTH = 64  # lists and objects in each other
MOST_PARTS = 1_000_000  # lists and objects together: reading them takes many times the time of as many bytes of text
SLOWEST_BODY = 120.0  # seconds in which a body must have come
LARGEST_INT = 2**63 - 1


async def read_body(request: Request, *, limit: int) -> bytes:
    """Return the body. Errors: UnsupportedMediaType, PayloadTooLarge past `limit` bytes, TimedOut."""
    _require_json(request)
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(SLOWEST_BODY):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError as error:
        raise TimedOut(f"the body did not come within {SLOWEST_BODY:g} seconds: send it faster.") from error
    return bytes(body)


def refuse_body(request: Request) -> None:
    """InvalidRequest where a request that takes no body has one."""
    if request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers:
        raise InvalidRequest("this request takes no body: leave it out.")


def parse_json(body: bytes) -> Any:
    """Return the plain values of a JSON text. Errors: InvalidRequest with the position or the field."""
    if body.count(b"[") + body.count(b"{") > MOST_PARTS:  # those within texts count too, and are few
        raise InvalidRequest(f"the body has more than {MOST_PARTS} lists and objects: send smaller batches.")
    try:
        values = _DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: byte {error.start} begins no character.") from error
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error.msg} at character {error.pos}.") from error
    except RecursionError as error:
        raise _too_deep() from error
    except InvalidRequest:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise _too_many_bits() from error
    _require_plain(values)
    return values


def _require_json(request: Request) -> None:
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    if kind.strip().lower() != "application/json" or charset not in ("", "utf-8"):
        raise UnsupportedMediaType("the body must be JSON in UTF-8: send the header Content-Type: application/json.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("a compressed body is not taken: leave Content-Encoding out.")


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body has more than the {limit} bytes allowed: send smaller batches.", limit=limit)


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"the body has more than {MOST_DEPTH} lists and objects in each other: send it flatter.")


def _too_many_bits() -> InvalidRequest:
    return InvalidRequest("the body has a whole number of more than 64 bits: send smaller numbers.")


def _not_finite() -> InvalidRequest:
    return InvalidRequest("the body has a number that is NaN or infinite: send finite numbers.")


def _refuse_constant(name: str) -> NoReturn:
    raise _not_finite()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"the body has {twice!r:.60} twice in one object: give it once.")
    return found


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique)


def _require_plain(root: Any) -> None:
    """Level by level, and a list at a time: most of a large body are lists of numbers."""
    level: list[Any] = [[root]]
    for _ in range(MOST_DEPTH + 1):
        level = [inner for values in level for inner in _checked_items(values)]
        if not level:
            return
    raise _too_deep()


def _checked_items(values: list[Any] | dict[str, Any]) -> list[Any]:
    """Check what stands right in a list or an object, and return the lists and objects in it."""
    items = values if isinstance(values, list) else list(values.values())
    kinds = set(map(type, items))
    if int in kinds:
        whole = items if len(kinds) == 1 else [item for item in items if type(item) is int]
        if not -LARGEST_INT <= min(whole) <= max(whole) <= LARGEST_INT:
            raise _too_many_bits()
    if float in kinds and not all(map(math.isfinite, [item for item in items if type(item) is float])):
        raise _not_finite()
    texts = [item for item in items if type(item) is str] if str in kinds else []
    for text in chain(texts, values if isinstance(values, dict) else ()):
        if not text.isascii():
            _require_utf8(text)
    return [item for item in items if isinstance(item, list | dict)] if kinds & {list, dict} else []


def _require_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            "the body has half a surrogate pair (\\ud800 to \\udfff): send whole characters."
        ) from error
