"""A receiver of traces on a real socket: OTLP over gRPC, or over HTTP."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.support.cluster_sched import wait_until

EXPORT = "opentelemetry.proto.collector.trace.v1.TraceService"


@dataclass(frozen=True)
class Span:
    """One span as it came; times are nanoseconds since 1970, ids are hexadecimal."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    is_server: bool
    failed: bool
    message: str
    state: str
    attributes: dict[str, Any]


@dataclass
class Receiver:
    """What has come, decoded and as bytes."""

    url: str = ""
    messages: list[bytes] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    def take(self, message: bytes) -> bytes:
        """Take in one export; the answer to it."""
        self.messages.append(message)
        for group in ExportTraceServiceRequest.FromString(message).resource_spans:
            service = _attributes(group.resource.attributes)["service.name"]
            for scope in group.scope_spans:
                self.spans += [_span(service, span) for span in scope.spans]
        return ExportTraceServiceResponse().SerializeToString()

    def trace(self, trace_id: str, *names: str) -> list[Span]:
        """The spans of a trace, by their beginning, once `names` are all among them (each as often as it is
        given). Raises AssertionError when they do not come."""
        try:
            wait_until(lambda: self._has(trace_id, names), 30, "all spans")
        except AssertionError:
            raise AssertionError(f"{names} were to come; there are {self.names(trace_id)}") from None
        return self.of(trace_id)

    def _has(self, trace_id: str, names: tuple[str, ...]) -> bool:
        came = self.names(trace_id)
        return all(came.count(name) >= names.count(name) for name in names)

    def of(self, trace_id: str) -> list[Span]:
        """The spans of a trace that have come, by their beginning."""
        return sorted((s for s in list(self.spans) if s.trace_id == trace_id), key=lambda s: (s.start, s.end))

    def names(self, trace_id: str) -> list[str]:
        """The names of these spans."""
        return [span.name for span in self.of(trace_id)]


def _span(service: str, span: Any) -> Span:
    return Span(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        is_server=span.kind == span.SPAN_KIND_SERVER,
        failed=span.status.code == span.status.STATUS_CODE_ERROR,
        message=span.status.message,
        state=span.trace_state,
        attributes=_attributes(span.attributes),
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind)


@contextlib.contextmanager
def receiver() -> Iterator[Receiver]:
    """A receiver that speaks gRPC, until the block ends."""
    taken = Receiver()
    method = grpc.unary_unary_rpc_method_handler(lambda message, _: taken.take(message))
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(EXPORT, {"Export": method}),))
    taken.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield taken
    finally:
        server.stop(None).wait()


@contextlib.contextmanager
def http_receiver() -> Iterator[Receiver]:
    """A receiver that speaks HTTP, until the block ends."""
    taken = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            answer = taken.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    taken.url = f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield taken
    finally:
        server.shutdown()
        server.server_close()
