"""The paths of /v1. Each is thin: the body is checked, the engine is asked, its plain values are the answer."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Query, Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.responses import StreamingResponse

from inft.client.api import schemas
from inft.client.api.archives import Archive
from inft.client.api.bodies import parse_json, read_body, refuse_body
from inft.client.api.errors import JSON, envelope, status_of
from inft.client.api.service import FINISHED, Service, Values
from inft.client.errors import InvalidRequest, NotFound

Responses = dict[int | str, dict[str, Any]]
WAIT_S = 30.0  # seconds that sample, save_state and load_state wait for their result unless told otherwise
MOST_ENTRIES = 1000  # of the audit log in one answer
LARGE = 64 * 1024  # bytes of a body from which on it is read in a thread, so that others are answered meanwhile
NOT_FINISHED: Responses = {202: {"model": schemas.FutureInfo, "description": "It has not finished."}}
TAR: Responses = {200: {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}}}
REASONS = {
    401: "No key, or one that is not known.",
    403: "The key is another tenant's than the one named, or the host is not this machine.",
    404: "There is no such thing for this tenant.",
    409: "The number was used for another operation; or the client is poisoned, or the operation was cancelled.",
    413: "The body is larger than the service takes.",
    415: "The body is not application/json.",
    422: "Something in the request is wrong, or the operation failed on its contents.",
    429: "Too many requests, or too many operations waiting, of this tenant; Retry-After says how long to wait.",
    500: "The service failed.",
    503: "The queue is full, the service is closing, or the client cannot be brought back now (client_unavailable); "
    "Retry-After says how long to wait.",
    507: "The disk is full.",
}


class StrictRoute(APIRoute):
    """A route that reads its body strictly, and takes no query parameters that it does not know."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, with the checks before it."""
        handle = super().get_route_handler()
        known = {str(parameter.alias) for parameter in self.dependant.query_params}
        takes_body = self.body_field is not None

        async def handle_strictly(request: Request) -> Response:
            for name in request.query_params:
                if name not in known:
                    takes = ", ".join(sorted(known)) or "none"
                    raise InvalidRequest(f"query parameter {name!r:.60} is not known here: this path takes {takes}.")
            if takes_body:
                await _read(request)
            else:
                refuse_body(request)
            return await handle(request)

        return handle_strictly


async def _read(request: Request) -> None:
    """Put the parsed body where FastAPI looks for it: it is parsed once, and under our rules."""
    service: Service = request.app.state.service
    body = await read_body(request, limit=service.params.max_body_bytes)
    if len(body) > LARGE:
        async with service.parsing:
            request._json = await service.call(lambda: parse_json(body))
    else:
        request._json = parse_json(body)
    request._body = body


def _responses(*codes: int) -> Responses:
    return {code: {"model": schemas.ErrorAnswer, "description": REASONS[code]} for code in codes}


router = APIRouter(
    prefix="/v1",
    route_class=StrictRoute,
    dependencies=[
        Security(HTTPBearer(auto_error=False, description="A tenant's key; none on a service without keys."))
    ],
    responses=_responses(401, 403, 422, 429, 500),
)
_BODY_CODES = (413, 415, 503)
_OPERATION_CODES = (404, 409, *_BODY_CODES, 507)

ClientId = Annotated[str, Path(description="a training client", examples=["tc-0123456789abcdef01234567"])]
FutureId = Annotated[str, Path(description="a future", examples=["fut-0123456789abcdef01234567"])]
ArtifactId = Annotated[str, Path(description="a checkpoint", examples=["art-0123456789abcdef01234567"])]
Wait = Annotated[
    float,
    Query(
        ge=0,
        allow_inf_nan=False,
        description="seconds to wait for the result; the service waits for no longer than its own limit, then answers "
        "202, and the question can be asked again",
    ),
]


@router.post(
    "/training_clients", status_code=201, response_model=schemas.ClientInfo, responses=_responses(*_BODY_CODES)
)
async def create_training_client(request: Request, config: Annotated[schemas.Configuration, Body()]) -> Response:
    """Create a training client: an adapter of its own on a model that the service offers."""
    service, tenant, request_id = _context(request)
    info = await service.call(lambda: service.engine.create_client(tenant, config, request_id=request_id))
    return JSON(info, status_code=201, headers={"Location": f"/v1/training_clients/{info['id']}"})


@router.get("/training_clients", response_model=schemas.ClientList)
async def list_training_clients(request: Request) -> Response:
    """List the tenant's clients."""
    service, tenant, _ = _context(request)
    return JSON({"training_clients": await service.call(lambda: service.engine.list_clients(tenant))})


@router.get("/training_clients/{client_id}", response_model=schemas.ClientInfo, responses=_responses(404))
async def get_training_client(request: Request, client_id: ClientId) -> Response:
    """Return a client: its step, status and configuration, and the number of its next operation."""
    service, tenant, _ = _context(request)
    _require_id(client_id, "tc")
    return JSON(await service.call(lambda: service.engine.get_client(tenant, client_id)))


@router.delete(
    "/training_clients/{client_id}", response_model=schemas.Deleted, responses=_responses(404, 409, 503, 507)
)
async def delete_training_client(request: Request, client_id: ClientId) -> Response:
    """Delete a client that has nothing open, with its operations; its checkpoints stay."""
    service, tenant, request_id = _context(request)
    _require_id(client_id, "tc")
    await service.call(lambda: service.engine.delete_client(tenant, client_id, request_id=request_id))
    return JSON({"deleted": True})


