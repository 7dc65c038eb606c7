"""Gateways and direct clients: requests in, outputs out, each stream with a coalescing outbox of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import grpc
import grpc.aio
import structlog

from pagoda.tracing import server_span
from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc.calls import handler
from scheduler_svc.codec import add_logprobs, encode_output, encode_vocabulary, fill_usage, split_rows
from scheduler_svc.core.events import Finish, RequestEnd, SessionOutput
from scheduler_svc.engine import Engine
from scheduler_svc.errors import InvalidRequest, RequestFailed, SchedulerError, abort
from scheduler_svc.streams import END_OF_STREAM, StreamCut

SERVICE = pb.DESCRIPTOR.services_by_name["SchedulerService"]
WHOLE_REQUEST = 4294967295
HELLO_TIMEOUT_S = 10.0
# What a peer may leave unread, in tokens; an entry of logprobs weighs as much as it takes on the wire.
MAX_PENDING = 1 << 20
LOGPROB_WEIGHT = 32

_STOP_REASONS = {
    pb.STOP_REASON_FINISHED: Finish.STOP,
    pb.STOP_REASON_CANCELLED: Finish.CANCELLED,
}


class _Live(NamedTuple):
    """A request of a stream that has not ended, and those of its samples that have not."""

    key: int
    samples: set[int]


class Pending(NamedTuple):
    """What an outbox held."""

    outputs: list[SessionOutput]
    ends: list[RequestEnd]
    failures: list[pb.RequestFailure]


class Outbox:
    """One stream's requests, and what it is still to be sent of them. The engine never waits for it."""

    def __init__(self, engine: Engine) -> None:
        self.stream = StreamCut()
        self.wake = asyncio.Event()
        self.greet = False  # what is served has changed and the peer has not been told
        self.number = engine.open_session(self)
        self._engine = engine
        self._live: dict[int, _Live] = {}
        self._pending = Pending([], [], [])
        self._weight = 0

    def submit(self, handle: int, request: pb.GenerateTokensRequest) -> None:
        """Start a request. Raises SchedulerError where it is refused."""
        key = self._engine.submit(self.number, handle, request)
        self._live[handle] = _Live(key, set(range(request.sampling.n or 1)))

    def holds(self, handle: int) -> bool:
        """Whether a request of this handle has not ended."""
        return handle in self._live

    def stop(self, handle: int, index: int | None, reason: Finish) -> None:
        """End a request or a sample; nothing more comes for it. No error when it had ended."""
        live = self._live.get(handle)
        if live is None:
            return
        if index is None:
            del self._live[handle]
        elif index not in live.samples:
            return
        else:
            live.samples.discard(index)
        self._engine.stop(live.key, index, reason)

    def verdict(self, handle: int, step: int, stopped: tuple[int, ...]) -> None:
        """Say which candidates of a beam search end. No error when the search had ended."""
        if (live := self._live.get(handle)) is not None:
            self._engine.verdict(live.key, step, stopped)

    def close(self) -> None:
        """The stream is over: its requests are cancelled."""
        for live in self._live.values():
            self._engine.stop(live.key, None, Finish.CANCELLED)
        self._live.clear()
        self._engine.close_session(self.number)

    # --------------------------------------------------------------------------------- what comes in

    def deliver(self, output: SessionOutput) -> None:
        """Take in what one step brought; returns at once."""
        for row in output.ended_rows:
            live = self._live.get(output.handles[row])
            if live is not None:
                live.samples.discard(output.indexes[row] if output.indexes else 0)
        if output.handles or output.prompts or output.candidates:
            num_entries = len(output.logprobs) + sum(len(part.entries) for part in output.prompts)
            self._add(output, len(output.tokens) + LOGPROB_WEIGHT * num_entries)
        for end in output.ended:
            self._request_ended(end)
        self.wake.set()

    def _add(self, output: SessionOutput, weight: int) -> None:
        self._pending.outputs.append(output)
        self._weight += weight + len(output.handles)
        if self._weight > MAX_PENDING:
            self.stream.cut(grpc.StatusCode.RESOURCE_EXHAUSTED, "the client reads too slowly")

    def _request_ended(self, end: RequestEnd) -> None:
        live = self._live.pop(end.handle, None)
        if live is None:
            return  # the caller stopped it, and is told no more
        for index in sorted(live.samples):
            if end.reasons[index] == Finish.CANCELLED:
                self._add(_cancelled_row(end.handle, index), 0)
        if end.failure:
            self._pending.failures.append(RequestFailed(end.failure).failure(end.handle))
        else:
            self._pending.ends.append(end)

    def sample_aborted(self, handle: int, index: int) -> None:
        """Somebody else ended one sample of a request that goes on."""
        live = self._live.get(handle)
        if live is not None and index in live.samples:
            live.samples.discard(index)
            self._add(_cancelled_row(handle, index), 0)
            self.wake.set()

    def refuse(self, handle: int, error: SchedulerError) -> None:
        """Tell the peer that a request was refused."""
        self._pending.failures.append(error.failure(handle))
        self.wake.set()

    # -------------------------------------------------------------------------------- what goes out

    def take(self) -> Pending:
        """Everything that waits to be sent, which then waits no more."""
        pending, self._pending = self._pending, Pending([], [], [])
        self._weight = 0
        return pending


