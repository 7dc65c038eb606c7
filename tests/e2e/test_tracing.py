"""One trace a request, from real services to a real OTLP receiver."""

from __future__ import annotations

import json
import secrets
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest

from pagoda.models import EMBEDDED_MODEL
from pagoda.v1 import inference_pb2, inference_pb2_grpc
from pagoda.v1 import scheduler_pb2 as pb
from pagoda.v1 import scheduler_pb2_grpc as rpc
from tests.support.cluster import Cluster, cluster, free_port
from tests.support.cluster_sched import wait_until
from tests.support.otlp import Receiver, Span, receiver

SECRET = "zanzibarian marmalade heliotrope"  # in every prompt, and in nothing that leaves
PHASES = ("queue", "prefill", "decode", "worker")
TOLERANCE_NS = 50_000_000  # of what ends in two processes at once, neither waiting for the other
NUM_BLOCKS = 24  # 384 tokens, so that four answers of 100 preempt each other


@dataclass(frozen=True)
class Context:
    """A client's span, which everything else hangs from."""

    trace_id: str
    span_id: str
    flags: str = "01"

    @classmethod
    def new(cls, flags: str = "01") -> Context:
        """A trace of its own."""
        return cls(secrets.token_hex(16), secrets.token_hex(8), flags)

    @property
    def traceparent(self) -> str:
        """As W3C writes it."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


@dataclass
class Traced:
    """Services that trace, and what they send their traces to."""

    services: Cluster
    receiver: Receiver

    def chat(self, context: Context, **options: Any) -> httpx.Response:
        """A chat over HTTP within `context`."""
        body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 8, "temperature": 0.5}
        headers = {"traceparent": context.traceparent, "tracestate": "vendor=abc"}
        url = f"{self.services.url}/v1/chat/completions"
        return httpx.post(url, json={**body, **options}, headers=headers, timeout=120)

    def direct(self, request: pb.GenerateTokensRequest, metadata: tuple[tuple[str, str], ...] = ()) -> int:
        """A request in tokens at the scheduler itself; how many tokens came."""
        with grpc.insecure_channel(self.services.scheduler.address) as channel:
            stream = rpc.SchedulerServiceStub(channel).GenerateTokens(request, metadata=metadata, timeout=120)
            return sum(len(response.token_ids) for response in stream)


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    with pytest.MonkeyPatch.context() as patch, receiver() as taken:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        where = ("--otlp-traces-endpoint", taken.url)
        with cluster(
            scheduler_args=where, worker_args=(*where, "--num-blocks", str(NUM_BLOCKS)), gateway_args=where
        ) as running:
            yield Traced(running, taken)
    for word in SECRET.split():
        assert not any(word.encode() in message for message in taken.messages)


def one(spans: list[Span], name: str) -> Span:
    """The only span of that name."""
    (found,) = [span for span in spans if span.name == name]
    return found


def check_tree(spans: list[Span], context: Context, root: str) -> Span:
    """Assert that all hangs together and that times are nested and in order; the root of ours."""
    top = one(spans, root)
    assert top.parent_id == context.span_id and top.is_server and not top.failed
    assert {span.parent_id for span in spans if span is not top} == {top.span_id}
    for span in spans:
        assert top.start <= span.start <= span.end <= top.end + TOLERANCE_NS, (span, top)
    queue, prefill, decode = (one(spans, name) for name in ("queue", "prefill", "decode"))
    assert queue.end == prefill.start and prefill.end == decode.start
    assert {s.service for s in (queue, prefill, decode)} == {"pagoda-scheduler"}
    for span in spans:
        if span.name == "worker":
            assert span.service == "pagoda-worker" and span.start >= queue.end - TOLERANCE_NS
    return top


def test_a_chat_over_http_is_one_trace(traced: Traced) -> None:
    context = Context.new()
    reply = traced.chat(context, top_p=0.9).json()
    root = f"chat {EMBEDDED_MODEL}"
    spans = traced.receiver.trace(context.trace_id, root, *PHASES)
    top = check_tree(spans, context, root)
    assert top.service == "pagoda-gateway" and top.state == "vendor=abc"
    assert sorted(span.name for span in spans) == sorted([root, *PHASES])
    usage = reply["usage"]
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": EMBEDDED_MODEL,
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.finish_reasons": [reply["choices"][0]["finish_reason"]],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "http.route": "/v1/chat/completions",
    }
    assert expected.items() <= top.attributes.items()
    assert top.attributes["gen_ai.request.top_p"] == pytest.approx(0.9)
    first_token = one(spans, "prefill").end - top.start
    assert top.attributes["gen_ai.latency.time_to_first_token"] * 1e9 >= first_token - TOLERANCE_NS
    worker = one(spans, "worker").attributes
    assert worker["pagoda.tokens"] == usage["completion_tokens"] and worker["pagoda.worker"] == "w0"
    assert 0 < worker["pagoda.steps"] <= usage["completion_tokens"] + 2 and worker["pagoda.rank"] == 0


def test_streams_and_samples_are_traced(traced: Traced) -> None:
    context = Context.new()
    reply = traced.chat(context, stream=True, n=2, ignore_eos=True)
    assert reply.text.endswith("data: [DONE]\n\n")
    root = f"chat {EMBEDDED_MODEL}"
    spans = traced.receiver.trace(context.trace_id, root, *PHASES, "worker")
    top = check_tree(spans, context, root)
    assert top.attributes["gen_ai.usage.num_sequences"] == 2 and top.attributes["gen_ai.request.stream"]
    assert top.attributes["gen_ai.response.finish_reasons"] == ["length"] * 2
    assert [span.attributes["pagoda.tokens"] for span in spans if span.name == "worker"] == [8, 8]


def test_grpc_brings_its_context_in_metadata(traced: Traced) -> None:
    context = Context.new()
    sampling = pb.SamplingParams(max_tokens=5, ignore_eos=True, temperature=0)
    request = inference_pb2.GenerateRequest(text=SECRET, sampling=sampling)
    with grpc.insecure_channel(traced.services.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        metadata = (("traceparent", context.traceparent),)
        assert list(stub.Generate(request, metadata=metadata, timeout=120))[-1].usage.completion_tokens == 5
    root = f"text_completion {EMBEDDED_MODEL}"
    top = check_tree(traced.receiver.trace(context.trace_id, root, *PHASES), context, root)
    assert top.attributes["rpc.method"] == "Generate"


@pytest.mark.parametrize("place", ["field", "metadata"])
def test_a_direct_client_is_traced_by_the_scheduler(traced: Traced, place: str) -> None:
    context = Context.new()
    sampling = pb.SamplingParams(max_tokens=6, ignore_eos=True)
    request = pb.GenerateTokensRequest(prompt_token_ids=[5, 6, 7], sampling=sampling)
    request.resume.add(token_ids=[9, 10])  # from before the scheduler came back, say
    metadata: tuple[tuple[str, str], ...] = ()
    if place == "field":
        request.traceparent = context.traceparent
    else:
        metadata = (("traceparent", context.traceparent),)
    assert traced.direct(request, metadata) == 4
    spans = traced.receiver.trace(context.trace_id, "GenerateTokens", *PHASES)
    check_tree(spans, context, "GenerateTokens")
    assert one(spans, "queue").attributes["pagoda.num_resumed_tokens"] == 2


def test_a_client_without_a_context_begins_a_trace(traced: Traced) -> None:
    before = {span.trace_id for span in traced.receiver.spans}
    request = pb.GenerateTokensRequest(
        prompt_token_ids=[5, 6], request_id="a-root", sampling=pb.SamplingParams(max_tokens=2)
    )
    traced.direct(request)

    def came() -> set[str]:
        spans = list(traced.receiver.spans)
        return {s.trace_id for s in spans if s.attributes.get("gen_ai.request.id") == "a-root"} - before

    wait_until(lambda: bool(came()), 30, "a new trace")
    spans = traced.receiver.trace(came().pop(), "GenerateTokens", *PHASES)
    assert one(spans, "GenerateTokens").parent_id == ""


def test_preemptions_are_spans(traced: Traced) -> None:
    contexts = [Context.new() for _ in range(5)]
    with ThreadPoolExecutor(len(contexts)) as pool:
        replies = list(pool.map(lambda c: traced.chat(c, max_tokens=100, ignore_eos=True), contexts))
    assert all(reply.json()["usage"]["completion_tokens"] == 100 for reply in replies)
    root = f"chat {EMBEDDED_MODEL}"
    num_paused = 0
    for context in contexts:
        spans = traced.receiver.trace(context.trace_id, root, *PHASES)
        num_preemptions = one(spans, "queue").attributes["pagoda.num_preemptions"]
        more = ("preempted", "worker") * num_preemptions
        spans = traced.receiver.trace(context.trace_id, root, *PHASES, *more)
        check_tree(spans, context, root)
        pauses = [span for span in spans if span.name == "preempted"]
        rows = [span for span in spans if span.name == "worker"]
        assert len(pauses) == num_preemptions and len(rows) == num_preemptions + 1
        assert sum(row.attributes["pagoda.tokens"] for row in rows) == 100
        for pause, before, after in zip(pauses, rows[:-1], rows[1:], strict=True):
            assert before.start < pause.start < pause.end <= after.start + TOLERANCE_NS
        num_paused += bool(pauses)
    assert num_paused, "nothing was preempted"


def test_a_client_that_leaves_ends_its_trace(traced: Traced) -> None:
    context = Context.new()
    body = {"prompt": SECRET, "max_tokens": 300, "ignore_eos": True, "stream": True}
    headers = {"traceparent": context.traceparent}
    with httpx.stream(
        "POST", f"{traced.services.url}/v1/completions", json=body, headers=headers, timeout=120
    ) as reply:
        next(line for line in reply.iter_lines() if line)
    traced.chat(Context.new())  # whose steps release the row
    root = f"text_completion {EMBEDDED_MODEL}"
    spans = traced.receiver.trace(context.trace_id, root, *PHASES)
    top = one(spans, root)
    assert top.failed and top.attributes["error.type"] == "cancelled"
    decode = one(spans, "decode")
    assert decode.attributes["pagoda.finish_reason"] == "cancelled" and not decode.failed
    assert one(spans, "worker").attributes["pagoda.tokens"] < 300


def test_what_is_refused_is_a_failed_span_without_the_clients_words(traced: Traced) -> None:
    context = Context.new()
    assert traced.chat(context, temperature=SECRET).status_code == 400
    other = Context.new()
    assert traced.chat(other, top_p=7).status_code == 400
    for asked, field in ((context, "temperature"), (other, "top_p")):
        (span,) = traced.receiver.trace(asked.trace_id, f"chat {EMBEDDED_MODEL}")[:1]
        assert span.failed and span.message == "invalid_argument"
        assert field in span.attributes["pagoda.error.field"]


@pytest.mark.parametrize("flags", ["00", "02"])
def test_what_the_client_does_not_record_nobody_records(traced: Traced, flags: str) -> None:
    unrecorded, recorded = Context.new(flags), Context.new()
    traced.chat(unrecorded)
    traced.direct(
        pb.GenerateTokensRequest(
            prompt_token_ids=[1, 2],
            sampling=pb.SamplingParams(max_tokens=2),
            traceparent=unrecorded.traceparent,
        )
    )
    traced.chat(recorded)
    traced.receiver.trace(recorded.trace_id, f"chat {EMBEDDED_MODEL}", *PHASES)
    assert not traced.receiver.of(unrecorded.trace_id)


def test_a_malformed_context_is_as_good_as_none(traced: Traced) -> None:
    headers = {"traceparent": "00-" + "0" * 32 + "-1234-zz"}
    body = {"prompt": SECRET, "max_tokens": 2, "request_id": "malformed"}
    reply = httpx.post(f"{traced.services.url}/v1/completions", json=body, headers=headers, timeout=120)
    assert reply.status_code == 200

    def roots() -> list[Span]:
        return [s for s in traced.receiver.spans if s.attributes.get("gen_ai.request.id") == "malformed"]

    wait_until(lambda: any(not span.parent_id for span in roots()), 30, "a trace of its own")


def test_a_worker_that_dies_is_in_the_trace(traced: Traced) -> None:
    context = Context.new()
    body = {"prompt": SECRET, "max_tokens": 200, "ignore_eos": True, "stream": True}
    headers = {"traceparent": context.traceparent}
    url = f"{traced.services.url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as reply:
        lines = reply.iter_lines()
        next(line for line in lines if line)
        traced.services.workers["w0"].stop(signal.SIGKILL)
        traced.services.start_worker("w0")
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    root = f"text_completion {EMBEDDED_MODEL}"
    spans = traced.receiver.trace(context.trace_id, root, *PHASES, "worker_lost")
    check_tree(spans, context, root)
    lost = one(spans, "worker_lost")
    assert lost.attributes["pagoda.num_replays"] == 1
    assert one(spans, "worker").start >= lost.end - TOLERANCE_NS, "the span of the row that died never came"


def test_a_receiver_that_is_away_costs_spans_and_nothing_else() -> None:
    where = ("--otlp-traces-endpoint", f"http://127.0.0.1:{free_port()}")
    with cluster(scheduler_args=where, worker_args=where, gateway_args=where) as running:
        traced = Traced(running, Receiver())
        for _ in range(3):
            assert traced.chat(Context.new()).json()["usage"]["completion_tokens"] > 0
    assert running.gateway is not None
    for process in (running.gateway, running.workers["w0"], running.scheduler):
        assert process.popen.returncode == 0, "".join(process.text)
