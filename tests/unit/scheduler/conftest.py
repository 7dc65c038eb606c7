"""A scheduler in the test's own process, on a real socket, and simulated workers that attach to it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import structlog

from gpu_worker.hub_client import HubClient
from gpu_worker.metrics import WorkerMetrics
from pagoda.internal.v1 import worker_pb2_grpc
from pagoda.transport import SERVER_OPTIONS
from pagoda.v1 import scheduler_pb2_grpc
from scheduler_svc.control import ControlService
from scheduler_svc.core.config import CoreConfig
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.engine import Engine
from scheduler_svc.metrics import Metrics
from scheduler_svc.record import Recorder
from scheduler_svc.session import SchedulerService
from scheduler_svc.worker_hub import WorkerHub
from tests.support.session_client import SessionClient
from tests.support.sim_worker import SimDevice, SimExecutor, hello_for

VOCAB = 1000


@dataclass
class SimWorker:
    """A simulated worker in threads of this process."""

    client: HubClient
    executor: SimExecutor
    device: SimDevice
    thread: threading.Thread
    exit_codes: list[int] = field(default_factory=list)

    async def stop(self) -> None:
        """End it as SIGTERM would."""
        self.client.stop()
        await asyncio.to_thread(self.thread.join, 20)
        assert not self.thread.is_alive()


@dataclass
class LocalScheduler:
    """The service's parts, as `scheduler_svc.__main__` puts them together."""

    engine: Engine
    hub: WorkerHub
    metrics: Metrics
    address: str
    channel: grpc.aio.Channel
    workers: list[SimWorker] = field(default_factory=list)

    @property
    def scheduler(self) -> Any:
        """A stub of SchedulerService."""
        return scheduler_pb2_grpc.SchedulerServiceStub(self.channel)

    @property
    def control(self) -> Any:
        """A stub of ControlService."""
        return scheduler_pb2_grpc.ControlServiceStub(self.channel)

    @property
    def worker(self) -> Any:
        """A stub of WorkerService, for what no good worker does."""
        return worker_pb2_grpc.WorkerServiceStub(self.channel)

    def session(self) -> SessionClient:
        """A session on a connection of its own."""
        return SessionClient(self.address)

    async def attach(
        self, group: str = "w0", iteration_ms: float = 0.5, blocks: int = 512, slots: int = 32, **hello: Any
    ) -> SimWorker:
        """Start a worker and wait until the core has it."""
        device = SimDevice(
            blocks, 4, slots, VOCAB, max_batched_tokens=4096, max_horizon=hello.pop("max_horizon", 4)
        )
        hello = {"max_model_len": 512, **hello}
        log = structlog.get_logger()
        client = HubClient(
            self.address, hello_for(device, group, **hello), "", WorkerMetrics("simulated", group), log
        )
        executor = SimExecutor(device, iteration_ms / 1000, client.deliver, client.fail)
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(client.run(executor)), daemon=True)
        worker = SimWorker(client, executor, device, thread, codes)
        self.workers.append(worker)
        thread.start()
        await until(lambda: group in self.engine.core.workers or bool(codes))
        return worker

    def check_idle(self) -> None:
        """Nothing is leaked: every block is free or cached, every slot free, and no rule was broken."""
        self.engine.core.check_integrity()
        for worker in self.engine.snapshot(False, False, 0).workers:
            assert worker.num_free_blocks + worker.num_cached_blocks == worker.num_blocks
            assert worker.num_slots_used == 0
        for sim in self.workers:
            assert not sim.executor.broken, sim.executor.broken


async def until(holds: Any, timeout_s: float = 20.0) -> None:
    """Poll until `holds()`."""
    async with asyncio.timeout(timeout_s):
        while True:
            if holds():
                return
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def local_scheduler(
    config: CoreConfig | None = None, max_waiting: int = 1000, record: Path | None = None
) -> AsyncIterator[LocalScheduler]:
    """A scheduler without workers, until the block ends; nothing may have broken it by then."""
    config = config or CoreConfig()
    log = structlog.get_logger()
    metrics = Metrics()
    recorder = Recorder(record, config) if record else None
    engine = Engine(Scheduler(config), max_waiting, metrics, log, recorder)
    hub = WorkerHub(engine, config.max_inflight, log)
    sessions = SchedulerService(engine, log)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers(
        (sessions.handler(), ControlService(engine, sessions).handler(), hub.handler())
    )
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    watch = asyncio.create_task(hub.watch_heartbeats(0.02))
    channel = grpc.aio.insecure_channel(address)
    running = LocalScheduler(engine, hub, metrics, address, channel)
    try:
        yield running
        if engine.failed.done():
            engine.failed.result()
    finally:
        for worker in running.workers:
            await worker.stop()
        watch.cancel()
        await channel.close()
        await server.stop(0.2)
        if recorder is not None:
            recorder.close()


@pytest.fixture
async def local() -> AsyncIterator[LocalScheduler]:
    """A scheduler without workers."""
    async with local_scheduler() as running:
        yield running


@pytest.fixture
async def serving(local: LocalScheduler) -> LocalScheduler:
    """A scheduler with one worker."""
    await local.attach()
    return local
