"""The scheduler's state for those who look at the page: one `Watch` for all of them, none for nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import grpc.aio
import msgspec

from gateway_svc.openai import replies
from gateway_svc.ui.state import state_of
from pagoda.transport import CHANNEL_OPTIONS, bearer
from pagoda.v1 import scheduler_pb2 as pb
from pagoda.v1 import scheduler_pb2_grpc as rpc

# A snapshot costs the scheduler's loop 0.3 us a block: 16 ms of it for 50,000.
INTERVAL_MS, INTERVAL_OF_MANY_MS, MANY_BLOCKS = 250, 500, 16_384
RETRY_S = 1.0
MAX_REQUESTS = 512  # the oldest; blocks of others have no name on the map


class Trouble(msgspec.Struct):
    """An event instead of a state: why there is none."""

    error: str


class LiveState:
    """Events for any number of viewers. All of it runs on one event loop."""

    def __init__(self, scheduler: str, token: str) -> None:
        self._scheduler = scheduler
        self._token = token
        self._num_viewers = 0
        self._task: asyncio.Task[None] | None = None
        self._event = b""
        self._news = asyncio.Event()
        self._closed = False

    @property
    def watching(self) -> bool:
        """Whether the scheduler is being watched."""
        return self._task is not None

    async def events(self) -> AsyncGenerator[bytes]:
        """Server-sent events, the newest each time: a viewer that is slow misses some. Ends with `close`.

        Whoever iterates must close the generator in the end (`contextlib.aclosing`).
        """
        self._num_viewers += 1
        try:
            if self._task is None and not self._closed:
                self._task = asyncio.create_task(self._follow())
                self._task.add_done_callback(self._on_end)
            while not self._closed:
                # Taken before the event is handed out, so that none that comes meanwhile is overlooked.
                news = self._news
                if self._event:
                    yield self._event
                await news.wait()
                if self._task is not None and self._task.done():
                    return
        finally:
            self._num_viewers -= 1
            if not self._num_viewers:
                await self._stop()

    async def close(self) -> None:
        """End every viewer's stream."""
        self._closed = True
        await self._stop()

    async def _stop(self) -> None:
        task, self._task, self._event = self._task, None, b""
        self._wake()
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()  # a fault of ours, for the log

    async def _follow(self) -> None:
        """Watch the scheduler until cancelled; say so while it is away."""
        async with grpc.aio.insecure_channel(self._scheduler, options=CHANNEL_OPTIONS) as channel:
            stub: Any = rpc.ControlServiceStub(channel)  # type: ignore[no-untyped-call]
            interval_ms = INTERVAL_MS
            while True:
                try:
                    interval_ms = await self._watch(stub, interval_ms)
                    continue
                except grpc.aio.AioRpcError as failure:
                    reason = f"{failure.code().name}: {failure.details()}"
                except ConnectionError as failure:
                    reason = str(failure)
                text = f"The scheduler at {self._scheduler} cannot be watched ({reason}); trying again."
                self._publish(_encode(Trouble(text)))
                await asyncio.sleep(RETRY_S)

    async def _watch(self, stub: Any, interval_ms: int) -> int:
        """Publish states until another interval is due; that interval.

        Raises:
            AioRpcError, ConnectionError: the scheduler is away, refuses, or ended the stream.
        """
        options = pb.SnapshotRequest(include_requests=True, include_blocks=True, max_requests=MAX_REQUESTS)
        request = pb.WatchRequest(options=options, interval_ms=interval_ms)
        call = stub.Watch(request, metadata=bearer(self._token))
        async for response in call:
            # Not on the loop that streams tokens: tens of thousands of blocks take milliseconds.
            event = await asyncio.to_thread(_event_of, response.snapshot)
            self._publish(event)
            due = interval_for(response.snapshot)
            if due != interval_ms:
                call.cancel()
                return due
        raise ConnectionError("it ended the stream")

    def _publish(self, event: bytes) -> None:
        self._event = event
        self._wake()

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if task is self._task:  # a fault of ours: nobody stopped it
            self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def interval_for(snapshot: pb.Snapshot) -> int:
    """Milliseconds from one snapshot to the next, for a cache of this size."""
    many = sum(worker.num_blocks for worker in snapshot.workers) > MANY_BLOCKS
    return INTERVAL_OF_MANY_MS if many else INTERVAL_MS


def _event_of(snapshot: pb.Snapshot) -> bytes:
    return _encode(state_of(snapshot))


def _encode(data: msgspec.Struct) -> bytes:
    return b"data: " + replies.encode(data) + b"\n\n"
