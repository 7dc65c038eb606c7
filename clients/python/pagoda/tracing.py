"""Traces to an OTLP receiver: what every service needs of OpenTelemetry, and nothing of what its spans mean.

A trace context travels as W3C's `traceparent`; an empty one is a request that is not traced. Times are
seconds of the monotonic clock, as everywhere in the services. OpenTelemetry itself is imported when a service
is told where to send its spans, and is not needed otherwise.

Spans leave from a thread of the SDK's. A receiver that is slow or away costs spans, never a request: the
queue is bounded, and what does not fit is dropped with a warning.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self, TypeAlias
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span as OtelSpan

    Span: TypeAlias = OtelSpan
else:
    Span = Any

FLAG = "--otlp-traces-endpoint"
FLUSH_S = 2.0  # what a service that ends grants its receiver
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})(-.*)?"
)
_PROTOCOL = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

Attributes = Mapping[str, str | int | float | bool | Sequence[str]]


class Record(NamedTuple):
    """A span that has ended; with `error`, which says why, it failed."""

    name: str
    start: float
    end: float
    attributes: Attributes = MappingProxyType({})
    error: str = ""


def sampled(traceparent: str) -> str:
    """`traceparent`, or nothing where it is malformed or says that the trace is not recorded."""
    found = _TRACEPARENT.fullmatch(traceparent)
    return traceparent if found and int(found[1], 16) & 1 else ""


def traceparent_of(span: Span) -> str:
    """The context that a span's children are given; nothing where the span is not recorded."""
    context = span.get_span_context()
    if not context.trace_flags.sampled:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


class Tracing:
    """One service's way to its receiver."""

    def __init__(self, exporter: SpanExporter, service: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        names = {"service.name": f"pagoda-{service}", "service.instance.id": uuid.uuid4().hex}
        # Never the process's global provider: libraries would begin to trace, and some record bodies.
        self._provider = TracerProvider(resource=Resource.create(names), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._exporter = exporter
        self._tracer = self._provider.get_tracer("pagoda")
        self._contexts = TraceContextTextMapPropagator()

    @classmethod
    def start(cls, endpoint: str, service: str) -> Self | None:
        """Tracing to `endpoint`; None where that is empty.

        Spans go by gRPC, or with OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/protobuf over HTTP. The SDK's own
        variables count, among them OTEL_TRACES_SAMPLER for traces that begin here.

        Raises:
            SystemExit: the address is no URL, or OpenTelemetry is not installed.
        """
        if not endpoint:
            return None
        url = urlsplit(endpoint)
        if url.scheme not in ("http", "https", "grpc") or not url.hostname:
            _fail(f"{endpoint!r} is not a URL like http://127.0.0.1:4317")
        protocol = next((os.environ[name] for name in _PROTOCOL if os.environ.get(name)), "grpc")
        try:
            return cls(_exporter(endpoint, protocol, secure=url.scheme == "https"), service)
        except ModuleNotFoundError as error:
            _fail(f"{error.name} is not installed; install pagoda-server[tracing]")
        except ValueError as error:
            _fail(str(error))

    def begin(
        self,
        name: str,
        parent: Mapping[str, str],
        attributes: Attributes,
        start: float | None = None,
        server: bool = False,
    ) -> Span:
        """A span that goes on until `finish`. `parent` holds what was received of `traceparent` and
        `tracestate`; without either the span is the root of a trace. `server`: it answers a call."""
        from opentelemetry.trace import SpanKind

        return self._tracer.start_span(
            name,
            self._contexts.extract(parent),
            SpanKind.SERVER if server else SpanKind.INTERNAL,
            attributes,
            start_time=_unix_ns(time.monotonic() if start is None else start),
        )

    def finish(self, span: Span, attributes: Attributes, error: str = "", end: float | None = None) -> None:
        """End a span that `begin` gave, now or as of `end`; with `error` it failed."""
        from opentelemetry.trace import StatusCode

        span.set_attributes(attributes)
        if error:
            span.set_status(StatusCode.ERROR, error)
        span.end(_unix_ns(time.monotonic() if end is None else end))

    def record(self, traceparent: str, records: Iterable[Record]) -> None:
        """Spans that have ended, children of `traceparent`."""
        from opentelemetry.trace import StatusCode

        context = self._contexts.extract({"traceparent": traceparent})
        offset = _unix_ns(0.0)  # once, so that where one ends the next begins
        for name, start, end, attributes, error in records:
            start_ns, end_ns = offset + round(start * 1e9), offset + round(end * 1e9)
            span = self._tracer.start_span(name, context, attributes=attributes, start_time=start_ns)
            if error:
                span.set_status(StatusCode.ERROR, error)
            span.end(end_ns)

    def close(self, timeout_s: float = FLUSH_S) -> None:
        """Send what is left; after `timeout_s` seconds it is given up."""
        flushing = threading.Thread(target=self._provider.shutdown, name="flush-traces", daemon=True)
        flushing.start()
        flushing.join(timeout_s)
        if flushing.is_alive():
            self._exporter.shutdown()


@contextlib.contextmanager
def server_span(tracing: Tracing | None, name: str, given: Any) -> Iterator[str]:
    """A span around a call of gRPC, whose parent is `given`: a traceparent, or the call's metadata.

    Yields what its children are given, without tracing the parent's context.
    """
    parent = {"traceparent": given} if isinstance(given, str) else contexts_in(given)
    if tracing is None:
        yield parent.get("traceparent", "")
        return
    span = tracing.begin(name, parent, {"rpc.system": "grpc", "rpc.method": name}, server=True)
    error = "the call ended early"
    try:
        yield traceparent_of(span)
        error = ""
    finally:
        tracing.finish(span, {"error.type": "cancelled"} if error else {}, error)


def contexts_in(metadata: Any) -> dict[str, str]:
    """What a call's metadata, or a request's headers as pairs, say of a trace."""
    found: dict[str, str] = {}
    for key, value in metadata or ():
        if key == "traceparent":
            found[key] = value
        elif key == "tracestate":  # a list, which may be dealt out over several
            found[key] = f"{found[key]},{value}" if key in found else value
    return found


def _exporter(endpoint: str, protocol: str, secure: bool) -> SpanExporter:
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as by_grpc

        return by_grpc.OTLPSpanExporter(endpoint=endpoint, insecure=not secure)
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http import trace_exporter as by_http

        return by_http.OTLPSpanExporter(endpoint=endpoint)
    raise ValueError(f"{_PROTOCOL[0]}={protocol}: there are grpc and http/protobuf")


def _unix_ns(moment: float) -> int:
    """When a moment of the monotonic clock is, or was, in nanoseconds since 1970."""
    return time.time_ns() - time.monotonic_ns() + round(moment * 1e9)


def _fail(problem: str) -> NoReturn:
    print(f"error: {FLAG}: {problem}", file=sys.stderr)
    raise SystemExit(2)
