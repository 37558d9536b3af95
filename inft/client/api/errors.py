"""Errors as the wire has them: {"error": {code, message, details, request_id}} and the status that goes with it."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from inft.client.errors import ClientError, InternalError, InvalidRequest, MethodNotAllowed, NotFound, error_of

MOST_PROBLEMS = 20  # of one request that are listed
MOST_NAME = 60  # characters of a field's name that are repeated
RETRY_AFTER = 1.0  # seconds, where an error that passes names none


class JSON(Response):
    """An answer in JSON; a number that is infinite or NaN is the text "inf", "-inf" or "nan"."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the text."""
        try:
            return _json(content)
        except ValueError:
            return _json(finite(content))


def envelope(error: Mapping[str, Any], *, status: int, request_id: str, allow: str | None = None) -> JSON:
    """Return the answer for {code, message, details}, with the headers that belong to its status."""
    headers = {}
    details = dict(error.get("details") or {})
    if status in (429, 503):
        headers["Retry-After"] = str(max(1, math.ceil(float(details.get("retry_after", RETRY_AFTER)))))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if allow is not None:
        headers["Allow"] = allow
    content = {"code": error["code"], "message": error["message"], "details": details, "request_id": request_id}
    return JSON({"error": content}, status_code=status, headers=headers)


def status_of(error: Mapping[str, Any]) -> int:
    """Return the HTTP status of {code, message, details} as the log keeps it."""
    return error_of(error).status


def of_validation(error: RequestValidationError) -> InvalidRequest:
    """Return what is wrong with each field, without the values that were sent."""
    problems = [_problem(found) for found in error.errors()[:MOST_PROBLEMS]]
    message = "; ".join(f"{problem['field']} {problem['message']}" for problem in problems)
    return InvalidRequest(f"{message}.", errors=problems)


def of_http(error: HTTPException) -> ClientError:
    """Return the error for a path or a method that does not exist."""
    if error.status_code == 404:
        return NotFound("there is no such path: /openapi.json lists them.")
    if error.status_code == 405:
        return MethodNotAllowed(f"this path takes {(error.headers or {}).get('Allow', 'another method')} alone.")
    return InvalidRequest(str(error.detail)) if error.status_code < 500 else InternalError(str(error.detail))


def finite(value: Any) -> Any:
    """Return plain values with the text "inf", "-inf" or "nan" for each number that JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    return value


def _problem(found: Mapping[str, Any]) -> dict[str, str]:
    place = [str(part)[:MOST_NAME] for part in found["loc"]]
    names = place[1:] or place  # without "body" or "query", unless that is all there is
    words = {"extra_forbidden": "is not known here", "missing": "is missing"}
    text = re.sub(r"^(Input|List|String|Dictionary) should", "should", str(found["msg"]))
    return {"field": ".".join(names), "message": words.get(str(found["type"]), text).rstrip(".")}


def _json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
