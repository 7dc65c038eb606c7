"""What a gRPC server says to callers whose bytes are no message, or hold a string that is not UTF-8.

Python's own servers answer UNKNOWN and log a traceback for each. Here it is INVALID_ARGUMENT with the field.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor, FileDescriptor
from google.protobuf.message import DecodeError, Message


class MalformedMessage(Exception):
    """Bytes that are no message of the kind that was awaited."""


class MalformedInterceptor(grpc.aio.ServerInterceptor):
    """Answers them with INVALID_ARGUMENT; everything else passes."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        if handler is None or handler.request_deserializer is None:
            return handler
        streams = (handler.request_streaming, handler.response_streaming)
        name, make = _SHAPES[streams]
        parse = functools.partial(_parse, handler.request_deserializer)
        # One message is parsed before the handler runs, so its error is handed in; on a stream it is raised.
        deserializer = parse if handler.request_streaming else functools.partial(_parse_or_error, parse)
        return make(_telling(getattr(handler, name)), deserializer, handler.response_serializer)


_SHAPES: dict[tuple[bool, bool], tuple[str, Callable[..., grpc.RpcMethodHandler]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


def _parse(deserializer: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return deserializer(data)
    except DecodeError as error:
        kind: Any = getattr(deserializer, "__self__", None)  # FromString is a method of the message's class
        field = _not_utf8(kind, data) if isinstance(kind, type) and issubclass(kind, Message) else ""
        said = f"{field}: is not valid UTF-8" if field else f"message: cannot be read: {error}"
        raise MalformedMessage(said) from error


def _parse_or_error(parse: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return parse(data)
    except MalformedMessage as error:
        return error


def _telling(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    """`behaviour`, telling its caller of a malformed message; of the same kind, for grpc looks at that."""

    async def one(request: Any, context: Any) -> Any:
        try:
            if isinstance(request, MalformedMessage):
                raise request
            return await behaviour(request, context)
        except MalformedMessage as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error), _details(error))

    async def many(request: Any, context: Any) -> Any:
        try:
            if isinstance(request, MalformedMessage):
                raise request
            async with contextlib.aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response
        except MalformedMessage as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error), _details(error))

    return many if inspect.isasyncgenfunction(behaviour) else one


def _details(error: MalformedMessage) -> tuple[tuple[str, bytes], ...]:
    """The rich status: `google.rpc.BadRequest` with the field, where one is known."""
    from google.protobuf import any_pb2
    from google.rpc import error_details_pb2, status_pb2

    field, problem = str(error).split(": ", 1)
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=problem)
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    code = grpc.StatusCode.INVALID_ARGUMENT.value[0]
    status = status_pb2.Status(code=code, message=str(error), details=[packed])
    return (("grpc-status-details-bin", status.SerializeToString()),)


def _not_utf8(kind: type[Message], data: bytes) -> str:
    """The field whose string is not UTF-8, as in "chat.messages[0].content"; empty if it is not that."""
    try:
        message = _with_bytes(kind.DESCRIPTOR.file, kind.DESCRIPTOR.full_name).FromString(data)
    except DecodeError:
        return ""
    return next(_bad_strings(message), "")


@functools.cache
def _with_bytes(file: FileDescriptor, name: str) -> type[Message]:
    """The class of message `name` in which every string is bytes, and so can hold anything."""
    pool = descriptor_pool.DescriptorPool()

    def add(file: FileDescriptor) -> None:
        for other in file.dependencies:
            add(other)
        copy = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(copy)
        for message in copy.message_type:
            for field in message.field:
                if field.type == FieldDescriptor.TYPE_STRING:
                    field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
        pool.AddSerializedFile(copy.SerializeToString())

    add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


def _bad_strings(message: Any, prefix: str = "") -> Iterator[str]:
    for field, value in message.ListFields():
        repeated = isinstance(value, Sequence) and not isinstance(value, bytes)
        for i, item in enumerate(value if repeated else (value,)):
            place = f"{prefix}{field.name}" + (f"[{i}]" if repeated else "")
            if isinstance(item, Message):
                yield from _bad_strings(item, f"{place}.")
            elif isinstance(item, bytes):
                try:
                    item.decode()
                except UnicodeDecodeError:
                    yield place