def _cancelled_row(handle: int, index: int) -> SessionOutput:
    return SessionOutput([handle], [index], [0], [], [0], [int(Finish.CANCELLED)])


class SchedulerService:
    """Serves `Session` and `GenerateTokens`."""

    def __init__(self, engine: Engine, log: structlog.stdlib.BoundLogger) -> None:
        self._engine = engine
        self._log = log
        self._gateways: dict[int, Outbox] = {}
        engine.on_change.append(self._greet_all)

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """The service, for a server."""
        return handler(SERVICE, Session=self.session, GenerateTokens=self.generate_tokens)

    @property
    def num_sessions(self) -> int:
        """Gateways attached."""
        return len(self._gateways)

    def accepted(self) -> pb.SessionAccepted:
        """What is served now."""
        return pb.SessionAccepted(model=model_info(self._engine), num_workers=len(self._engine.workers))

    def _greet_all(self) -> None:
        for outbox in self._gateways.values():
            outbox.greet = True
            outbox.wake.set()

    # -------------------------------------------------------------------------------------- session

    async def session(self, _: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """One gateway, from its hello to the end of its stream."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await context.read()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no hello within {HELLO_TIMEOUT_S:g} s")
        if first is END_OF_STREAM or first.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "hello must be the first message")
        outbox = Outbox(self._engine)
        self._gateways[outbox.number] = outbox
        outbox.greet = True
        outbox.wake.set()
        log = self._log.bind(client=first.hello.client_name, session=outbox.number)
        log.info("session_opened", peer=context.peer())
        try:
            await outbox.stream.open(context)
            await outbox.stream.run(self._read(outbox, context), self._write(outbox, context))
        finally:
            del self._gateways[outbox.number]
            outbox.close()
            log.info("session_closed", reason=outbox.stream.reason)
        await outbox.stream.tell(context)

    async def _read(self, outbox: Outbox, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        while True:
            message = await context.read()
            if message is END_OF_STREAM:
                return
            kind = message.WhichOneof("message")
            if kind in _TAKEN:
                wrong = _TAKEN[kind](outbox, getattr(message, kind))
            elif kind == "vocabulary":
                self._engine.learn(encode_vocabulary(message.vocabulary))
                wrong = ""
            else:
                wrong = "hello is only the first message" if kind else "a message holds nothing"
            if wrong:
                outbox.stream.cut(grpc.StatusCode.INVALID_ARGUMENT, wrong)
                return

    async def _write(self, outbox: Outbox, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        while True:
            await outbox.wake.wait()
            outbox.wake.clear()
            if outbox.greet:
                outbox.greet = False
                await context.write(pb.SessionResponse(start=self.accepted()).SerializeToString())
            pending = outbox.take()
            if any(pending):
                await context.write(encode_output(pending.outputs, pending.ends, pending.failures))

    # --------------------------------------------------------------------------------- one request

    async def generate_tokens(
        self, request: pb.GenerateTokensRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """One request of a direct client; its deadline and its leaving cancel it."""
        given = request.traceparent or context.invocation_metadata()
        with server_span(self._engine.tracing, "GenerateTokens", given) as request.traceparent:
            outbox = Outbox(self._engine)
            try:
                try:
                    if request.sampling.await_verdicts:
                        raise InvalidRequest("sampling.await_verdicts", "needs a Session, which gives them")
                    outbox.submit(0, request)
                except SchedulerError as error:
                    await abort(context, error)
                await outbox.stream.open(context)
                await outbox.stream.run(self._write_one(outbox, context))
            finally:
                outbox.close()
            await outbox.stream.tell(context)

    async def _write_one(self, outbox: Outbox, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        while True:
            await outbox.wake.wait()
            outbox.wake.clear()
            pending = outbox.take()
            responses = list(_responses(pending.outputs))
            if pending.ends:
                if not responses:
                    responses.append(pb.GenerateTokensResponse())
                fill_usage(responses[-1].usage, pending.ends[0])
            for response in responses:
                await context.write(response)
            if pending.failures:
                await abort(context, RequestFailed(pending.failures[0].message))
            if pending.ends:
                return


def model_info(engine: Engine) -> pb.ModelInfo | None:
    """The model as the wire describes it; None while it is not known."""
    model = engine.model
    if model is None:
        return None
    names = pb.ModelInfo.DESCRIPTOR.fields_by_name  # what it tells is named as `ServedModel` has it
    return pb.ModelInfo(**{name: getattr(model, name) for name in names})


def _submit(outbox: Outbox, batch: pb.SubmitBatch) -> str:
    """Start requests; what is wrong with the batch itself, if anything is."""
    if len(batch.handles) != len(batch.requests):
        return f"submit has {len(batch.handles)} handles for {len(batch.requests)} requests"
    for handle, request in zip(batch.handles, batch.requests, strict=True):
        if outbox.holds(handle):
            return f"handle {handle} is in use; a handle is never used again"
        try:
            outbox.submit(handle, request)
        except SchedulerError as error:
            outbox.refuse(handle, error)
    return ""


def _stop(outbox: Outbox, batch: pb.StopBatch) -> str:
    """End requests or samples; what is wrong with the batch itself, if anything is."""
    if not len(batch.handles) == len(batch.indexes) == len(batch.reasons):
        return "the columns of stop are not parallel"
    for handle, index, reason in zip(batch.handles, batch.indexes, batch.reasons, strict=True):
        if reason not in _STOP_REASONS:
            return f"{reason} is no reason to stop"
        outbox.stop(handle, None if index == WHOLE_REQUEST else index, _STOP_REASONS[reason])
    return ""


def _verdicts(outbox: Outbox, batch: pb.VerdictBatch) -> str:
    """Pass on which candidates end; what is wrong with the batch itself, if anything is."""
    if not len(batch.handles) == len(batch.steps) == len(batch.num_stopped) or (
        sum(batch.num_stopped) != len(batch.stopped)
    ):
        return "the columns of verdicts are not parallel"
    stopped = iter(batch.stopped)
    for handle, step, count in zip(batch.handles, batch.steps, batch.num_stopped, strict=True):
        outbox.verdict(handle, step, tuple(islice(stopped, count)))
    return ""


_TAKEN: dict[str, Callable[[Outbox, Any], str]] = {"submit": _submit, "stop": _stop, "verdicts": _verdicts}


def _responses(outputs: list[SessionOutput]) -> Iterator[pb.GenerateTokensResponse]:
    for output in outputs:
        for part in output.prompts:
            response = pb.GenerateTokensResponse()
            add_logprobs(response.prompt_logprobs, part.entries)
            yield response
        for (_, index), row in split_rows(output):
            response = pb.GenerateTokensResponse(index=index, token_ids=row.tokens)
            if row.score is not None:
                response.score = row.score
            if row.reason is not None:
                response.finish_reason = pb.FinishReason.ValueType(row.reason)
            add_logprobs(response.logprobs, row.logprobs or ())
            yield response
