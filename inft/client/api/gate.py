"""What every request passes before its route: an id, the host or the key, the limits; and what becomes of faults."""

import logging
import re
import uuid
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inft.client.api.auth import LOCAL, bearer_tenant, require_local_host, require_tenant
from inft.client.api.errors import envelope
from inft.client.api.service import Service
from inft.client.errors import ClientError, InternalError, RateLimited, Unauthorized

OPEN_PATHS = ("/v1/health", "/openapi.json")  # say nothing of tenants
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
logger = logging.getLogger(__name__)


class Gate:
    """ASGI middleware; sets `request.state.tenant` and `request.state.request_id`."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._limited: set[str] = set()  # tenants whose last request was over the limit: one entry of the log tells

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"], state["tenant"] = request_id, None
        answer = _Answer(send, request_id)
        try:
            state["tenant"] = await self._admitted(scope, request_id)
            await self._app(scope, receive, answer)
        except ClientError as error:
            await envelope(error.as_dict(), status=error.status, request_id=request_id)(scope, receive, answer)
        except Exception:  # a fault of ours: said in the log, and to the caller only that there was one
            logger.exception("request %s failed", request_id)
            if answer.begun:
                raise  # the connection is cut, so that half an answer is not taken for a whole one
            fault = InternalError("the service failed; its log has the request's id.")
            await envelope(fault.as_dict(), status=fault.status, request_id=request_id)(scope, receive, answer)

    async def _admitted(self, scope: Scope, request_id: str) -> str | None:
        """The tenant, None for a path that needs none. Errors: Unauthorized, Forbidden, RateLimited."""
        service, headers = self._service, scope["headers"]
        address = (scope.get("client") or ("unknown",))[0]
        if service.keys is None:
            try:
                require_local_host(headers)
            except ClientError:
                _require_token(service, address)
                raise
        if scope["path"] in OPEN_PATHS:
            _require_token(service, address)
            return None
        tenant = LOCAL
        if service.keys is not None:
            try:
                tenant = bearer_tenant(service.keys, headers)
            except Unauthorized:
                _require_token(service, address)
                raise
        await self._require_within_limit(tenant, scope, request_id)
        try:
            require_tenant(tenant, headers)
        except ClientError as error:
            await service.record_refusal(tenant, "request", scope["path"], error, request_id)
            raise
        return tenant

    async def _require_within_limit(self, tenant: str, scope: Scope, request_id: str) -> None:
        seconds = self._service.tenants.take(tenant)
        if not seconds:
            self._limited.discard(tenant)
            return
        error = _too_many(seconds)
        if tenant not in self._limited:
            self._limited.add(tenant)
            await self._service.record_refusal(tenant, "request", scope["path"], error, request_id)
        raise error


class _Answer:
    """The way back, which adds the headers that every answer has."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id, self.begun = send, request_id, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self._request_id
            headers["Cache-Control"] = "no-store"
            headers["X-Content-Type-Options"] = "nosniff"
        await self._send(message)


def _request_id(scope: Scope) -> str:
    """The caller's X-Request-Id where it is plain, else a new one."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return str(given[0].decode("ascii"))
    return uuid.uuid4().hex


def _require_token(service: Service, address: str) -> None:
    if seconds := service.addresses.take(address):
        raise _too_many(seconds)


def _too_many(seconds: float) -> RateLimited:
    return RateLimited("too many requests: wait, or send fewer and larger ones.", retry_after=round(seconds, 3))