def _operation(kind: str, body_type: type[schemas.OperationRequest], *, waits: float) -> None:
    """Add POST …/{kind}: 202 and the future at once, or within `wait` seconds 200 and the future with its result."""

    async def operate(request: Request, client_id: ClientId, body: Any, wait: Wait = waits) -> Response:
        service, tenant, request_id = _context(request)
        _require_id(client_id, "tc")
        payload = body.payload()
        info = await service.call(
            lambda: service.engine.submit(tenant, client_id, kind, payload, seq=body.seq, request_id=request_id)
        )
        if not wait:
            return JSON(info, status_code=202)
        return _outcome(await service.finished(request, tenant, info["id"], wait), request_id)

    operate.__annotations__["body"] = Annotated[body_type, Body()]
    operate.__name__ = kind
    operate.__doc__ = (
        f"{body_type.__doc__} With `wait`, 200 and its result when it has finished within so many seconds, an error's "
        "own status when it failed; else 202: ask for the result of the future."
    )
    done: Responses = {
        200: {"model": schemas.FutureInfo, "description": "It has finished."},
        202: {"model": schemas.FutureInfo, "description": "It was accepted, and will run."},
    }
    route = router.post(f"/training_clients/{{client_id}}/{kind}", responses=done | _responses(*_OPERATION_CODES))
    route(operate)


_operation("forward_backward", schemas.ForwardBackwardRequest, waits=0.0)
_operation("optim_step", schemas.OptimStepRequest, waits=0.0)
_operation("sample", schemas.SampleBody, waits=WAIT_S)
_operation("save_state", schemas.SaveStateRequest, waits=WAIT_S)
_operation("load_state", schemas.LoadStateRequest, waits=WAIT_S)


@router.get("/futures/{future_id}", response_model=schemas.FutureInfo, responses=_responses(404))
async def get_future(request: Request, future_id: FutureId) -> Response:
    """Return an operation as it is now."""
    service, tenant, _ = _context(request)
    _require_id(future_id, "fut")
    return JSON(await service.call(lambda: service.engine.future(tenant, future_id)))


@router.get(
    "/futures/{future_id}/result",
    response_model=schemas.FutureInfo,
    responses=NOT_FINISHED | _responses(404, 409, 503, 507),
)
async def get_result(request: Request, future_id: FutureId, wait: Wait = WAIT_S) -> Response:
    """Wait for an operation: 200 with its result, the status and envelope of what it failed with, or 202."""
    service, tenant, request_id = _context(request)
    _require_id(future_id, "fut")
    return _outcome(await service.finished(request, tenant, future_id, wait), request_id)


@router.post("/futures/{future_id}/cancel", response_model=schemas.Cancelled, responses=_responses(404, 503))
async def cancel(request: Request, future_id: FutureId) -> Response:
    """Take back an operation that has not begun."""
    service, tenant, _ = _context(request)
    _require_id(future_id, "fut")
    return JSON({"cancelled": await service.call(lambda: service.engine.cancel(tenant, future_id))})


@router.get("/artifacts/{artifact_id}", response_model=schemas.ArtifactInfo, responses=_responses(404))
async def get_artifact(request: Request, artifact_id: ArtifactId) -> Response:
    """Return what is known of a checkpoint."""
    service, tenant, _ = _context(request)
    _require_id(artifact_id, "art")
    return JSON(await service.call(lambda: service.engine.artifact(tenant, artifact_id)))


@router.get(
    "/artifacts/{artifact_id}/content",
    response_class=Response,
    responses=TAR | _responses(404),
)
async def get_artifact_content(request: Request, artifact_id: ArtifactId) -> Response:
    """Return the files of a checkpoint as a tar, the same bytes each time."""
    service, tenant, _ = _context(request)
    _require_id(artifact_id, "art")
    archive = await service.call(lambda: Archive.of(service.engine.artifact_path(tenant, artifact_id)))
    headers = {
        "Content-Length": str(archive.size),
        "Content-Disposition": f'attachment; filename="{artifact_id}.tar"',
    }
    return StreamingResponse(archive.chunks(), media_type="application/x-tar", headers=headers)


@router.get("/audit_logs", response_model=schemas.AuditLog)
async def get_audit_logs(
    request: Request,
    after: Annotated[int, Query(ge=0, le=schemas.LARGEST_SEQ, description="entries with larger numbers")] = 0,
    limit: Annotated[int, Query(ge=1, le=MOST_ENTRIES)] = 100,
) -> Response:
    """Return entries of the tenant's audit log, a chain of hashes that `inft audit verify` checks."""
    service, tenant, _ = _context(request)
    found = await service.call(lambda: service.engine.audit_logs(tenant, after=after, limit=limit))
    return JSON({"audit_logs": found})


@router.get("/health", response_model=schemas.Health)
async def health(request: Request) -> Response:
    """Return whether the service is well; needs no key."""
    service: Service = request.app.state.service
    found = await service.call(service.engine.health)
    status = "closing" if service.closing else found["status"]
    return JSON({"status": status, "version": found["version"], "models": found["models"]})


def _context(request: Request) -> tuple[Service, str, str]:
    """The service, the tenant that asks, and the request's id."""
    return request.app.state.service, request.state.tenant, request.state.request_id


def _require_id(text: str, prefix: str) -> None:
    """NotFound for what cannot be an id: it goes no further."""
    head, _, digits = text.partition("-")
    if head != prefix or not digits or not digits.isascii() or not digits.isalnum():
        raise NotFound(f"there is no {text!r:.60}.")


def _outcome(info: Values, request_id: str) -> Response:
    """200 with a result, the status and envelope of a failure, 202 for what is still open."""
    if info["status"] not in FINISHED:
        return JSON(info, status_code=202)
    if info["error"] is not None:
        return envelope(info["error"], status=status_of(info["error"]), request_id=request_id)
    return JSON(info)
