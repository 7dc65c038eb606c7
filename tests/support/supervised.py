"""Scheduler and workers under the supervisor that `make cluster` runs, for tests that kill workers.

    with supervised(folder) as cluster:
        run = asyncio.run(disturb(cluster, cases, disturbance))

where `disturbance(streams)` waits for moments of the run and does its worst.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagoda.cli.cluster import ClusterSpec, Program, programs_of, with_ports
from pagoda.cli.supervise import Supervisor
from pagoda.v1 import scheduler_pb2 as pb
from tests.support.cluster import assert_idle, snapshot
from tests.support.cluster_sched import wait_until
from tests.support.data import model_folder
from tests.support.runs import Case, Run, complete
from tests.support.session_client import SessionClient

START_TIMEOUT_S = 120.0
MOMENT_TIMEOUT_S = 300.0


@dataclass
class Supervised:
    """What runs. Workers are named worker-0, worker-1, ..."""

    supervisor: Supervisor
    address: str
    num_workers: int
    record: Path

    def snapshot(self, requests: bool = False) -> pb.Snapshot:
        """The scheduler's state now."""
        return snapshot(self.address, requests)

    def pid(self, worker: str) -> int:
        """The process of a worker."""
        return next(state.pid for state in self.supervisor.states() if state.name == worker)

    def signal(self, worker: str, number: signal.Signals) -> int:
        """Send a signal to a worker's process; its id."""
        pid = self.pid(worker)
        os.kill(pid, number)
        return pid

    def epochs(self) -> dict[str, int]:
        """The epoch of every worker that is attached."""
        return {worker.name: worker.epoch for worker in self.snapshot().workers}

    def wait_attached(self, after: dict[str, int] | None = None) -> None:
        """Wait until every worker is attached, in a later epoch than it has in `after`."""
        before = after or {}
        names = [f"worker-{i}" for i in range(self.num_workers)]

        def attached() -> bool:
            epochs = self.epochs()
            return all(epochs.get(name, 0) > before.get(name, 0) for name in names)

        wait_until(attached, START_TIMEOUT_S, f"{names} are attached, later than {before}")

    def log(self, program: str) -> list[dict[str, Any]]:
        """What a program has logged, over all its lives."""
        path = self.supervisor.run_dir / "logs" / f"{program}.log"
        text = path.read_text() if path.exists() else ""
        whole_lines = text[: text.rfind("\n") + 1].splitlines()
        return [json.loads(line) for line in whole_lines if line.startswith("{")]

    def has_logged(self, program: str, event: str) -> bool:
        """Whether a program has logged such an event."""
        return any(entry["event"] == event for entry in self.log(program))

    def num_replayed(self) -> int:
        """Requests so far that ended after they had lost a worker."""
        ends = (entry for entry in self.log("scheduler") if entry["event"] == "request_end")
        return sum(end["num_replays"] > 0 for end in ends)


@contextlib.contextmanager
def supervised(
    run_dir: Path,
    *,
    workers: int = 1,
    scheduler_args: Sequence[str] = (),
    worker_args: Sequence[str] = (),
) -> Iterator[Supervised]:
    """A supervised cluster without a gateway, in fp32; at its end all must be idle and no block lost."""
    record = run_dir / "record"
    spec = with_ports(
        ClusterSpec(
            model=str(model_folder()),
            dtype="float32",
            workers=workers,
            http_port=0,
            grpc_port=0,
            scheduler_port=0,
            metrics_port=0,
            scheduler_args=("--record", str(record), *scheduler_args),
            worker_args=tuple(worker_args),
        )
    )
    programs = [program for program in programs_of(spec) if program.tier != "gateway"]
    with started(programs, run_dir) as supervisor:
        running = Supervised(supervisor, spec.scheduler_target, workers, record)
        wait_until(
            lambda: running.has_logged("scheduler", "listening"), START_TIMEOUT_S, "the scheduler listens"
        )
        running.wait_attached()
        yield running
        assert_idle(running.address)


@contextlib.contextmanager
def started(programs: list[Program], run_dir: Path) -> Iterator[Supervisor]:
    """Programs under a supervisor that is stopped at the end; a failure inside prints how their logs end."""
    supervisor = Supervisor(programs, run_dir)
    supervisor.start()
    try:
        yield supervisor
    except BaseException:
        for program in programs:
            print(f"--- the end of {program.name}'s log\n{supervisor.log_tail(program.name)}")
        raise
    finally:
        supervisor.stop()


# ---------------------------------------------------------------------------------- disturbed runs


@dataclass
class Streams:
    """Requests under way, all begun at once."""

    cluster: Supervised
    client: SessionClient
    handles: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens that have come so far."""
        return sum(
            len(tokens) for handle in self.handles for tokens in self.client.received[handle].tokens.values()
        )

    def num_in(self, state: pb.RequestState) -> int:
        """Requests in this state now."""
        return sum(item.state == state for item in self.cluster.snapshot(requests=True).requests)

    async def until(self, holds: Callable[[], bool], what: str) -> None:
        """Wait for a moment of the run. Raises AssertionError where it does not come."""
        deadline = time.monotonic() + MOMENT_TIMEOUT_S
        while not holds():
            assert time.monotonic() < deadline, f"this moment did not come: {what}"
            await asyncio.sleep(0.005)

    async def until_prefill(self) -> None:
        """Wait until prompts are being computed, for the first time or again."""
        await self.until(lambda: self.num_in(pb.REQUEST_STATE_PREFILL) > 0, "prefill")

    async def until_tokens(self, count: int) -> None:
        """Wait until so many tokens have come."""
        await self.until(lambda: self.num_tokens >= count, f"{count} tokens")


async def disturb(
    cluster: Supervised, cases: Sequence[Case], disturbance: Callable[[Streams], Awaitable[None]], salt: str
) -> Run:
    """Run all cases at once while `disturbance` does its worst.

    `salt` keeps them off the prefixes of other runs.
    """
    requests = [case.request() for case in cases]
    for item in requests:
        item.cache_salt = salt
    async with SessionClient(cluster.address) as client:
        handles = await client.submit(*requests)
        await disturbance(Streams(cluster, client, handles))
        return Run([complete(received) for received in await client.results(handles)])
