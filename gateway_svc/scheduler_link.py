"""The gateway's one stream to the scheduler: many requests, one message a step each way.

What is submitted and stopped during one turn of the event loop leaves as one message. Outputs come as
columns and are handed to the request that each row belongs to. A lost stream is redialled; the requests that
ran on it fail with UNAVAILABLE, and new ones are refused until it is back.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import grpc
import grpc.aio
import structlog

from gateway_svc.errors import Overloaded, RequestFailed, Unavailable
from gateway_svc.generation import Generation
from pagoda.transport import CHANNEL_OPTIONS, bearer
from pagoda.v1 import scheduler_pb2 as pb
from pagoda.v1 import scheduler_pb2_grpc as rpc

WHOLE_REQUEST = 0xFFFFFFFF
MAX_TOKENS_A_MESSAGE = 1 << 20  # prompts of one SubmitBatch, far below the limit of a gRPC message
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.1, 1.0


class SchedulerLink:
    """Requests by handle. All of it runs on one event loop."""

    def __init__(self, address: str, token: str, client_name: str, max_requests: int) -> None:
        self.address = address
        self.model: pb.ModelInfo | None = None
        self.num_workers = 0
        self.connected = False
        self.vocabulary: pb.Vocabulary | None = None  # told before the first request with a grammar
        self._token = token
        self._client_name = client_name
        self._max_requests = max_requests
        self._handles = itertools.count(1)
        self._open: dict[int, Generation] = {}
        self._handle_of: dict[Generation, int] = {}
        self._submits: list[tuple[int, pb.GenerateTokensRequest]] = []
        self._stops: list[tuple[int, int, pb.StopReason.ValueType]] = []
        self._verdicts = pb.VerdictBatch()
        self._outbox_filled = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []
        self._log = structlog.get_logger().bind(service="gateway", scheduler=address)

    @property
    def ready(self) -> bool:
        """A request that comes now can be served."""
        return self.connected and self.model is not None and self.num_workers > 0

    @property
    def num_open(self) -> int:
        """Requests in flight."""
        return len(self._open)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever `ready` may have changed."""
        self._listeners.append(listener)

    def served_model(self) -> pb.ModelInfo:
        """The model that the workers hold.

        Raises:
            Unavailable: there is no scheduler, or no worker has told it yet.
        """
        if not self.connected:
            raise Unavailable(f"the scheduler at {self.address} is not connected; retrying", "disconnected")
        if self.model is None:
            raise Unavailable("no worker has attached yet; the model is loading", "starting")
        return self.model

    def submit(self, generation: Generation) -> None:
        """Start a request.

        Raises:
            Unavailable: there is no scheduler, or no model yet.
            Overloaded: too many requests are in flight.
        """
        self.served_model()
        if len(self._open) >= self._max_requests:
            raise Overloaded(f"{len(self._open)} requests are in flight here, which is the bound; try again")
        request = generation.request()
        handle = next(self._handles)
        self._open[handle] = generation
        self._handle_of[generation] = handle
        self._submits.append((handle, request))
        self._outbox_filled.set()

    def cancel(self, generation: Generation) -> None:
        """The client has left. What has ended already is left alone."""
        handle = self._handle_of.get(generation)
        if handle is not None:
            self._forget(handle)
            self._stop(handle, WHOLE_REQUEST, pb.STOP_REASON_CANCELLED)

    def abandon(self, reason: str) -> None:
        """Fail every request in flight; the scheduler drops them when the stream ends."""
        for handle in list(self._open):
            self._forget(handle).on_failure(Unavailable(f"{reason}; try again", "draining"))

    async def run(self) -> None:
        """Keep a session up until cancelled."""
        backoff = FIRST_BACKOFF_S
        reported = ""
        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            stub = rpc.SchedulerServiceStub(channel)
            while True:
                reason = await self._session(stub)
                if self.connected:
                    backoff, reported = FIRST_BACKOFF_S, ""
                self._lose(reason)
                if reason != reported:
                    self._log.warning("session_lost", reason=reason)
                    reported = reason
                await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
                backoff = min(2 * backoff, MAX_BACKOFF_S)

    async def _session(self, stub: Any) -> str:
        """One session from hello to its end; why it ended."""
        call = stub.Session(metadata=bearer(self._token))
        halves = [asyncio.create_task(self._read(call)), asyncio.create_task(self._write(call))]
        try:
            await asyncio.wait(halves, return_when=asyncio.FIRST_COMPLETED)
            if any(half.done() and not half.cancelled() and _is_a_fault(half.exception()) for half in halves):
                return "a fault in the gateway"
            return f"{(await call.code()).name}: {await call.details()}"
        finally:
            call.cancel()
            for half in halves:
                half.cancel()
            for result in await asyncio.gather(*halves, return_exceptions=True):
                if _is_a_fault(result):
                    raise result

    async def _read(self, call: Any) -> None:
        while (message := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            if message.HasField("output"):
                self._deliver(message.output, time.monotonic())
            elif message.HasField("start"):
                self._accept(message.start)

    async def _write(self, call: Any) -> None:
        """Send what has gathered since the last message, submits before the stops that may name them."""
        await call.write(pb.SessionRequest(hello=pb.SessionHello(client_name=self._client_name)))
        told: pb.Vocabulary | None = None
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            submits, self._submits = self._submits, []
            stops, self._stops = self._stops, []
            verdicts, self._verdicts = self._verdicts, pb.VerdictBatch()
            if told is not self.vocabulary and any(request.sampling.grammar for _, request in submits):
                told = self.vocabulary
                await call.write(pb.SessionRequest(vocabulary=told))
            for batch in _batches(submits):
                await call.write(pb.SessionRequest(submit=batch))
            if stops:
                handles, indexes, reasons = zip(*stops, strict=True)
                ended = pb.StopBatch(handles=handles, indexes=indexes, reasons=reasons)
                await call.write(pb.SessionRequest(stop=ended))
            if verdicts.handles:
                await call.write(pb.SessionRequest(verdicts=verdicts))

    def _accept(self, start: pb.SessionAccepted) -> None:
        if not self.connected:
            self._log.info("session_up", num_workers=start.num_workers)
        self.connected = True
        self.model = start.model if start.HasField("model") else None
        self.num_workers = start.num_workers
        self._changed()

    def _lose(self, reason: str) -> None:
        """The stream is gone, and with it every request that ran on it."""
        self.connected = False
        self.num_workers = 0
        self._submits.clear()
        self._stops.clear()
        self._verdicts.Clear()
        for handle in list(self._open):
            lost = Unavailable(f"the scheduler was lost ({reason}); try again", "scheduler_lost")
            self._forget(handle).on_failure(lost)
        self._changed()

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()

    def _deliver(self, output: pb.OutputColumns, now: float) -> None:
        """Hand every row to its request."""
        tokens, indexes, counts = list(output.tokens), list(output.indexes), list(output.num_tokens)
        reasons = dict(zip(output.ended_rows, output.ended_reasons, strict=True)) if output.ended_rows else {}
        scores = dict(zip(output.score_rows, output.scores, strict=True)) if output.score_rows else {}
        with_logprobs = frozenset(output.logprob_rows)
        if output.prompt_handles:
            self._deliver_prompts(output)
        logprobs_used = start = 0
        for row, handle in enumerate(output.handles):
            end = start + (counts[row] if counts else 1)
            logprobs: list[pb.TokenLogprob] = []
            if row in with_logprobs:
                logprobs = list(output.logprobs[logprobs_used : logprobs_used + end - start])
                logprobs_used += end - start
            generation = self._open.get(handle)
            if generation is not None:
                index = indexes[row] if indexes else 0
                reason = reasons.get(row, 0)
                if generation.on_row(index, tokens[start:end], logprobs, reason, now, scores.get(row)):
                    self._stop(handle, index, pb.STOP_REASON_FINISHED)
            start = end
        for handle, usage in zip(output.usage_handles, output.usages, strict=True):
            if handle in self._open:
                self._forget(handle).on_usage(usage)
        for failure in output.failures:
            if failure.handle in self._open:
                self._forget(failure.handle).on_failure(RequestFailed(failure))
        for candidates in output.candidates:
            self._judge(candidates)

    def _judge(self, candidates: pb.BeamCandidates) -> None:
        """Say which candidates a stop string ends; their search waits for it."""
        generation = self._open.get(candidates.handle)
        if generation is None or generation.verdicts is None:
            return
        stopped = generation.verdicts.judge(candidates.step, candidates.parents, candidates.token_ids)
        self._verdicts.handles.append(candidates.handle)
        self._verdicts.steps.append(candidates.step)
        self._verdicts.num_stopped.append(len(stopped))
        self._verdicts.stopped.extend(stopped)
        self._outbox_filled.set()

    def _deliver_prompts(self, output: pb.OutputColumns) -> None:
        """Hand the logprobs of prompts to their requests, before anything that was drawn after them."""
        start = 0
        for handle, count in zip(output.prompt_handles, output.num_prompt_logprobs, strict=True):
            generation = self._open.get(handle)
            if generation is not None:
                generation.prompt_logprobs += output.prompt_logprobs[start : start + count]
            start += count

    def _stop(self, handle: int, index: int, reason: pb.StopReason.ValueType) -> None:
        self._stops.append((handle, index, reason))
        self._outbox_filled.set()

    def _forget(self, handle: int) -> Generation:
        generation = self._open.pop(handle)
        del self._handle_of[generation]
        return generation


def _batches(submits: list[tuple[int, pb.GenerateTokensRequest]]) -> Iterator[pb.SubmitBatch]:
    """As few messages as their size allows."""
    batch, size = pb.SubmitBatch(), 0
    for handle, request in submits:
        batch.handles.append(handle)
        batch.requests.append(request)
        size += len(request.prompt_token_ids) + len(request.sampling.grammar)
        if size >= MAX_TOKENS_A_MESSAGE:
            yield batch
            batch, size = pb.SubmitBatch(), 0
    if batch.handles:
        yield batch


def _is_a_fault(result: BaseException | None) -> TypeGuard[BaseException]:
    """Whether this is a bug, and not the peer going away in the middle of a read or a write."""
    expected = (grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError, asyncio.CancelledError)
    return result is not None and not isinstance(result, expected)
