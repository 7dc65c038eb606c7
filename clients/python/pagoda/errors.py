"""What can go wrong, as exceptions.

    PagodaError
    ├── InvalidRequest      the request is wrong; `field` names where
    ├── NotFound            no such model
    ├── Unauthenticated     a token is needed, or this one is not accepted
    ├── AlreadyExists       a request with this id is running
    ├── Overloaded          the queue is full; `retry_after` says when to try again
    ├── Unavailable         the server cannot be reached, is starting or went away
    ├── Cancelled           the request was cancelled
    ├── DeadlineExceeded    the time allowed is over
    └── ServerError         anything else that the server reports

Every `PagodaError` has `code`, the gRPC status code's name, and `request_id` when one is known.
"""

from __future__ import annotations

from typing import Any

import grpc


class PagodaError(Exception):
    """The root of all errors of this SDK."""

    code = "UNKNOWN"

    def __init__(self, message: str, *, request_id: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id


class InvalidRequest(PagodaError):
    """The request is wrong and will be wrong again; `field` names where, when it is known."""

    code = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, field: str = "", request_id: str = "") -> None:
        super().__init__(message, request_id=request_id)
        self.field = field


class NotFound(PagodaError):
    """The model is not served here."""

    code = "NOT_FOUND"


class Unauthenticated(PagodaError):
    """The server wants a bearer token that it knows: `token=` or PAGODA_TOKEN."""

    code = "UNAUTHENTICATED"


class AlreadyExists(PagodaError):
    """A request with this request id is running already."""

    code = "ALREADY_EXISTS"


class Overloaded(PagodaError):
    """The queue is full. `retry_after` is in seconds, None when the server did not say."""

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, retry_after: float | None = None, request_id: str = "") -> None:
        super().__init__(message, request_id=request_id)
        self.retry_after = retry_after


class Unavailable(PagodaError):
    """The server cannot be reached, is starting, or went away."""

    code = "UNAVAILABLE"

    def __init__(self, message: str, *, retry_after: float | None = None, request_id: str = "") -> None:
        super().__init__(message, request_id=request_id)
        self.retry_after = retry_after


class Cancelled(PagodaError):
    """The request was cancelled, by its caller or by an operator."""

    code = "CANCELLED"


class DeadlineExceeded(PagodaError):
    """The time that the caller allowed is over."""

    code = "DEADLINE_EXCEEDED"


class ServerError(PagodaError):
    """Anything else that the server reports."""

    def __init__(self, message: str, *, code: str = "UNKNOWN", request_id: str = "") -> None:
        super().__init__(message, request_id=request_id)
        self.code = code


_PLAIN: dict[grpc.StatusCode, type[PagodaError]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: Unauthenticated,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


def from_grpc(error: Any, request_id: str = "") -> PagodaError:
    """The exception for a failed call, synchronous or asyncio, its rich details read."""
    code, message = error.code(), error.details() or "no details"
    field, retry_after = _details(error)
    if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE):
        return InvalidRequest(message, field=field, request_id=request_id)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if "larger than max" in message:  # grpc's own limit on a message's size, not a full queue
            return InvalidRequest(message, request_id=request_id)
        return Overloaded(message, retry_after=retry_after, request_id=request_id)
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(message, retry_after=retry_after, request_id=request_id)
    if code in _PLAIN:
        return _PLAIN[code](message, request_id=request_id)
    return ServerError(message, code=code.name, request_id=request_id)


def _details(error: Any) -> tuple[str, float | None]:
    """The field of a `google.rpc.BadRequest` and the seconds of a `RetryInfo`, where there are any."""
    from google.rpc import error_details_pb2, status_pb2

    field, retry_after = "", None
    for key, value in error.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        for detail in status_pb2.Status.FromString(value).details:
            bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
            if detail.Unpack(bad) and bad.field_violations:
                field = bad.field_violations[0].field
            elif detail.Unpack(retry):
                retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return field, retry_after
