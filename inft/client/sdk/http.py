"""A service elsewhere, over HTTP: each request is repeated until it is answered, and none is executed twice.

An operation carries its number, so that the service knows a repetition. A request that cannot be answered within the
time leaves open whether its number was used: the next one asks the service first.

Retried, with the pause the service names or one that doubles: failed connections, 429, 502, 503 and 504; not a client
that cannot be brought back, which is told at once.
"""

import json
import logging
import random
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from inft.client.errors import (
    ClientError,
    ClientUnavailable,
    Closed,
    InternalError,
    InvalidRequest,
    RateLimited,
    TimedOut,
    error_of,
)
from inft.client.sdk.archive import unpack
from inft.client.sdk.seeds import same_random
from inft.client.sdk.transport import FINISHED, Values, plain_id
from params.errors import UserError

if TYPE_CHECKING:
    import httpx

POLL = 30.0  # seconds that one long poll is held open; the service may answer sooner
CONNECT = 10.0  # seconds
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds
RETRIED = (429, 502, 503, 504)
JITTER = random.SystemRandom()  # leaves the numbers of Python's own random to the program
_log = logging.getLogger(__name__)


class _Numbers:
    """The number of the next operation of one client; None where only the service knows."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.next: int | None = None


_numbers: "weakref.WeakValueDictionary[tuple[str, str], _Numbers]" = weakref.WeakValueDictionary()
_numbers_lock = threading.Lock()


class HttpTransport:
    """One tenant's use of a service.

    `timeout` is the seconds for which a request is repeated before TimedOut.
    """

    def __init__(self, base_url: str, *, api_key: str | None, tenant_id: str | None, timeout: float) -> None:
        self._url, self._timeout = _checked_url(base_url), timeout
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = _connections(self._url, headers | ({"X-Tenant-Id": tenant_id} if tenant_id else {}))
        self._held: dict[str, _Numbers] = {}

    def __repr__(self) -> str:
        return f"at {self._url}"

    def create_client(self, config: Values) -> Values:
        """Return ClientInfo of a new training client."""
        return self._json("POST", "/v1/training_clients", body=config)

    def get_client(self, client_id: str) -> Values:
        """Return ClientInfo."""
        return self._json("GET", f"/v1/training_clients/{plain_id(client_id)}")

    def delete_client(self, client_id: str) -> None:
        """Delete a training client that has nothing open."""
        self._json("DELETE", f"/v1/training_clients/{plain_id(client_id)}")

    def list_clients(self) -> list[Values]:
        """Return ClientInfo of all training clients of this tenant."""
        return _rows(self._json("GET", "/v1/training_clients"), "training_clients")

    def submit(self, client_id: str, kind: str, payload: Values, *, loss: Callable[..., Any] | None = None) -> Values:
        """Return FutureInfo; the number is used up when the service has accepted it, not before.

        Errors: InvalidRequest for a loss that is a function.
        """
        if loss is not None:
            raise InvalidRequest(
                "loss: a function cannot be sent to a service: give a name, or module:function if the service allows "
                "it, or train in process with ServiceClient() without a URL."
            )
        numbers = self._numbers_of(client_id)
        with numbers.lock:
            if numbers.next is None:
                numbers.next = int(self.get_client(client_id)["next_seq"])
            seq, numbers.next = numbers.next, None  # None until it is answered: refused or lost, the service knows
            path = f"/v1/training_clients/{plain_id(client_id)}/{plain_id(kind)}?wait=0"
            info = self._json("POST", path, body={**payload, "seq": seq})
            numbers.next = seq + 1
            return info

    def future(self, future_id: str) -> Values:
        """Return FutureInfo as it is now."""
        return self._json("GET", f"/v1/futures/{plain_id(future_id)}")

    def wait(self, future_id: str, timeout: float | None) -> Values:
        """Return FutureInfo when the operation has finished, or after `timeout` seconds or one long poll."""
        seconds = POLL if timeout is None else min(POLL, timeout)
        path = f"/v1/futures/{plain_id(future_id)}/result?wait={seconds:g}"
        begun = time.monotonic()
        answer = self._send("GET", path, held_open=seconds, within=timeout)
        info = _parsed(answer) if answer.status_code < 400 else {}
        if "status" not in info:  # the status of what the operation failed with, or an error of asking
            info = self.future(future_id)
        if info["status"] not in FINISHED and time.monotonic() - begun < seconds / 2:
            time.sleep(min(FIRST_PAUSE, seconds))  # a service that does not hold the poll open
        return info

    def cancel(self, future_id: str) -> bool:
        """Return whether the operation had not begun and now never will."""
        return bool(self._json("POST", f"/v1/futures/{plain_id(future_id)}/cancel")["cancelled"])

    def audit_logs(self, after: int, limit: int) -> list[Values]:
        """Return entries of this tenant with numbers above `after`."""
        return _rows(self._json("GET", f"/v1/audit_logs?after={after}&limit={limit}"), "audit_logs")

    def pull(self, artifact_id: str, directory: Path) -> Mapping[str, Any]:
        """Fetch the files of a checkpoint into `directory`."""
        import httpx

        path = f"/v1/artifacts/{plain_id(artifact_id)}"
        info = self._json("GET", path)
        try:
            with self._http.stream("GET", f"{path}/content", timeout=self._timeout) as answer:
                if answer.status_code >= 400:
                    answer.read()
                    raise _error(answer)
                unpack(answer.iter_bytes(), directory)
        except httpx.TransportError as error:
            raise _unreachable(self._url, error) from error
        return info

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _numbers_of(self, client_id: str) -> _Numbers:
        # Held here too, since the table of all holds them weakly: it is for the handles of one client to share.
        with _numbers_lock:
            found = _numbers.get((self._url, client_id)) or _Numbers()
            _numbers[self._url, client_id] = self._held[client_id] = found
            return found

    def _json(self, method: str, path: str, *, body: Values | None = None) -> Any:
        answer = self._send(method, path, body=body)
        if answer.status_code >= 400:
            raise _error(answer)
        return _parsed(answer)

    def _send(
        self,
        method: str,
        path: str,
        *,
        body: Values | None = None,
        held_open: float = 0.0,
        within: float | None = None,
    ) -> "httpx.Response":
        """The answer, whatever it says but "later"; the same request, by its id, until `within` seconds are over."""
        import httpx

        if self._http.is_closed:
            raise Closed("this ServiceClient is closed: make another one.")
        headers = {"X-Request-Id": uuid.uuid4().hex} | ({} if body is None else {"Content-Type": "application/json"})
        content = None if body is None else _encoded(body)
        timeout = httpx.Timeout(self._timeout + held_open, connect=CONNECT)
        deadline = time.monotonic() + (self._timeout if within is None else within)
        pause, warned = FIRST_PAUSE, False
        while True:
            try:
                answer = self._http.request(method, path, content=content, headers=headers, timeout=timeout)
                if answer.status_code not in RETRIED:
                    return answer
                trouble = _error(answer)
                wanted = _retry_after(answer, trouble)
                if isinstance(trouble, RateLimited) and "retry_after" not in trouble.details:
                    raise trouble  # a limit that waiting does not lift
                if isinstance(trouble, ClientUnavailable):
                    raise trouble  # for its owner to decide about
            except httpx.TransportError as error:
                trouble, wanted = _unreachable(self._url, error), None
                if isinstance(error, httpx.ConnectError) and not warned:
                    _log.warning("%s It is tried again for %.0f s.", trouble, max(0.0, deadline - time.monotonic()))
                    warned = True
            # Jitter keeps many clients from coming back at the same moment.
            seconds = pause * JITTER.uniform(0.5, 1.0) if wanted is None else wanted
            if time.monotonic() + seconds > deadline:
                raise trouble
            time.sleep(seconds)
            pause = min(2 * pause, LONGEST_PAUSE)


def _checked_url(base_url: str) -> str:
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"base_url is {base_url!r}: give http://HOST:PORT or https://HOST.")
    if parts.username is not None or parts.password is not None:
        raise UserError("base_url holds a user name or a password: leave it out and give api_key.")
    if parts.query or parts.fragment:
        raise UserError("base_url has a part after ? or #: leave that out.")
    return base_url.rstrip("/")


def _connections(url: str, headers: Mapping[str, str]) -> "httpx.Client":
    try:
        with same_random():
            import httpx
    except ModuleNotFoundError as error:
        raise UserError("base_url needs httpx: pip install 'inft[client]'.") from error
    # A proxy of the environment is for the network, and knows nothing of this machine's loopback.
    return httpx.Client(base_url=url, headers=dict(headers), trust_env=not _loopback(str(urlsplit(url).hostname)))


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _encoded(body: Values) -> bytes:
    try:
        return json.dumps(body, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest("the request holds half of a surrogate pair: give whole characters.") from error
    except ValueError as error:
        raise InvalidRequest(f"the request holds what JSON cannot ({error}): give finite numbers.") from error


def _parsed(answer: "httpx.Response") -> Any:
    try:
        return answer.json()
    except ValueError as error:
        raise _not_ours(answer) from error


def _error(answer: "httpx.Response") -> ClientError:
    try:
        values = answer.json()["error"]
        return error_of(values)
    except (ValueError, KeyError, TypeError, AttributeError):
        return _not_ours(answer)


def _not_ours(answer: "httpx.Response") -> InternalError:
    return InternalError(
        f"{answer.request.method} {answer.request.url} answered {answer.status_code} {answer.reason_phrase} and no "
        "JSON of this service: is base_url that of `inft serve`?",
        status=answer.status_code,
    )


def _unreachable(url: str, error: Exception) -> TimedOut:
    import httpx

    said = f"{type(error).__name__}: {error}"
    if not isinstance(error, httpx.ConnectError):
        what = "did not answer in time"
    else:
        what = "refused the connection" if "refused" in said.lower() else "could not be reached"
    return TimedOut(f"{url} {what} ({said}). Is `inft serve` running there?")


def _retry_after(answer: "httpx.Response", error: ClientError) -> float | None:
    """Seconds; the service's own are finer than the header's whole ones."""
    try:
        return max(0.0, float(error.details.get("retry_after", answer.headers.get("Retry-After"))))
    except (TypeError, ValueError):
        return None


def _rows(values: Any, name: str) -> list[Values]:
    return list(values[name] if isinstance(values, dict) else values)
