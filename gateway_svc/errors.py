"""What callers are told when something is wrong, over HTTP and gRPC alike.

GatewayError               every error that has a status for the caller
├── InvalidField           INVALID_ARGUMENT     400  names the field
│   └── ContextTooLong     INVALID_ARGUMENT     400  code context_length_exceeded
├── NotSupported           INVALID_ARGUMENT     400  a feature that this version lacks
├── UnknownModel           NOT_FOUND            404
├── Overloaded             RESOURCE_EXHAUSTED   429  says when to try again
├── Unavailable            UNAVAILABLE          503  says when to try again
└── RequestFailed          as the scheduler says
"""

from __future__ import annotations

import math

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2

from pagoda.v1 import scheduler_pb2 as pb

_HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class GatewayError(Exception):
    """An error with a status for the caller.

    `field` names what is wrong in the request, `code` is a word for programs, `retry_after_ms` says when a
    later try may succeed.
    """

    status = grpc.StatusCode.INTERNAL
    kind = "server_error"

    def __init__(
        self, message: str, *, field: str = "", code: str | None = None, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.code = code
        self.retry_after_ms = retry_after_ms

    def rename(self, field: str, name: str) -> None:
        """If this is about `field`, let it be about `name`, by which the caller knows it."""
        if self.field == field:
            self.field = name
            if self.message.startswith(field):
                self.message = name + self.message.removeprefix(field)

    @property
    def http_status(self) -> int:
        """The HTTP status of this error."""
        return _HTTP_STATUS.get(self.status, 500)

    @property
    def retry_after_s(self) -> int | None:
        """Whole seconds for a Retry-After header."""
        return None if self.retry_after_ms is None else max(1, math.ceil(self.retry_after_ms / 1000))


class InvalidField(GatewayError):
    """A field of the request is wrong."""

    status = grpc.StatusCode.INVALID_ARGUMENT
    kind = "invalid_request_error"

    def __init__(self, field: str, problem: str, code: str | None = None) -> None:
        super().__init__(f"{field}: {problem}", field=field, code=code)
        self.problem = problem

    def renamed(self, field: str) -> InvalidField:
        """The same problem under the name that the caller knows."""
        return InvalidField(field, self.problem, self.code)


class ContextTooLong(InvalidField):
    """The prompt leaves no room for a token of output."""

    def __init__(self, field: str, num_tokens: int, max_model_len: int, at_least: bool = False) -> None:
        many = f"at least {num_tokens}" if at_least else str(num_tokens)
        problem = (
            f"has {many} tokens, but the model's context is {max_model_len} tokens, "
            "prompt and at least one token of output together; shorten it"
        )
        super().__init__(field, problem, "context_length_exceeded")


class NotSupported(InvalidField):
    """A feature that this version lacks."""

    def __init__(self, field: str, hint: str = "") -> None:
        super().__init__(field, "not supported yet" + (f"; {hint}" if hint else ""), "unsupported_value")


class UnknownModel(GatewayError):
    """No model of that name is served."""

    status = grpc.StatusCode.NOT_FOUND
    kind = "invalid_request_error"

    def __init__(self, name: str, served: str) -> None:
        text = f"model: {name!r} is not served here; {served!r} is"
        super().__init__(text, field="model", code="model_not_found")


class Overloaded(GatewayError):
    """Too much is waiting."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    kind = "rate_limit_error"

    def __init__(self, message: str, retry_after_ms: int = 1000) -> None:
        super().__init__(message, code="queue_full", retry_after_ms=retry_after_ms)


class Unavailable(GatewayError):
    """The tiers below are not there, or not yet."""

    status = grpc.StatusCode.UNAVAILABLE
    kind = "service_unavailable_error"

    def __init__(self, message: str, code: str = "unavailable", retry_after_ms: int = 1000) -> None:
        super().__init__(message, code=code, retry_after_ms=retry_after_ms)


class RequestFailed(GatewayError):
    """The scheduler refused or failed a request."""

    def __init__(self, failure: pb.RequestFailure) -> None:
        retry_after_ms = failure.retry_after_ms if failure.HasField("retry_after_ms") else None
        status = _CODES.get(failure.code, grpc.StatusCode.UNKNOWN)
        # A client that is told to come back must be told when.
        if retry_after_ms is None and status in (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            grpc.StatusCode.UNAVAILABLE,
        ):
            retry_after_ms = 1000
        full = status == grpc.StatusCode.RESOURCE_EXHAUSTED
        code = "queue_full" if full else status.name.lower()
        super().__init__(failure.message, field=failure.field, code=code, retry_after_ms=retry_after_ms)
        self.status = status
        if self.http_status < 500:
            self.kind = "rate_limit_error" if self.http_status == 429 else "invalid_request_error"


def to_status(error: GatewayError) -> status_pb2.Status:
    """The error as a rich gRPC status."""
    details: list[message.Message] = []
    if error.field:
        problem = error.problem if isinstance(error, InvalidField) else error.message
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=problem)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.code:
        details.append(error_details_pb2.ErrorInfo(reason=error.code.upper(), domain="pagoda"))
    if error.retry_after_ms is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=error.status.value[0], message=error.message, details=packed)
