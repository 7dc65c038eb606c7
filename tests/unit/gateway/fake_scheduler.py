"""A scheduler for tests: a real gRPC server of `SchedulerService` whose tokens are scripted.

    fake = FakeScheduler(vocab_size, eos)
    fake.script = lambda request, index: [...]   # the output tokens of a sample
    async with fake: ...                          # listens on fake.address

It steps at `interval_s`, gives each live row `tokens_a_step` tokens, and packs everything for a session into
one message a step, as the real one does. What gateways sent is in `submitted`, `stopped`, `judged` and
`messages`. Beam searches are scripted, too: `fake.search` says which candidates come, step by step, each
after the verdict on the one before, and then with which results the search ends.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from pagoda.transport import SERVER_OPTIONS, server_interceptors
from pagoda.v1 import scheduler_pb2 as pb
from pagoda.v1 import scheduler_pb2_grpc as rpc

WHOLE_REQUEST = 0xFFFFFFFF
Script = Callable[[pb.GenerateTokensRequest, int], list[int]]
Step = tuple[int, list[int], list[int]]  # its number, parents and tokens
Result = tuple[list[int], int, float]  # tokens, why it ended, score


@dataclass
class Row:
    """One sample that runs."""

    handle: int
    index: int
    script: list[int]
    max_tokens: int
    stop_ids: frozenset[int]
    logprobs: int | None
    end_with: int
    num_sent: int = 0
    ended: bool = False

    def step(self, count: int) -> tuple[list[int], int]:
        """The next tokens, and the reason if they are the last."""
        tokens: list[int] = []
        while len(tokens) < count and self.num_sent < len(self.script):
            tokens.append(self.script[self.num_sent])
            self.num_sent += 1
            if tokens[-1] in self.stop_ids:
                return tokens, pb.FINISH_REASON_STOP
            if self.num_sent >= self.max_tokens:
                return tokens, pb.FINISH_REASON_LENGTH
        return tokens, 0 if self.num_sent < len(self.script) else self.end_with


@dataclass
class Search:
    """One beam search that runs."""

    handle: int
    steps: list[Step]
    results: list[Result]
    awaits: int | None = None  # the verdict on this step


@dataclass
class Stream:
    """One gateway's stream."""

    number: int
    rows: list[Row] = field(default_factory=list)
    searches: list[Search] = field(default_factory=list)
    open: dict[int, pb.GenerateTokensRequest] = field(default_factory=dict)
    untold: dict[int, pb.GenerateTokensRequest] = field(default_factory=dict)  # whose prompts have logprobs
    failures: list[pb.RequestFailure] = field(default_factory=list)
    over: bool = False


