"""Clients that leave, by every door and at every moment: slot and blocks come back within D + 1 messages.

What is shown is order, not time. The scheduler's record says when each stop came and what was planned after
it: the stop itself frees slot and blocks in the books, the very next step releases the row on the device, and
before that lie at most the D steps that were on their way.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

import pagoda
from pagoda.v1 import inference_pb2 as ipb
from pagoda.v1 import inference_pb2_grpc, scheduler_pb2_grpc
from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc import record
from scheduler_svc.core.events import RequestStopped
from scheduler_svc.core.request import NO_SLOT
from scheduler_svc.core.scheduler import Scheduler
from tests.support import figures
from tests.support.cluster import Cluster, cluster
from tests.support.metrics import scrape, total
from tests.support.raw_http import post
from tests.support.scale import scaled

pytestmark = pytest.mark.timeout(scaled(600, 3600))

NUM_CLIENTS = scaled(50, 500)
NUM_ABORTS = scaled(5, 20)
AT_ONCE = 10
DEPTH = 2
WAITING, PREFILL, DECODE = (
    pb.REQUEST_STATE_WAITING,
    pb.REQUEST_STATE_PREFILL,
    pb.REQUEST_STATE_DECODE,
)
NAMES = {WAITING: "waiting", PREFILL: "prefill", DECODE: "decode"}
# Far more than anyone waits for: no request of this test ends by itself.
ENDLESS = 2000
DEADLINE_S = 4.0


@dataclass
class Client:
    """One that leaves when its request is so far, or later."""

    number: int
    door: str
    moment: int
    num_tokens: int
    prompt: list[int]

    @property
    def request_id(self) -> str:
        return f"leaves-{self.number}"

    def sampling(self) -> pb.SamplingParams:
        return pb.SamplingParams(max_tokens=ENDLESS, ignore_eos=True, seed=self.number)

    def body(self, stream: bool) -> dict[str, Any]:
        """The request over HTTP."""
        fields = {"max_tokens": ENDLESS, "ignore_eos": True, "seed": self.number, "stream": stream}
        return {"prompt": self.prompt, "request_id": self.request_id, **fields}

    def message(self) -> ipb.GenerateRequest:
        """The request over gRPC."""
        ids = ipb.TokenIds(ids=self.prompt)
        return ipb.GenerateRequest(token_ids=ids, sampling=self.sampling(), request_id=self.request_id)


class Watcher:
    """Knows from snapshots how far each request is."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._now: dict[str, pb.RequestSnapshot] = {}
        self.last_state: dict[str, int] = {}
        self._looked = asyncio.Condition()

    async def run(self) -> None:
        """Look as often as the scheduler lets us, until cancelled."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub: Any = scheduler_pb2_grpc.ControlServiceStub(channel)
            while True:
                reply = await stub.Snapshot(pb.SnapshotRequest(include_requests=True))
                async with self._looked:
                    self._now = {request.request_id: request for request in reply.snapshot.requests}
                    self.last_state.update((name, int(seen.state)) for name, seen in self._now.items())
                    self._looked.notify_all()
                await asyncio.sleep(0.005)

    async def reached(self, client: Client) -> int:
        """Wait until the client's request is as far as the client stays; where it was seen."""

        def far_enough() -> bool:
            seen = self._now.get(client.request_id)
            if seen is None or seen.state < client.moment:
                return False
            # A prompt in prefill has no output, one that decodes has gained some tokens.
            return client.moment != DECODE or seen.samples[0].output_tokens >= client.num_tokens

        async with self._looked:
            await self._looked.wait_for(far_enough)
            return int(self._now[client.request_id].state)

    async def seen(self, client: Client) -> None:
        """Wait until the scheduler knows of the client's request."""
        async with self._looked:
            await self._looked.wait_for(lambda: client.request_id in self._now)


async def by_http(running: Cluster, client: Client, watcher: Watcher, stream: bool) -> int:
    async with post(running.url, client.body(stream)) as request:
        state = await watcher.reached(client)
        if stream and state == DECODE:
            await request.wait_for(b"data: ")
        request.leave()
    return state


async def by_http_stream(running: Cluster, client: Client, watcher: Watcher) -> int:
    return await by_http(running, client, watcher, stream=True)


async def by_http_whole(running: Cluster, client: Client, watcher: Watcher) -> int:
    return await by_http(running, client, watcher, stream=False)


async def by_grpc_cancel(running: Cluster, client: Client, watcher: Watcher) -> int:
    async with grpc.aio.insecure_channel(running.grpc) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(client.message())
        state = await watcher.reached(client)
        assert call.cancel()
        assert await call.code() is grpc.StatusCode.CANCELLED
    return state


