"""Workers: attach, epochs, deadlines, and the steps on their way to every rank.

A worker's state lives exactly as long as its stream (invariant 3), so the hub resumes nothing: whatever
goes wrong with one rank ends the session of its whole group, and the ranks dial again.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

import grpc
import grpc.aio
import structlog

from pagoda.checksum import step_checksum
from pagoda.internal.v1 import worker_pb2 as wire
from scheduler_svc.calls import handler
from scheduler_svc.codec import BadResult, decode_result
from scheduler_svc.core.events import Plan, WorkerAttached
from scheduler_svc.core.worker import Flight
from scheduler_svc.engine import Engine
from scheduler_svc.errors import HelloRefused, abort
from scheduler_svc.streams import END_OF_STREAM, StreamCut
from scheduler_svc.validation import ServedModel

SERVICE = wire.DESCRIPTOR.services_by_name["WorkerService"]
PROTOCOL = 1
HELLO_TIMEOUT_S = 10.0
HEARTBEAT_TIMEOUT_S = 10.0
# Steps in flight are few, so a queue this long means that a peer has stopped reading.
MAX_OUTBOX = 64
MAX_RANK_LAG = 64
MAX_RETIRED = 16


class Rank:
    """One rank's stream: what it said of itself, what it is still to be sent."""

    def __init__(self, hello: wire.Hello) -> None:
        self.hello = hello
        self.stream = StreamCut()
        self.heard = time.monotonic()
        self.next_result = 0
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()

    def post(self, message: bytes) -> bool:
        """Queue a message; False when the rank is too far behind."""
        self._outbox.put_nowait(message)
        return self._outbox.qsize() <= MAX_OUTBOX

    async def write(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Send what is queued, for ever."""
        while True:
            await context.write(await self._outbox.get())


class Group:
    """One session of a worker group: complete once every rank is there."""

    def __init__(self, hello: wire.Hello) -> None:
        self.name = hello.group_name
        self.incarnation = hello.incarnation
        self.world_size = hello.world_size
        self.ranks: dict[int, Rank] = {}
        self.epoch = 0
        self.inflight: deque[tuple[Flight, float]] = deque()  # with its time of sending
        self.last_result = 0.0
        self.checksums: dict[int, dict[int, int]] = {}  # by step, then rank

    @property
    def complete(self) -> bool:
        """Every rank is there and the session has an epoch."""
        return self.epoch > 0

    @property
    def heard(self) -> float:
        """When the quietest rank was last heard."""
        return min(rank.heard for rank in self.ranks.values())


class WorkerHub:
    """Serves `WorkerService` and carries the engine's plans to the workers."""

    def __init__(self, engine: Engine, max_inflight: int, log: structlog.stdlib.BoundLogger) -> None:
        self._engine = engine
        self._max_inflight = max_inflight
        self._log = log
        self.groups: dict[str, Group] = {}
        self._epochs: dict[str, int] = {}
        self._retired: dict[str, dict[str, None]] = {}  # incarnations that a newer one replaced, by group
        engine.connect(self.send, self.tell)

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """The service, for a server. What goes to workers is the same for every rank."""
        return handler(SERVICE, Attach=self.attach)

    # ----------------------------------------------------------------------------------- one stream

    async def attach(self, _: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """One rank, from its Hello to the end of its stream."""
        try:
            rank = Rank(await self._read_hello(context))
            group = self._join(rank)
        except HelloRefused as error:
            self._log.warning("worker_refused", peer=context.peer(), reason=str(error))
            await abort(context, error)
        try:
            await rank.stream.open(context)
            await rank.stream.run(self._read(group, rank, context), rank.write(context))
        finally:
            reason = rank.stream.reason or "the stream ended"
            self._end(group, grpc.StatusCode.ABORTED, f"rank {rank.hello.rank}: {reason}")
        await rank.stream.tell(context)

    async def _read_hello(self, context: grpc.aio.ServicerContext[Any, Any]) -> wire.Hello:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                request = await context.read()
        except TimeoutError:
            raise HelloRefused([("hello", f"did not come within {HELLO_TIMEOUT_S:g} s")]) from None
        if request is END_OF_STREAM or request.WhichOneof("message") != "hello":
            raise HelloRefused([("hello", "must be the first message")])
        hello: wire.Hello = request.hello
        return hello

    async def _read(self, group: Group, rank: Rank, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        while True:
            request = await context.read()
            if request is END_OF_STREAM:
                return
            rank.heard = time.monotonic()
            kind = request.WhichOneof("message")
            if kind == "result":
                try:
                    self._result(group, rank, request.result)
                except BadResult as error:
                    self._log.error("bad_result", worker=group.name, rank=rank.hello.rank, reason=str(error))
                    self._end(group, grpc.StatusCode.ABORTED, str(error))
                    return
            elif kind != "heartbeat":
                self._end(group, grpc.StatusCode.INVALID_ARGUMENT, f"{kind} is not allowed here")
                return

    # ---------------------------------------------------------------------------- joining, leaving

    def _join(self, rank: Rank) -> Group:
        """Put a rank into its group's forming session. Raises HelloRefused when it does not fit."""
        hello = rank.hello
        check_hello(hello, self._engine.model)
        if hello.incarnation in self._retired.get(hello.group_name, ()):
            raise HelloRefused(
                [("incarnation", f"another process has attached as group {hello.group_name!r} since")]
            )
        group = self.groups.get(hello.group_name)
        if group is not None and (
            group.complete or hello.rank in group.ranks or group.incarnation != hello.incarnation
        ):
            self._replace(group, hello.incarnation)
            group = None
        if group is None:
            group = self.groups[hello.group_name] = Group(hello)
        check_ranks(hello, [other.hello for other in group.ranks.values()])
        group.ranks[hello.rank] = rank
        if len(group.ranks) == group.world_size:
            self._complete(group)
        return group

    def _replace(self, old: Group, incarnation: str) -> None:
        """The newest session of a group wins. What it replaces may come back only as the same process."""
        if old.incarnation != incarnation:
            retired = self._retired.setdefault(old.name, {})
            retired[old.incarnation] = None
            if len(retired) > MAX_RETIRED:
                del retired[next(iter(retired))]
        self._end(old, grpc.StatusCode.ABORTED, "a newer session of this group has begun")

    def _complete(self, group: Group) -> None:
        hellos = [group.ranks[i].hello for i in range(group.world_size)]
        self._epochs[group.name] = group.epoch = self._epochs.get(group.name, 0) + 1
        start = wire.SessionStart(
            epoch=group.epoch,
            protocol=PROTOCOL,
            num_device_blocks=min(h.num_device_blocks for h in hellos),
            num_host_blocks=min(h.num_host_blocks for h in hellos),
            max_slots=min(h.max_slots for h in hellos),
            max_inflight=self._max_inflight,
        )
        message = wire.AttachResponse(start=start).SerializeToString()
        for rank in group.ranks.values():
            rank.post(message)
            if self._engine.vocabulary:
                rank.post(self._engine.vocabulary)
        self._log.info(
            "worker_attached", worker=group.name, epoch=group.epoch, world_size=group.world_size,
            device=hellos[0].device, dtype=hellos[0].dtype, blocks=start.num_device_blocks,
            slots=start.max_slots,
        )  # fmt: skip
        event = WorkerAttached(
            worker=group.name,
            epoch=group.epoch,
            num_blocks=start.num_device_blocks,
            block_size=hellos[0].block_size,
            max_slots=start.max_slots,
            max_model_len=hellos[0].max_model_len,
            max_batched_tokens=min(h.max_batched_tokens for h in hellos),
            max_horizon=min(h.max_horizon for h in hellos),
            max_inflight=self._max_inflight,
            num_host_blocks=start.num_host_blocks,
            block_bytes=hellos[0].block_bytes,
        )
        self._engine.worker_attached(event, served_model(hellos[0]), group.world_size)

    def _end(self, group: Group, code: grpc.StatusCode, reason: str) -> None:
        """End a group's session: every rank is cut, the core loses the worker. Harmless when repeated."""
        for rank in group.ranks.values():
            rank.stream.cut(code, reason)
        if self.groups.get(group.name) is not group:
            return
        del self.groups[group.name]
        self._log.warning("worker_lost", worker=group.name, epoch=group.epoch, reason=reason)
        if group.complete:
            self._engine.worker_lost(group.name)

    async def watch_heartbeats(self, interval_s: float = 1.0) -> None:
        """Cut the groups that have gone silent, for ever."""
        while True:
            await asyncio.sleep(interval_s)
            limit = time.monotonic() - HEARTBEAT_TIMEOUT_S
            for group in list(self.groups.values()):
                if group.heard < limit:
                    self._end(
                        group,
                        grpc.StatusCode.DEADLINE_EXCEEDED,
                        f"nothing was heard for {HEARTBEAT_TIMEOUT_S:g} s",
                    )

    # ------------------------------------------------------------------------------ steps, results

    def send(self, plan: Plan, flight: Flight, message: bytes) -> None:
        """Queue a step for every rank of its group."""
        group = self.groups.get(plan.worker)
        if group is None or group.epoch != plan.epoch:
            return  # its session has ended, and the core is about to hear of it
        group.inflight.append((flight, time.monotonic()))
        for rank in list(group.ranks.values()):
            if not rank.post(message):
                reason = f"rank {rank.hello.rank} does not read its steps"
                self._end(group, grpc.StatusCode.RESOURCE_EXHAUSTED, reason)

    def tell(self, message: bytes) -> None:
        """Queue a message for every rank that has been told its session's start."""
        for group in self.groups.values():
            for rank in group.ranks.values() if group.complete else ():
                rank.post(message)

    def _result(self, group: Group, rank: Rank, result: wire.StepResult) -> None:
        if result.epoch != group.epoch or result.step_id != rank.next_result:
            raise BadResult(
                f"epoch {result.epoch} step {result.step_id} was answered; "
                f"epoch {group.epoch} step {rank.next_result} was awaited"
            )
        rank.next_result += 1
        if rank.hello.rank == 0:
            self._first_rank(group, result)
        if group.world_size > 1:
            own = result.checksum if rank.hello.rank else step_checksum(result)
            self._compare(group, rank.hello.rank, result.step_id, own)

    def _first_rank(self, group: Group, result: wire.StepResult) -> None:
        if not group.inflight:
            raise BadResult(f"step {result.step_id} was answered and never sent")
        flight, sent = group.inflight.popleft()
        model = self._engine.model
        assert model is not None, "a worker is attached, so the model is known"
        event = decode_result(group.name, result, flight, model.vocab_size)
        now = time.monotonic()
        # What the window hides is no cost: a step behind another one begins when that one's result comes.
        since = now - max(sent, group.last_result)
        group.last_result = now
        self._engine.step_done(event, max(0.0, since - result.device_us / 1e6))

    def _compare(self, group: Group, rank: int, step_id: int, checksum: int) -> None:
        """Ranks must have drawn the same."""
        seen = group.checksums.setdefault(step_id, {})
        seen[rank] = checksum
        if len(set(seen.values())) > 1:
            raise BadResult(f"step {step_id}: what the ranks drew differs, checksums {seen}")
        if len(seen) == group.world_size:
            del group.checksums[step_id]
        elif len(group.checksums) > MAX_RANK_LAG:
            raise BadResult(f"a rank is more than {MAX_RANK_LAG} steps behind")


def served_model(hello: wire.Hello) -> ServedModel:
    """What a worker says that the whole cluster must agree on."""
    return ServedModel(
        name=hello.model_name,
        digest=hello.model_digest,
        vocab_size=hello.vocab_size,
        max_model_len=hello.max_model_len,
        eos_token_ids=tuple(hello.eos_token_ids),
        max_stop_ids=hello.max_stop_ids,
        device=hello.device,
        dtype=hello.dtype,
    )


def check_hello(hello: wire.Hello, model: ServedModel | None) -> None:
    """Raises HelloRefused with everything that does not fit this scheduler or its cluster."""
    wrong = []
    if not hello.protocol_min <= PROTOCOL <= hello.protocol_max:
        theirs = f"{hello.protocol_min} to {hello.protocol_max}"
        wrong.append(("protocol", f"the worker speaks {theirs}, the scheduler {PROTOCOL}"))
    for name in _POSITIVE:
        if not getattr(hello, name):
            wrong.append((name, "must be at least 1"))
    for name in ("group_name", "incarnation", "model_name"):
        if not getattr(hello, name):
            wrong.append((name, "is empty"))
    if hello.rank >= max(1, hello.world_size):
        wrong.append(("rank", f"{hello.rank} is not below the world size {hello.world_size}"))
    if model is not None:
        offered = served_model(hello)
        for name in _AGREED:
            ours, theirs = getattr(model, name), getattr(offered, name)
            if ours != theirs:
                wrong.append((name, f"the cluster has {ours!r}, the worker {theirs!r}"))
    if wrong:
        raise HelloRefused(wrong)


def check_ranks(hello: wire.Hello, others: list[wire.Hello]) -> None:
    """Raises HelloRefused where a rank differs from those of its group that are there."""
    wrong = [
        (name, f"rank {other.rank} has {getattr(other, name)}, rank {hello.rank} {getattr(hello, name)}")
        for other in others[:1]
        for name in ("world_size", "block_size")
        if getattr(other, name) != getattr(hello, name)
    ]
    if wrong:
        raise HelloRefused(wrong)


_POSITIVE = (
    "world_size", "vocab_size", "max_model_len", "block_size", "num_device_blocks", "max_slots",
    "max_batched_tokens", "max_horizon",
)  # fmt: skip
_AGREED = ("name", "digest", "vocab_size", "max_model_len", "eos_token_ids", "max_stop_ids")
