"""One Session of the long run: it writes in order, reads, and ends requests when their moment has come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grpc
import grpc.aio

from benchmarks.gpu_soak_book import Book
from benchmarks.gpu_soak_load import End, Planned
from pagoda import transport
from pagoda.v1 import scheduler_pb2 as pb
from pagoda.v1 import scheduler_pb2_grpc as rpc

WHOLE_REQUEST = 4294967295
STOPS = {
    End.CANCELLED: pb.STOP_REASON_CANCELLED,
    End.FINISHED: pb.STOP_REASON_FINISHED,
    End.SAMPLE_CANCELLED: pb.STOP_REASON_CANCELLED,
}


class _Stop(NamedTuple):
    handle: int
    sample: int
    reason: pb.StopReason.ValueType


class _Submit(NamedTuple):
    handle: int
    request: pb.GenerateTokensRequest


class SessionEndedError(Exception):
    """The scheduler ended a session, which nobody had asked for."""


class Session:
    """An open session. `vocab_size` and the like are those of the model that is served."""

    def __init__(self, address: str, name: str, abort: Callable[[str], None]) -> None:
        """`abort` is what asks an operator to end a request by its id."""
        self.book = Book(0)
        self.model = pb.ModelInfo()
        self._address, self._name, self._abort = address, name, abort
        self._pending: list[_Submit | _Stop] = []
        self._wake = asyncio.Event()
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._watched: dict[int, tuple[Planned, int]] = {}  # stopped at so many tokens of all samples
        self._tasks: list[asyncio.Task[None]] = []
        self._leaving = False

    async def open(self, timeout_s: float) -> None:
        """Say hello and wait until a model is served. Raises SessionEndedError, TimeoutError."""
        self._channel = grpc.aio.insecure_channel(self._address, options=transport.CHANNEL_OPTIONS)
        stub: Any = rpc.SchedulerServiceStub(self._channel)
        self._call = stub.Session()
        await self._call.write(pb.SessionRequest(hello=pb.SessionHello(client_name=self._name)))
        async with asyncio.timeout(timeout_s):
            while not self.model.vocab_size:
                reply = await self._call.read()
                if reply is grpc.aio.EOF:  # type: ignore[attr-defined]
                    raise SessionEndedError(f"{self._name}: {await self._call.details()}")
                self.model = reply.start.model
        self.book = Book(self.model.vocab_size)
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]

    def check(self) -> None:
        """Raises what ended the session, if anything has."""
        for task in self._tasks:
            if task.done() and not self._leaving:
                task.result()
                raise SessionEndedError(f"{self._name} ended")

    async def leave(self, politely: bool) -> None:
        """End the session with all that is open in it: by closing our half, or all at once."""
        self._leaving = True
        for timer in self._timers.values():
            timer.cancel()
        if politely:
            await self._call.done_writing()
            await asyncio.wait(self._tasks[:1], timeout=5.0)
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()
        self.book.drop()

    # ------------------------------------------------------------------------------------- outwards

    def submit(self, planned: Planned) -> None:
        """Send a request with the next message, and see to its end."""
        first, *again = self.book.send(planned)
        self._pending += [_Submit(handle, planned.request) for handle in (first, *again)]
        self._wake.set()
        moment = planned.moment
        if moment is None:
            return
        if moment.tokens is not None:
            self._watched[first] = planned, moment.tokens
        elif not moment.seconds:
            self._change_mind(first, planned)
        else:
            timer = asyncio.get_running_loop().call_later(moment.seconds, self._change_mind, first, planned)
            self._timers[first] = timer

    def _change_mind(self, handle: int, planned: Planned) -> None:
        self._timers.pop(handle, None)
        if planned.end is End.ABORTED:
            if handle in self.book.open:
                self._abort(planned.request.request_id)
            return
        if planned.end is End.SAMPLE_CANCELLED:
            index, goes = planned.index, self.book.stop_sample(handle, planned.index)
        else:
            index, goes = WHOLE_REQUEST, self.book.stop(handle)
        if goes:
            self._pending.append(_Stop(handle, index, STOPS[planned.end]))
            self._wake.set()

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            pending, self._pending = self._pending, []
            for message in _messages(pending):
                await self._call.write(message)

    # -------------------------------------------------------------------------------------- inwards

    async def _read(self) -> None:
        while True:
            message = await self._call.read()
            if message is grpc.aio.EOF:  # type: ignore[attr-defined]
                if self._leaving:
                    return
                raise SessionEndedError(
                    f"{self._name}: {await self._call.code()} {await self._call.details()}"
                )
            if not message.HasField("output"):
                continue
            self.book.take(message.output)
            for handle in set(message.output.handles) & self._watched.keys():
                planned, at = self._watched[handle]
                entry = self.book.open.get(handle)
                if entry is None:
                    del self._watched[handle]
                elif sum(entry.counts) >= at:
                    del self._watched[handle]
                    self._change_mind(handle, planned)


def _messages(pending: list[_Submit | _Stop]) -> Iterator[pb.SessionRequest]:
    """As few messages as keep the order."""
    message: pb.SessionRequest | None = None
    for item in pending:
        kind = "submit" if isinstance(item, _Submit) else "stop"
        if message is not None and message.WhichOneof("message") != kind:
            yield message
            message = None
        message = message or pb.SessionRequest()
        if isinstance(item, _Submit):
            message.submit.handles.append(item.handle)
            message.submit.requests.append(item.request)
        else:
            message.stop.handles.append(item.handle)
            message.stop.indexes.append(item.sample)
            message.stop.reasons.append(item.reason)
    if message is not None:
        yield message