async def by_deadline(running: Cluster, client: Client, watcher: Watcher) -> int:
    async with grpc.aio.insecure_channel(running.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(client.message(), timeout=DEADLINE_S)
        await watcher.seen(client)
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    return watcher.last_state[client.request_id]


async def by_sdk(running: Cluster, client: Client, watcher: Watcher) -> int:
    options: Any = {"max_tokens": ENDLESS, "ignore_eos": True, "seed": client.number}
    async with pagoda.AsyncClient(running.grpc) as sdk:
        stream = sdk.stream(client.prompt, request_id=client.request_id, **options)
        reading = asyncio.create_task(anext(stream))
        state = await watcher.reached(client)
        await stream.aclose()
        await asyncio.gather(reading, return_exceptions=True)
    return state


async def by_connection(running: Cluster, client: Client, watcher: Watcher) -> int:
    """The whole connection goes, as when a client's process is killed."""
    channel = grpc.aio.insecure_channel(running.grpc)
    call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(client.message())
    state = await watcher.reached(client)
    await channel.close()
    assert call.done()
    return state


DOORS = {
    "http stream": by_http_stream,
    "http whole": by_http_whole,
    "grpc cancel": by_grpc_cancel,
    "grpc deadline": by_deadline,
    "grpc connection": by_connection,
    "sdk": by_sdk,
}


def clients() -> list[Client]:
    """Every door with every moment, in a random order, with prompts that take several chunks."""
    draw = random.Random(5)
    doors = list(DOORS)
    made = [
        Client(
            number=i,
            door=doors[i % len(doors)],
            moment=(WAITING, PREFILL, DECODE)[i // len(doors) % 3],
            num_tokens=draw.randrange(1, 12),
            prompt=[draw.randrange(100, 40_000) for _ in range(draw.choice((5, 200, 700)))],
        )
        for i in range(NUM_CLIENTS)
    ]
    for client in made:
        if client.moment == PREFILL:
            client.prompt = [draw.randrange(100, 40_000) for _ in range(700)]
    draw.shuffle(made)
    return made


async def leave_all(running: Cluster) -> Counter[tuple[str, int]]:
    """Run all clients, so many at once; how many left by each door in which state."""
    watcher = Watcher(running.scheduler.address)
    looking = asyncio.create_task(watcher.run())
    gate = asyncio.Semaphore(AT_ONCE)
    left: Counter[tuple[str, int]] = Counter()

    async def one(client: Client) -> None:
        async with gate:
            left[client.door, await DOORS[client.door](running, client, watcher)] += 1

    try:
        async with asyncio.TaskGroup() as group:
            for client in clients():
                group.create_task(one(client))
    finally:
        looking.cancel()
    return left


async def abort_some(running: Cluster) -> None:
    """Requests that an operator ends: their clients stay, and get what there is and the reason."""
    async with grpc.aio.insecure_channel(running.scheduler.address) as channel:
        control: Any = scheduler_pb2_grpc.ControlServiceStub(channel)
        watcher = Watcher(running.scheduler.address)
        looking = asyncio.create_task(watcher.run())
        for i in range(NUM_ABORTS):
            client = Client(NUM_CLIENTS + i, "", DECODE, 2, [5, 6, 7])
            async with post(running.url, client.body(stream=False)) as request:
                await watcher.reached(client)
                assert (await control.Abort(pb.AbortRequest(request_id=client.request_id))).found
                answer = await request.rest()
            assert (answer.status, answer.finish) == (200, {0: "abort"}) and answer.text[0]
            assert not (await control.Abort(pb.AbortRequest(request_id=client.request_id))).found
        looking.cancel()


# ------------------------------------------------------------------------------------------ the record


@dataclass
class Stop:
    """One stop of a request that held slots, and what came between it and the release of its row."""

    slots: set[int]
    num_inflight: int
    """Steps on their way that hold the row."""
    num_plans: int = 0
    """From the stop to the release, that one included."""


@dataclass
class Stops:
    """All stops of a record."""

    with_slots: list[Stop] = field(default_factory=list)
    without: int = 0
    pending: list[Stop] = field(default_factory=list)
    """Not released yet."""


def read_stops(path: Path) -> Stops:
    """Run the core on a record again and see what each stop frees, and when."""
    frames = record.read_frames(path)
    header = next(frames)
    assert isinstance(header, record.Header)
    core = Scheduler(header.config)
    stops = Stops()
    inflight: deque[set[int]] = deque()  # slots of the steps on their way
    for frame in frames:
        if isinstance(frame, record.Applied):
            named = [core.groups.get(e.key) for e in frame.events if isinstance(e, RequestStopped)]
            groups = [group for group in named if group is not None]
            held = [{s.slot for s in group.samples if s.slot != NO_SLOT} for group in groups]
            core.apply(frame.events, frame.now)
            core.check_integrity()
            worker = core.workers.get("w0")
            while worker is not None and len(inflight) > len(worker.inflight):
                inflight.popleft()
            for group, slots in zip(groups, held, strict=True):
                assert group.key not in core.groups
                assert all(s.slot == NO_SLOT and not s.blocks for s in group.samples)
                stops.without += not slots
                if slots:
                    stops.pending.append(Stop(slots, sum(bool(slots & step) for step in inflight)))
        elif isinstance(frame, record.Planned):
            plan = core.plan(frame.worker, frame.now)
            assert plan == frame.plan
            if plan is None:
                continue
            inflight.append(set(plan.slots))
            for stop in list(stops.pending):
                stop.num_plans += 1
                if stop.slots <= set(plan.released_slots):
                    stops.pending.remove(stop)
                    stops.with_slots.append(stop)
    return stops


# ------------------------------------------------------------------------------------------- the tests


@dataclass
class Ran:
    """What the run of all clients left behind."""

    left: Counter[tuple[str, int]]
    scheduler: str
    gateway: str
    record: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """All clients have come and gone, some requests were aborted, and a last one has been answered."""
    path = tmp_path_factory.mktemp("cancel") / "run.rec"
    with cluster(
        dtype="bfloat16",
        # Few slots, so that there is a queue, and small chunks, so that a prompt takes a while.
        scheduler_args=("--record", str(path), "--max-inflight", str(DEPTH), "--max-batched-tokens", "64"),
        worker_args=("--max-slots", "4", "--num-blocks", "600"),
        gateway_args=(),
    ) as running:
        left = asyncio.run(leave_all(running))
        running.assert_idle()
        asyncio.run(abort_some(running))
        with pagoda.Client(running.grpc) as client:
            assert client.generate("Hello", max_tokens=3, ignore_eos=True).usage is not None
        running.assert_idle()
        scheduler = scrape(f"http://{running.scheduler.metrics_address}/metrics")
        gateway = scrape(running.metrics)
    yield Ran(left, scheduler, gateway, path)


def test_clients_left_by_every_door_at_every_moment(ran: Ran) -> None:
    assert ran.left.total() == NUM_CLIENTS
    states = {state for _, state in ran.left}
    assert states >= {WAITING, PREFILL, DECODE}
    assert {door for door, _ in ran.left} == set(DOORS)


def test_every_one_of_them_is_counted_once(ran: Ran) -> None:
    assert total(ran.gateway, "pagoda:requests_cancelled_total") == NUM_CLIENTS
    assert total(ran.scheduler, "pagoda:requests_aborted_total") == NUM_ABORTS
    assert total(ran.scheduler, "pagoda:requests_cancelled_total") == NUM_CLIENTS + NUM_ABORTS
    ended = {
        reason: total(ran.scheduler, "pagoda:request_success_total", finished_reason=reason)
        for reason in ("cancelled", "length", "stop", "error")
    }
    assert ended == {"cancelled": NUM_CLIENTS + NUM_ABORTS, "length": 1, "stop": 0, "error": 0}
    assert total(ran.gateway, "pagoda:request_success_total", finished_reason="abort") == NUM_ABORTS
    assert total(ran.gateway, "pagoda:requests_failed_total") == 0


def test_slot_and_blocks_are_free_within_depth_plus_one_messages(ran: Ran) -> None:
    stops = read_stops(ran.record)
    assert not stops.pending, "a row was never released"
    assert len(stops.with_slots) + stops.without == NUM_CLIENTS + NUM_ABORTS
    assert {stop.num_plans for stop in stops.with_slots} == {1}, "the next step releases the row"
    messages = Counter(stop.num_inflight + stop.num_plans for stop in stops.with_slots)
    assert max(messages) <= DEPTH + 1
    figures.record(
        "cancel",
        clients=NUM_CLIENTS,
        left={f"{door}, {NAMES[state]}": count for (door, state), count in sorted(ran.left.items())},
        aborted=NUM_ABORTS,
        stopped_with_slots=len(stops.with_slots),
        stopped_in_queue=stops.without,
        depth=DEPTH,
        messages_until_free=dict(sorted(messages.items())),
        counted_by_gateway=total(ran.gateway, "pagoda:requests_cancelled_total"),
        counted_by_scheduler=total(ran.scheduler, "pagoda:requests_cancelled_total"),
    )
