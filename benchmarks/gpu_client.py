"""The measuring client: one process, one Session with the scheduler, all requests of a run in one message.

It counts and does not look at single tokens, so that it takes next to nothing of the time it measures.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Sequence
from typing import Any, Protocol, Self

import grpc.aio

from benchmarks.gpu_rows import Outcome
from benchmarks.workload import END_ID, LOWEST_ID, Request
from pagoda import transport
from pagoda.v1 import scheduler_pb2 as pb
from pagoda.v1 import scheduler_pb2_grpc as rpc

WATCH_EVERY_S = 0.5


class RunError(Exception):
    """A run did not end as it must; the message says how far it got."""


class RefusedError(RunError):
    """Requests were refused; the session is as good as before."""


class Watched(Protocol):
    """The services that a run depends on."""

    def check(self) -> None:
        """Raises where one of them has ended."""

    def describe(self) -> str:
        """Their state now, for people."""


class Client:
    """An open session; use as a context manager.

    Args:
        address: host:port of the scheduler, which serves a model already.
        limit_s: the longest that one run may take.
        services: looked at twice a second during a run, which ends where one of them has ended.

    Raises:
        RunError: no session can be had.
    """

    def __init__(self, address: str, limit_s: float, services: Watched) -> None:
        self._limit_s, self._services = limit_s, services
        self._next_handle = 1
        self._runner = asyncio.Runner()
        self.vocab_size = 0
        try:
            self._runner.run(self._open(address))
        except BaseException:
            self._runner.close()
            raise

    async def _open(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=transport.CHANNEL_OPTIONS)
        stub: Any = rpc.SchedulerServiceStub(self._channel)
        self._call = stub.Session()
        await self._call.write(pb.SessionRequest(hello=pb.SessionHello(client_name="benchmark")))
        async with asyncio.timeout(self._limit_s):
            while not self.vocab_size:
                reply = await self._call.read()
                if reply is grpc.aio.EOF:  # type: ignore[attr-defined]
                    raise RunError(f"the session ended: {await self._call.details()}")
                self.vocab_size = reply.start.model.vocab_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        async def close() -> None:
            self._call.cancel()
            await self._channel.close()

        self._runner.run(close())
        self._runner.close()

    def run(
        self, requests: Sequence[Request], temperature: float, stops: Sequence[int] = (), n: int = 1,
        beam_width: int | None = None,
    ) -> Outcome:  # fmt: skip
        """See `gpu_rows.Engine.run`; n answers each, of a search with `beam_width` beams where it is given.
        Raises RunError where anything is not as it must be."""
        handles = range(self._next_handle, self._next_handle + len(requests))
        self._next_handle += len(requests)
        messages = [self._request(prompt, size, temperature, stops) for prompt, size in requests]
        for message in messages:
            message.sampling.n = n
            if beam_width is not None:
                message.sampling.beam_width = beam_width
        batch = pb.SessionRequest(submit=pb.SubmitBatch(handles=handles, requests=messages))
        received = _Received(handles)
        gc.collect()
        gc.disable()
        try:
            seconds = self._runner.run(self._watched(batch, received))
        finally:
            gc.enable()
        received.verify({h: n * size for h, (_, size) in zip(handles, requests, strict=True)}, not stops)
        return Outcome(seconds, received.num_tokens)

    def _request(
        self, prompt: Sequence[int], answer_len: int, temperature: float, stops: Sequence[int]
    ) -> pb.GenerateTokensRequest:
        if self.vocab_size < END_ID:  # a small model's vocabulary: folded, still clear of special tokens
            prompt = [LOWEST_ID + i % (self.vocab_size - LOWEST_ID) for i in prompt]
        params = pb.SamplingParams(
            temperature=temperature, max_tokens=answer_len, ignore_eos=True, stop_token_ids=stops
        )
        return pb.GenerateTokensRequest(prompt_token_ids=prompt, sampling=params)

    async def _watched(self, batch: pb.SessionRequest, received: _Received) -> float:
        drive = asyncio.create_task(self._drive(batch, received))
        deadline = time.monotonic() + self._limit_s
        while not drive.done():
            await asyncio.wait([drive], timeout=WATCH_EVERY_S)
            try:
                self._services.check()
                if time.monotonic() > deadline and not drive.done():
                    # Asked now, because the requests end with the read that is cancelled below.
                    state = f"{received.progress()}\n{self._services.describe()}"
                    raise RunError(f"not done after {self._limit_s:.0f} s: {state}")
            except Exception:
                drive.cancel()
                raise
        return drive.result()

    async def _drive(self, batch: pb.SessionRequest, received: _Received) -> float:
        call = self._call
        start = time.perf_counter()
        await call.write(batch)
        while received.num_open:
            reply = await call.read()
            if reply is grpc.aio.EOF:  # type: ignore[attr-defined]
                raise RunError(f"the session ended: {await call.details()}; {received.progress()}")
            received.take(reply.output)
        return time.perf_counter() - start


class _Received:
    """What has come of one run."""

    def __init__(self, handles: range) -> None:
        self._handles = handles
        self.num_open = len(handles)
        self.num_tokens = self.num_messages = 0
        self.last = time.monotonic()
        self._usages: dict[int, pb.Usage] = {}
        self._failures: list[pb.RequestFailure] = []

    def take(self, out: pb.OutputColumns) -> None:
        self.num_messages += 1
        self.num_tokens += len(out.tokens)
        self.last = time.monotonic()
        if out.failures or out.usage_handles:
            self._failures += out.failures
            self._usages.update(zip(out.usage_handles, out.usages, strict=True))
            self.num_open = len(self._handles) - len(self._usages) - len(self._failures)

    def progress(self) -> str:
        """For people."""
        return (
            f"{len(self._handles) - self.num_open} of {len(self._handles)} requests ended, "
            f"{self.num_tokens} tokens in {self.num_messages} messages, "
            f"the last one {time.monotonic() - self.last:.1f} s ago"
        )

    def verify(self, wanted: dict[int, int], exact: bool) -> None:
        """Raises RunError unless every answer has its length, all tokens came, and no cache helped."""
        if self._failures:
            first = self._failures[0]
            raise RefusedError(f"{len(self._failures)} requests failed: {first.field} {first.message}")
        lengths = {handle: usage.completion_tokens for handle, usage in self._usages.items()}
        if lengths.keys() != wanted.keys():
            raise RunError("other requests ended than were sent")
        wrong = [h for h, n in wanted.items() if lengths[h] != n and (exact or not 1 <= lengths[h] <= n)]
        if wrong:
            got, want = lengths[wrong[0]], wanted[wrong[0]]
            raise RunError(f"{len(wrong)} answers have a wrong length: {got} tokens, not {want}")
        if sum(lengths.values()) != self.num_tokens:
            raise RunError(f"{self.num_tokens} tokens came, {sum(lengths.values())} were counted")
        cached = sum(usage.cached_tokens for usage in self._usages.values())
        if cached:
            raise RunError(f"{cached} prompt tokens came from the prefix cache, which must be off")
