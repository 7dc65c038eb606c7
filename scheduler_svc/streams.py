"""A long-lived stream: its two halves run until the peer leaves or we cut it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

import grpc
import grpc.aio

# What `read` returns once the peer has said all that it will. The stubs lack it.
END_OF_STREAM: Any = grpc.aio.EOF  # type: ignore[attr-defined]


TELL_TIMEOUT_S = 5.0


class StreamCut:
    """Ends one stream from elsewhere, with a status that says why. The first reason counts."""

    def __init__(self) -> None:
        self._future: asyncio.Future[tuple[grpc.StatusCode, str]] = asyncio.get_running_loop().create_future()

    def cut(self, code: grpc.StatusCode, reason: str) -> None:
        """End the stream; returns at once."""
        if not self._future.done():
            self._future.set_result((code, reason))

    @property
    def reason(self) -> str:
        """Why the stream was cut; empty while it lives."""
        return self._future.result()[1] if self._future.done() else ""

    async def open(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Send the headers; before anything else is sent.

        A first write would carry them, and a status that overtakes that write would carry them again, which
        gRPC refuses: the peer would never hear of the end.
        """
        await context.send_initial_metadata(())

    async def run(self, *halves: Coroutine[Any, Any, None]) -> None:
        """Run `halves` until one of them returns or `cut` is called."""
        tasks = [asyncio.create_task(half) for half in halves]
        try:
            ends: list[asyncio.Future[Any]] = [*tasks, self._future]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            # A peer that leaves in the middle of a read or a write is an end like any other.
            lost = isinstance(result, (asyncio.CancelledError, grpc.RpcError, grpc.aio.UsageError))
            if isinstance(result, BaseException) and not lost:
                raise result

    async def tell(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Abort the call with its status if it was cut; the last thing that a handler does.

        A status waits behind everything that the peer has not read, so a peer that reads nothing is not
        waited for long: the call is dropped without it.
        """
        if not self._future.done():
            return
        code, reason = self._future.result()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TELL_TIMEOUT_S):
                await context.abort(code, reason)
