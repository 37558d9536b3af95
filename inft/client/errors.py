"""What goes wrong with a client, each with its code on the wire and its HTTP status."""

import math
from collections.abc import Mapping
from typing import Any

from params.errors import UserError


class ClientError(UserError):
    """An operation or a request that was refused or failed; `details` are plain values."""

    code = "invalid_request"
    status = 422

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = details

    def as_dict(self) -> dict[str, Any]:
        """Return {code, message, details} as the wire and the log have it."""
        return {"code": self.code, "message": str(self), "details": self.details}


class InvalidRequest(ClientError):
    """Something in the request is wrong; nothing has changed."""


class Unauthorized(ClientError):
    """No key, or one that is not known."""

    code, status = "unauthorized", 401


class Forbidden(ClientError):
    """The key is another tenant's than the one named."""

    code, status = "forbidden", 403


class NotFound(ClientError):
    """There is no such thing for this tenant; whether another tenant has it is not told."""

    code, status = "not_found", 404


class Conflict(ClientError):
    """The number of the operation was used for another one, or the id is taken."""

    code, status = "conflict", 409


class ClientPoisoned(ClientError):
    """A loss or gradient was not finite: the client takes nothing but load_state."""

    code, status = "client_poisoned", 409


class OperationCancelled(ClientError):
    """The operation was cancelled before it ran."""

    code, status = "cancelled", 409


class NotFinite(ClientError):
    """A loss or a gradient is NaN or infinite; the weights are as before."""

    code, status = "not_finite", 422


class PrivacyBudgetExhausted(ClientError):
    """The step would spend more than target_epsilon; it was not taken."""

    code, status = "privacy_budget_exhausted", 422


class PayloadTooLarge(InvalidRequest):
    """The body is larger than the service takes; details.limit is in bytes."""

    code, status = "payload_too_large", 413


class UnsupportedMediaType(InvalidRequest):
    """The body is not JSON."""

    code, status = "unsupported_media_type", 415


class MethodNotAllowed(InvalidRequest):
    """The path exists, with other methods."""

    code, status = "method_not_allowed", 405


class RateLimited(ClientError):
    """Too many requests of one tenant; details.retry_after is in seconds."""

    code, status = "rate_limited", 429


class QueueFull(ClientError):
    """The service has as many operations waiting as it takes; details.retry_after is in seconds."""

    code, status = "queue_full", 503


class Closed(ClientError):
    """The engine is shutting down; what it accepted is run when it is started again."""

    code, status = "shutting_down", 503


class ClientUnavailable(ClientError):
    """The client cannot be brought back as it was; what was accepted is kept, and tried again."""

    code, status = "client_unavailable", 503


class StorageFull(ClientError):
    """A checkpoint could not be written; nothing half-written is left."""

    code, status = "storage_full", 507


class TimedOut(ClientError, TimeoutError):
    """No result within the time that was waited; the operation goes on."""

    code, status = "timed_out", 408


class InternalError(ClientError):
    """A fault of ours, or of the machine; details.type names it."""

    code, status = "internal_error", 500


ERRORS: Mapping[str, type[ClientError]] = {
    kind.code: kind
    for kind in (
        InvalidRequest,
        Unauthorized,
        Forbidden,
        NotFound,
        Conflict,
        ClientPoisoned,
        OperationCancelled,
        NotFinite,
        PrivacyBudgetExhausted,
        PayloadTooLarge,
        UnsupportedMediaType,
        MethodNotAllowed,
        RateLimited,
        QueueFull,
        Closed,
        ClientUnavailable,
        StorageFull,
        TimedOut,
        InternalError,
    )
}


def error_of(values: Mapping[str, Any]) -> ClientError:
    """Return the error that {code, message, details} describes."""
    kind = ERRORS.get(str(values.get("code")), InternalError)
    return kind(str(values.get("message")), **dict(values.get("details") or {}))


def as_client_error(error: Exception) -> ClientError:
    """Return the client's error for any exception: a UserError is an invalid request, the rest faults of ours."""
    from inft.client.privacy.calibrate import BudgetExhausted
    from inft.client.privacy.clipping import NonFiniteGradient

    if isinstance(error, ClientError):
        return error
    if isinstance(error, BudgetExhausted):
        figures = {"spent": error.spent, "after": error.after, "target": error.target}
        return PrivacyBudgetExhausted(  # JSON has no infinity
            str(error), **{name: value if math.isfinite(value) else None for name, value in figures.items()}
        )
    if isinstance(error, NonFiniteGradient):
        return NotFinite(str(error))
    if isinstance(error, UserError):
        return InvalidRequest(str(error))
    return InternalError(f"{type(error).__name__}: {error}", type=type(error).__name__)
