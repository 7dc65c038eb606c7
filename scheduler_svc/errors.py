"""What callers are told when something is wrong.

SchedulerError                 every error that has a status for the caller
├── InvalidRequest             INVALID_ARGUMENT     names the field
├── DuplicateRequest           ALREADY_EXISTS       the request_id is waiting or running
├── QueueFull                  RESOURCE_EXHAUSTED   says when to try again
├── NoWorker                   UNAVAILABLE          nothing has ever attached
├── RequestFailed              INTERNAL             it was accepted and then failed
└── HelloRefused               FAILED_PRECONDITION  lists what differs; the worker exits for good

Every one travels as a gRPC status with `google.rpc` details, or as a `RequestFailure` of a session.
"""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.any import pack
from google.protobuf.duration import from_milliseconds
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as rpc
from google.rpc import status_pb2

from pagoda.v1 import scheduler_pb2 as pb


class SchedulerError(Exception):
    """An error with a status for the caller. `field` and `retry_after_ms` are set where they apply.

    `reason` is its name in metrics, `details` are the `google.rpc` messages that go with the status.
    """

    code: grpc.StatusCode = grpc.StatusCode.INTERNAL
    reason: str = "internal"
    field: str = ""
    retry_after_ms: int | None = None

    def __init__(self, text: str, *details: Message) -> None:
        super().__init__(text)
        self.details = details

    def failure(self, handle: int) -> pb.RequestFailure:
        """This error as a session's column entry."""
        return pb.RequestFailure(
            handle=handle,
            code=self.code.value[0],
            message=str(self),
            field=self.field,
            retry_after_ms=self.retry_after_ms,
        )


class InvalidRequest(SchedulerError):
    """A field of the request is wrong."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "invalid_request"

    def __init__(self, field: str, problem: str) -> None:
        violation = rpc.BadRequest.FieldViolation(field=field, description=problem)
        super().__init__(f"{field}: {problem}", rpc.BadRequest(field_violations=[violation]))
        self.field = field


class DuplicateRequest(SchedulerError):
    """A request of this id is waiting or running."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "duplicate_request"
    field = "request_id"

    def __init__(self, request_id: str) -> None:
        text = f"request_id: {request_id!r} is waiting or running already; choose another"
        super().__init__(text, rpc.ResourceInfo(resource_type="request", resource_name=request_id))


class QueueFull(SchedulerError):
    """The waiting queue is at its bound."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "queue_full"
    retry_after_ms = 1000

    def __init__(self, num_waiting: int) -> None:
        text = f"{num_waiting} requests are waiting, which is the bound; try again later"
        super().__init__(text, rpc.RetryInfo(retry_delay=from_milliseconds(self.retry_after_ms)))


class NoWorker(SchedulerError):
    """No worker has attached yet, so that the model is not known."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "no_worker"
    retry_after_ms = 1000

    def __init__(self) -> None:
        super().__init__("no worker has attached yet; try again when one has loaded the model")


class RequestFailed(SchedulerError):
    """A request was accepted and failed later."""


class HelloRefused(SchedulerError):
    """A worker does not fit this cluster. `violations` are (subject, what differs)."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "hello_refused"

    def __init__(self, violations: list[tuple[str, str]]) -> None:
        text = "; ".join(f"{subject}: {problem}" for subject, problem in violations)
        listed = [{"type": "HELLO", "subject": s, "description": d} for s, d in violations]
        super().__init__(text, rpc.PreconditionFailure(violations=listed))


def to_status(error: SchedulerError) -> status_pb2.Status:
    """The rich status of an error."""
    details = [pack(detail) for detail in error.details]
    return status_pb2.Status(code=error.code.value[0], message=str(error), details=details)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: SchedulerError) -> NoReturn:
    """End a call with the status of `error`."""
    details = (("grpc-status-details-bin", to_status(error).SerializeToString()),)
    await context.abort(error.code, str(error), details)
    raise AssertionError("abort returned")
