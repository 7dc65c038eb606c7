"""A gateway as far as the scheduler can tell: one Session, many requests, tokens collected by request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from pagoda import transport
from pagoda.v1 import scheduler_pb2 as pb
from pagoda.v1 import scheduler_pb2_grpc as pb_grpc

WHOLE_REQUEST = 4294967295
LEAVE_S = 5.0  # longest wait for a scheduler that is told that we leave


@dataclass
class Received:
    """What came for one request."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, list[pb.TokenLogprob]] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    prompt_logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    usage: pb.Usage | None = None
    failure: pb.RequestFailure | None = None
    began: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class SessionClient:
    """Use as an async context manager; `accepted` is the newest SessionAccepted."""

    def __init__(self, address: str, token: str = "", name: str = "test") -> None:
        self.judge: Callable[[pb.BeamCandidates], list[int]] | None = None  # places of those that end
        self.received: dict[int, Received] = {}
        self.accepted: list[pb.SessionAccepted] = []
        self.num_messages = 0
        self._address, self._token, self._name = address, token, name
        self._next_handle = 1
        self._writing = asyncio.Lock()  # a stream takes one write at a time, and tests submit from many tasks

    async def __aenter__(self) -> SessionClient:
        self._channel = grpc.aio.insecure_channel(self._address, options=transport.CHANNEL_OPTIONS)
        stub: Any = pb_grpc.SchedulerServiceStub(self._channel)
        self.call = stub.Session(metadata=transport.bearer(self._token))
        await self.call.write(pb.SessionRequest(hello=pb.SessionHello(client_name=self._name)))
        self._take(await self.call.read())
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        # We close our half, and the scheduler ends the stream. A cancelled call would be over for us at once
        # but not for gRPC, which would bring its status to a loop that may be closed by then.
        await self.call.done_writing()
        await asyncio.wait([self._reader], timeout=LEAVE_S)
        self.call.cancel()
        # So would a read that is under way, where the scheduler says nothing more.
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close()

    async def _read(self) -> None:
        while True:
            message = await self.call.read()
            if message is grpc.aio.EOF:  # type: ignore[attr-defined]
                return
            self._take(message)
            for asked in message.output.candidates:
                assert self.judge is not None, "candidates came that nobody asked for"
                stopped = self.judge(asked)
                batch = pb.VerdictBatch(
                    handles=[asked.handle], steps=[asked.step], num_stopped=[len(stopped)], stopped=stopped
                )
                await self._write(pb.SessionRequest(verdicts=batch))

    async def ended_with(self) -> grpc.StatusCode:
        """Wait until the scheduler ends the stream; the status."""
        code: grpc.StatusCode = await self.call.code()
        return code

    async def submit(self, *requests: pb.GenerateTokensRequest) -> list[int]:
        """Send requests in one message; their handles."""
        handles = list(range(self._next_handle, self._next_handle + len(requests)))
        self._next_handle += len(requests)
        self.received.update((handle, Received()) for handle in handles)
        batch = pb.SubmitBatch(handles=handles, requests=requests)
        await self._write(pb.SessionRequest(submit=batch))
        return handles

    async def stop(self, handle: int, index: int | None = None, finished: bool = False) -> None:
        """End a request or one sample."""
        reason = pb.STOP_REASON_FINISHED if finished else pb.STOP_REASON_CANCELLED
        place = WHOLE_REQUEST if index is None else index
        batch = pb.StopBatch(handles=[handle], indexes=[place], reasons=[reason])
        await self._write(pb.SessionRequest(stop=batch))

    async def _write(self, message: pb.SessionRequest) -> None:
        async with self._writing:
            await self.call.write(message)

    async def results(self, handles: Sequence[int]) -> list[Received]:
        """Wait for the end of all of `handles`. Raises AssertionError where the stream ends before."""
        wanted = [self.received[handle] for handle in handles]
        for received in wanted:
            end = asyncio.create_task(received.ended.wait())
            try:
                await asyncio.wait([self._reader, end], return_when=asyncio.FIRST_COMPLETED)
            finally:
                end.cancel()
            if not received.ended.is_set():
                self._reader.result()  # raises what was wrong with a message, if that was the end
                raise AssertionError(
                    f"the stream ended: {await self.call.code()} {await self.call.details()}"
                )
        return wanted

    def _take(self, message: pb.SessionResponse) -> None:
        self.num_messages += 1
        if message.HasField("start"):
            self.accepted.append(message.start)
            return
        out = message.output
        start = entry = 0
        with_logprobs = set(out.logprob_rows)
        reasons = dict(zip(out.ended_rows, out.ended_reasons, strict=True))
        for row, handle in enumerate(out.handles):
            index = out.indexes[row] if out.indexes else 0
            count = out.num_tokens[row] if out.num_tokens else 1
            received = self.received[handle]
            assert index not in received.reasons, "something came for a sample that had ended"
            received.began.set()
            received.tokens.setdefault(index, []).extend(out.tokens[start : start + count])
            start += count
            if row in with_logprobs:
                received.logprobs.setdefault(index, []).extend(out.logprobs[entry : entry + count])
                entry += count
            if row in reasons:
                received.reasons[index] = reasons[row]
        for row, score in zip(out.score_rows, out.scores, strict=True):
            self.received[out.handles[row]].scores[out.indexes[row] if out.indexes else 0] = score
        told = 0
        for handle, count in zip(out.prompt_handles, out.num_prompt_logprobs, strict=True):
            received = self.received[handle]
            received.prompt_logprobs.extend(out.prompt_logprobs[told : told + count])
            told += count
        assert told == len(out.prompt_logprobs), "columns do not add up"
        assert start == len(out.tokens) and entry == len(out.logprobs), "columns do not add up"
        for handle, usage in zip(out.usage_handles, out.usages, strict=True):
            self.received[handle].usage = usage
            self.received[handle].ended.set()
        for failure in out.failures:
            self.received[failure.handle].failure = failure
            self.received[failure.handle].ended.set()


def request(prompt: Sequence[int], request_id: str = "", **sampling: Any) -> pb.GenerateTokensRequest:
    """A request; keywords are SamplingParams fields."""
    params = pb.SamplingParams(**sampling)
    return pb.GenerateTokensRequest(request_id=request_id, prompt_token_ids=prompt, sampling=params)
