"""What tiers share of traces: contexts on the wire, spans at a receiver, and receivers that fail."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from pagoda.tracing import Record, Tracing, contexts_in, sampled, server_span, traceparent_of
from tests.support.otlp import Receiver, http_receiver, receiver

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.fixture
def taken() -> Iterator[Receiver]:
    with receiver() as running:
        yield running


def started(url: str) -> Tracing:
    tracing = Tracing.start(url, "test")
    assert tracing is not None
    return tracing


@pytest.mark.parametrize(
    ("context", "records"),
    [
        (PARENT, True),
        (PARENT[:-2] + "03", True),
        ("cc" + PARENT[2:] + "-and-more", True),  # of a later version
        (PARENT[:-2] + "00", False),
        (PARENT[:-2] + "02", False),
        ("ff" + PARENT[2:], False),
        (PARENT.replace(TRACE, "0" * 32), False),
        (PARENT.replace(SPAN, "0" * 16), False),
        (PARENT.upper(), False),
        (PARENT[1:], False),
        (PARENT + "\n", False),
        ("", False),
    ],
)
def test_only_well_formed_contexts_that_are_recorded_count(context: str, records: bool) -> None:
    assert sampled(context) == (context if records else "")


def test_spans_come_with_their_parent_times_and_errors(taken: Receiver) -> None:
    tracing = started(taken.url)
    now, unix_ns = time.monotonic(), time.time_ns()
    span = tracing.begin("call", {"traceparent": PARENT, "tracestate": "a=b"}, {"n": 1}, now - 5, server=True)
    children = [Record("first", now - 4, now - 3), Record("second", now - 3, now - 1, {"m": 2}, "it broke")]
    tracing.record(traceparent_of(span), children)
    tracing.finish(span, {"done": True}, end=now)
    tracing.close()
    call, first, second = taken.of(TRACE)
    assert (call.name, call.parent_id, call.state, call.is_server) == ("call", SPAN, "a=b", True)
    assert call.attributes == {"n": 1, "done": True} and not call.failed and call.service == "pagoda-test"
    assert first.parent_id == second.parent_id == call.span_id
    assert first.end == second.start and second.end - second.start == pytest.approx(2e9, abs=1000)
    assert (second.failed, second.message, second.attributes) == (True, "it broke", {"m": 2})
    assert call.end == pytest.approx(unix_ns, abs=5e9), "times are those of the wall"


def test_spans_go_over_http_if_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    with http_receiver() as taken:
        tracing = started(taken.url)
        tracing.record(PARENT, [Record("over-http", 1.0, 2.0)])
        tracing.close()
        assert taken.names(TRACE) == ["over-http"]


def test_the_sampler_decides_for_roots_and_the_parent_for_children(
    taken: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    tracing = started(taken.url)
    root = tracing.begin("root", {}, {})
    assert traceparent_of(root) == ""
    tracing.finish(root, {})
    tracing.finish(tracing.begin("child", {"traceparent": PARENT}, {}), {})
    tracing.finish(tracing.begin("unrecorded", {"traceparent": PARENT[:-1] + "0"}, {}), {})
    tracing.close()
    assert [span.name for span in taken.spans] == ["child"]


def test_a_call_has_a_span_or_passes_its_context_on(taken: Receiver) -> None:
    metadata = (("traceparent", PARENT), ("other", "x"))
    with server_span(None, "Call", metadata) as passed:
        assert passed == PARENT
    with server_span(None, "Call", ()) as passed:
        assert passed == ""
    tracing = started(taken.url)
    with server_span(tracing, "Call", PARENT) as passed:
        assert passed.startswith(f"00-{TRACE}-") and SPAN not in passed
    with pytest.raises(ValueError, match="a bug"), server_span(tracing, "Failing", metadata):
        raise ValueError("a bug")
    tracing.close()
    good, failing = taken.of(TRACE)
    assert (good.name, good.failed, failing.name, failing.failed) == ("Call", False, "Failing", True)


def test_nothing_else_of_the_metadata_is_read() -> None:
    pairs = [("traceparent", "t"), ("tracestate", "s"), ("authorization", "x")]
    assert contexts_in(pairs) == {"traceparent": "t", "tracestate": "s"}
    assert contexts_in(None) == {}


def test_a_receiver_that_hangs_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    with receiver() as taken:
        asked, released = threading.Event(), threading.Event()
        take = taken.take

        def hang(message: bytes) -> bytes:
            asked.set()
            assert released.wait(60)
            return take(message)

        taken.take = hang  # type: ignore[method-assign]
        tracing = started(taken.url)
        tracing.record(PARENT, [Record("first", 1.0, 2.0)])
        assert asked.wait(30)
        for _ in range(5):  # more than any queue holds: these are dropped, and nobody waits
            tracing.record(PARENT, [Record("more", 1.0, 2.0)] * 1000)
        tracing.close(timeout_s=0.1)
        assert not taken.messages, "closing did not wait for the answer"
        released.set()


@pytest.mark.parametrize("url", ["127.0.0.1:4317", "ftp://host:1", "http://"])
def test_what_is_no_url_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        Tracing.start(url, "test")
    assert caught.value.code == 2
    assert f"--otlp-traces-endpoint: {url!r} is not a URL" in capsys.readouterr().err


def test_an_unknown_protocol_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json")
    with pytest.raises(SystemExit):
        Tracing.start("http://127.0.0.1:4317", "test")
    assert "there are grpc and http/protobuf" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["opentelemetry.sdk", "opentelemetry.exporter"])
def test_a_missing_package_is_named_with_what_to_install(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from pagoda.tracing import Tracing\n"
        "Tracing.start('http://127.0.0.1:4317', 'test')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "install pagoda-server[tracing]" in done.stderr and "Traceback" not in done.stderr


def test_without_an_address_nothing_is_imported() -> None:
    code = (
        "import sys; from pagoda.tracing import Tracing, sampled; assert Tracing.start('', 'x') is None\n"
        "sampled('00'); print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