class FakeScheduler(rpc.SchedulerServiceServicer):
    """See above."""

    def __init__(self, vocab_size: int = 49152, eos: int = 2, max_model_len: int = 8192) -> None:
        self.script: Script = lambda request, index: [eos]
        self.search: Callable[[pb.GenerateTokensRequest], tuple[list[Step], list[Result]]] = self._find
        self.refuse: Callable[[pb.GenerateTokensRequest], pb.RequestFailure | None] = lambda request: None
        self.interval_s = 0.0005
        self.tokens_a_step = 1
        self.cached_tokens = 0
        self.end_with: int = pb.FINISH_REASON_LENGTH  # the reason when a script is over
        self.num_workers = 1
        self.token = ""
        self.model: pb.ModelInfo | None = pb.ModelInfo(
            name="fake", vocab_size=vocab_size, max_model_len=max_model_len, eos_token_ids=[eos], digest="0"
        )
        self.submitted: list[pb.GenerateTokensRequest] = []
        self.stopped: list[tuple[str, int, int]] = []  # request id, index, reason
        self.judged: list[tuple[int, list[int]]] = []  # step, places of the candidates that end
        self.messages: Counter[str] = Counter()
        self.sessions: list[Stream] = []
        self.submits_by_session: Counter[int] = Counter()  # by the order in which they came
        self.paused = asyncio.Event()
        self.paused.set()
        self.port = 0
        self._announce: dict[int, asyncio.Event] = {}
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def num_live_rows(self) -> int:
        return sum(len(session.rows) for session in self.sessions)

    async def __aenter__(self) -> FakeScheduler:
        await self.start()
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; on the same port as before, if there was one."""
        self._server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=server_interceptors(self.token))
        rpc.add_SchedulerServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        """Break every stream at once."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def announce(self) -> None:
        """Send `model` and `num_workers` again, as when a worker came or went."""
        for event in self._announce.values():
            event.set()

    async def Session(
        self, requests: AsyncIterator[pb.SessionRequest], context: Any
    ) -> AsyncIterator[pb.SessionResponse]:
        hello = await context.read()
        assert hello.HasField("hello"), "the first message of a session is hello"
        session = Stream(len(self.submits_by_session))
        self.submits_by_session[session.number] = 0
        self.sessions.append(session)
        announce = self._announce[id(session)] = asyncio.Event()
        announce.set()
        reader = asyncio.create_task(self._read(requests, session))
        try:
            while not reader.done():
                if announce.is_set():
                    announce.clear()
                    yield pb.SessionResponse(
                        start=pb.SessionAccepted(model=self.model, num_workers=self.num_workers)
                    )
                output = self._step(session)
                if output is not None:
                    yield pb.SessionResponse(output=output)
                await asyncio.sleep(self.interval_s)
                await self.paused.wait()
            await reader
        finally:
            reader.cancel()
            self.sessions.remove(session)

    async def _read(self, requests: AsyncIterator[pb.SessionRequest], session: Stream) -> None:
        async for message in requests:
            kind = message.WhichOneof("message")
            self.messages[str(kind)] += 1
            if kind == "submit":
                for handle, request in zip(message.submit.handles, message.submit.requests, strict=True):
                    self._submit(session, handle, request)
            elif kind == "stop":
                columns = message.stop
                for stop in zip(columns.handles, columns.indexes, columns.reasons, strict=True):
                    self._stop(session, *stop)
            elif kind == "verdicts":
                stopped = iter(message.verdicts.stopped)
                given = message.verdicts
                for handle, step, count in zip(given.handles, given.steps, given.num_stopped, strict=True):
                    self.judged.append((step, [next(stopped) for _ in range(count)]))
                    (search,) = [search for search in session.searches if search.handle == handle]
                    assert search.awaits == step
                    search.awaits = None
                assert not list(stopped)

    def _submit(self, session: Stream, handle: int, request: pb.GenerateTokensRequest) -> None:
        self.submitted.append(request)
        self.submits_by_session[session.number] += 1
        failure = self.refuse(request)
        if failure is not None:
            failure.handle = handle
            session.failures.append(failure)
            return
        assert request.sampling.HasField("seed"), "the gateway mints a seed where the client gave none"
        session.open[handle] = request
        if request.sampling.HasField("prompt_logprobs"):
            session.untold[handle] = request
        sampling = request.sampling
        if sampling.HasField("beam_width"):
            steps, results = self.search(request)
            assert bool(steps) == sampling.await_verdicts
            session.searches.append(Search(handle, steps, results))
            return
        eos = set() if sampling.ignore_eos or self.model is None else set(self.model.eos_token_ids)
        for index in range(sampling.n):
            session.rows.append(
                Row(
                    handle=handle,
                    index=index,
                    script=self.script(request, index),
                    max_tokens=sampling.max_tokens or 1 << 30,
                    stop_ids=frozenset(eos | set(sampling.stop_token_ids)),
                    logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
                    end_with=self.end_with,
                )
            )

    def _find(self, request: pb.GenerateTokensRequest) -> tuple[list[Step], list[Result]]:
        """A search for what `script` says."""
        found = [self.script(request, index) for index in range(request.sampling.n)]
        steps: list[Step] = [(0, [], [tokens[0] for tokens in found])]
        results = [(tokens, pb.FINISH_REASON_STOP, -0.5 - i) for i, tokens in enumerate(found)]
        return (steps if request.sampling.await_verdicts else []), results

    def _stop(self, session: Stream, handle: int, index: int, reason: int) -> None:
        request = session.open.get(handle)
        if request is None:
            return
        self.stopped.append((request.request_id, index, reason))
        for row in session.rows:
            if row.handle == handle and index in (row.index, WHOLE_REQUEST):
                row.ended = True
        session.rows = [row for row in session.rows if not row.ended]
        session.searches = [search for search in session.searches if search.handle != handle]
        if index == WHOLE_REQUEST:
            del session.open[handle]

    def _step(self, session: Stream) -> pb.OutputColumns | None:
        """One step: columns over all rows of the session, the sparse ones only where they are needed."""
        output = pb.OutputColumns()
        for handle, request in session.untold.items():
            tokens = list(request.prompt_token_ids)[1:]
            for part in (tokens[:2], tokens[2:]):  # as of two chunks
                output.prompt_handles.append(handle)
                output.num_prompt_logprobs.append(len(part))
                number = request.sampling.prompt_logprobs
                output.prompt_logprobs.extend(prompt_logprob(token, number) for token in part)
        session.untold.clear()
        for row in session.rows:
            tokens, reason = row.step(self.tokens_a_step)
            place = len(output.handles)
            output.handles.append(row.handle)
            output.indexes.append(row.index)
            output.num_tokens.append(len(tokens))
            output.tokens.extend(tokens)
            if row.logprobs is not None:
                output.logprob_rows.append(place)
                output.logprobs.extend(_logprob(token, row.logprobs) for token in tokens)
            if reason:
                row.ended = True
                output.ended_rows.append(place)
                output.ended_reasons.append(reason)  # type: ignore[arg-type]
        for search in session.searches[:]:
            if search.awaits is None and search.steps:
                number, parents, tokens = search.steps.pop(0)
                search.awaits = number
                output.candidates.add(handle=search.handle, step=number, parents=parents, token_ids=tokens)
            elif search.awaits is None:
                session.searches.remove(search)
                _add_results(output, search)
        if not any(output.indexes):
            output.ClearField("indexes")
        if all(count == 1 for count in output.num_tokens):
            output.ClearField("num_tokens")
        session.rows = [row for row in session.rows if not row.ended]
        live = {row.handle for row in (*session.rows, *session.searches)}
        for handle in [handle for handle in session.open if handle not in live]:
            request = session.open.pop(handle)
            usage = pb.Usage(prompt_tokens=len(request.prompt_token_ids), cached_tokens=self.cached_tokens)
            output.usage_handles.append(handle)
            output.usages.append(usage)
        output.failures.extend(session.failures)
        session.failures.clear()
        return output if output.ListFields() else None


def _add_results(output: pb.OutputColumns, search: Search) -> None:
    """All at once, as they come of a search."""
    for index, (tokens, reason, score) in enumerate(search.results):
        place = len(output.handles)
        output.handles.append(search.handle)
        output.indexes.append(index)
        output.num_tokens.append(len(tokens))
        output.tokens.extend(tokens)
        output.ended_rows.append(place)
        output.ended_reasons.append(reason)  # type: ignore[arg-type]
        output.score_rows.append(place)
        output.scores.append(score)


def prompt_logprob(token: int, count: int) -> pb.TokenLogprob:
    """What is said of a prompt's token: its neighbours are all better."""
    return pb.TokenLogprob(
        logprob=-token / 8,
        rank=count + 1,
        top_ids=[token + 1 + i for i in range(count)],
        top_logprobs=[-0.25 * (1 + i) for i in range(count)],
    )


def _logprob(token: int, count: int) -> pb.TokenLogprob:
    """The drawn token first, then its neighbours."""
    return pb.TokenLogprob(
        logprob=-0.25,
        rank=1,
        top_ids=[token + i for i in range(count)],
        top_logprobs=[-0.25 - i for i in range(count)],
    )
