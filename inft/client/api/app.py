"""The service as an ASGI application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from inft.client.api.auth import Keys
from inft.client.api.errors import envelope, of_http, of_validation
from inft.client.api.gate import Gate
from inft.client.api.routes import router
from inft.client.api.service import Service
from inft.client.errors import ClientError, as_client_error
from params.client import ServeParams
from params.errors import UserError

if TYPE_CHECKING:
    from inft.client.engine import Engine


def create_app(engine: "Engine", params: ServeParams | None = None, *, keys: Keys | None = None) -> FastAPI:
    """Return the application; the engine stays the caller's to close, after the application has ended.

    The engine's `losses` and `any_model` say what callers may have imported and loaded: list the former, turn the
    latter off.

    Without keys there is one tenant, "local", and only requests to this machine by its own names are answered.
    """
    service = Service(engine, params or ServeParams(), keys)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="inft training client",
        summary="Fine-tuning driven step by step: forward_backward, optim_step, sample, save_state, load_state.",
        version=version("inft"),
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # a redirect would be an answer that the description does not know
        lifespan=lifespan,
    )
    app.state.service = service
    app.include_router(router)
    app.add_middleware(Gate, service=service)
    app.add_exception_handler(ClientError, _refused)
    app.add_exception_handler(UserError, _refused)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(ClientDisconnect, _gone)
    return app


async def _refused(request: Request, problem: Exception) -> Response:
    """The answer for a refused request, which the tenant's audit log keeps."""
    error, allow = _client_error(problem)
    service: Service = request.app.state.service
    tenant, request_id = request.state.tenant, request.state.request_id
    if tenant is not None:
        action = getattr(request.scope.get("route"), "name", None) or "request"
        await service.record_refusal(tenant, action, request.url.path, error, request_id)
    return envelope(error.as_dict(), status=error.status, request_id=request_id, allow=allow)


async def _gone(request: Request, problem: Exception) -> Response:
    """A client that went while it sent its body: nobody reads the answer."""
    return Response(status_code=400)


def _client_error(problem: Exception) -> tuple[ClientError, str | None]:
    """The error to tell, and the methods that a path takes where another was used."""
    if isinstance(problem, RequestValidationError):
        return of_validation(problem), None
    if isinstance(problem, HTTPException):
        return of_http(problem), (problem.headers or {}).get("Allow")
    return as_client_error(problem), None
