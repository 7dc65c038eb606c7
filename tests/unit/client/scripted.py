"""A real gRPC server that does what a test tells it, on a loop of its own, for both clients."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from pagoda.v1 import inference_pb2 as pb
from pagoda.v1 import inference_pb2_grpc, scheduler_pb2_grpc
from pagoda.v1 import scheduler_pb2 as spb

Act = Callable[[pb.GenerateRequest, grpc.aio.ServicerContext], AsyncIterator[pb.GenerateResponse]]


def token(
    *ids: int, text: str = "", index: int = 0, finish: spb.FinishReason = spb.FINISH_REASON_UNSPECIFIED
) -> pb.GenerateResponse:
    """A response with token ids; its text is one letter a token unless given."""
    text = text or "".join(chr(ord("a") + i) for i in ids)
    return pb.GenerateResponse(index=index, token_ids=ids, text=text, finish_reason=finish)


def last(*ids: int, index: int = 0, text: str = "") -> pb.GenerateResponse:
    """The last response of a request of three prompt tokens."""
    response = token(*ids, index=index, text=text, finish=spb.FINISH_REASON_STOP)
    response.usage.CopyFrom(spb.Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=len(ids)))
    return response


def failure(
    code: grpc.StatusCode, message: str = "no", *, field: str = "", retry_ms: int | None = None
) -> grpc.Status:
    """A gRPC status with rich details."""
    details = []
    if field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if retry_ms is not None:
        delay = duration_pb2.Duration(seconds=retry_ms // 1000, nanos=retry_ms % 1000 * 1_000_000)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return rpc_status.to_status(status_pb2.Status(code=code.value[0], message=message, details=packed))


def play(*steps: pb.GenerateResponse | grpc.Status | str) -> Act:
    """Send the responses in turn; a status ends the call with it; "hang" waits until the client leaves."""

    async def act(_: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        for step in steps:
            if step == "hang":
                await asyncio.sleep(60)
            elif isinstance(step, grpc.Status):
                await context.abort_with_status(step)
            else:
                yield step

    return act


class ScriptedControl(scheduler_pb2_grpc.ControlServiceServicer):
    """Streams the snapshots that it is given, then ends."""

    def __init__(self) -> None:
        self.snapshots: list[spb.Snapshot] = []
        self.asked: list[spb.WatchRequest] = []

    async def Watch(self, request: spb.WatchRequest, _: Any) -> Any:
        self.asked.append(request)
        for snapshot in self.snapshots:
            yield spb.WatchResponse(snapshot=snapshot)


class ScriptedServer(inference_pb2_grpc.InferenceServiceServicer):
    """Plays one act a Generate call, the last one for ever, and notes what it saw."""

    def __init__(self) -> None:
        self.acts: list[Act] = []
        self.unary_failures: list[grpc.Status] = []
        self.requests: list[pb.GenerateRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.cancelled = threading.Event()
        self.running = self.most_running = 0
        self.control = ScriptedControl()
        self.target = ""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> Any:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        act = self.acts.pop(0) if len(self.acts) > 1 else self.acts[0]
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            async for response in act(request, context):
                yield response
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.running -= 1

    def wait_running(self, count: int) -> None:
        """Block the calling thread until that many requests run at once."""
        deadline = time.monotonic() + 30
        while self.running < count:
            assert time.monotonic() < deadline, f"{self.running} of {count} run"
            time.sleep(0.01)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        await self._maybe_fail(context)
        text = request.text or "".join(m.role + m.content for m in request.chat.messages)
        return pb.TokenizeResponse(token_ids=[ord(c) for c in text], max_model_len=100)

    async def ListModels(self, _: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        await self._maybe_fail(context)
        info = spb.ModelInfo(name="m", vocab_size=50, max_model_len=100, eos_token_ids=[2], dtype="float32")
        return pb.ListModelsResponse(models=[info])

    async def _maybe_fail(self, context: Any) -> None:
        if self.unary_failures:
            await context.abort_with_status(self.unary_failures.pop(0))


@contextmanager
def serving(*acts: Act) -> Iterator[ScriptedServer]:
    """A `ScriptedServer` on a free port, in a thread."""
    loop, servicer = asyncio.new_event_loop(), ScriptedServer()
    servicer.acts = list(acts)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(task: Awaitable[Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(task, loop).result(20)  # type: ignore[arg-type]

    async def start() -> grpc.aio.Server:
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
        scheduler_pb2_grpc.add_ControlServiceServicer_to_server(servicer.control, server)
        servicer.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        return server

    server = run(start())
    try:
        yield servicer
    finally:
        run(server.stop(None))
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


def resumed(request: pb.GenerateRequest) -> list[tuple[Sequence[int], bool]]:
    """What a request says that the caller has."""
    return [(list(sample.token_ids), sample.finished) for sample in request.resume]
