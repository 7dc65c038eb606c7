"""`python -m scheduler_svc`: starts the scheduler and serves until it is told to end."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import signal
import sys
from typing import Any

import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pagoda import logs
from pagoda.tracing import Tracing
from pagoda.transport import SERVER_OPTIONS, server_interceptors
from scheduler_svc import control, session, worker_hub
from scheduler_svc.config import SchedulerSettings
from scheduler_svc.core.events import Finish
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.engine import Engine
from scheduler_svc.metrics import Metrics, MetricsServer, Reading
from scheduler_svc.record import Recorder

HOUSEKEEPING_S = 1.0
READING_EVERY = 10
GRACE_S = 0.5
SERVICES = tuple(module.SERVICE.full_name for module in (session, control, worker_hub))


class Service:
    """Everything that one scheduler process runs."""

    def __init__(self, settings: SchedulerSettings, log: structlog.stdlib.BoundLogger) -> None:
        self._settings = settings
        self._log = log
        self._recorder = Recorder(settings.record, settings.core()) if settings.record else None
        self._metrics = Metrics()
        self._core = Scheduler(settings.core())
        self._engine = Engine(self._core, settings.max_waiting, self._metrics, log, self._recorder)
        self._engine.tracing = Tracing.start(settings.otlp_traces_endpoint, "scheduler")
        self._hub = worker_hub.WorkerHub(self._engine, settings.max_inflight, log)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._changed = asyncio.Event()
        self._metrics.read = self._read
        self._engine.on_change.append(self._changed.set)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises what broke the engine, if something does."""
        settings = self._settings
        server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=server_interceptors(settings.token))
        port = self._add_services(server)
        metrics = MetricsServer(self._metrics, settings)
        await server.start()
        host, _, given = settings.listen.rpartition(":")
        address = f"{host}:{port}" if given == "0" else settings.listen
        self._log.info("listening", grpc=address, metrics=f"{settings.metrics_host}:{metrics.port}")
        tasks = [
            asyncio.create_task(endless)
            for endless in (self._hub.watch_heartbeats(), self._keep_house(), self._report_health())
        ]
        try:
            await self._until_told(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await server.stop(GRACE_S)
            await metrics.close()
            if self._engine.tracing is not None:
                await asyncio.to_thread(self._engine.tracing.close)
            if self._recorder is not None:
                self._recorder.close()
            self._log.info("ended")

    def _add_services(self, server: grpc.aio.Server) -> int:
        sessions = session.SchedulerService(self._engine, self._log)
        controls = control.ControlService(self._engine, sessions)
        server.add_generic_rpc_handlers((sessions.handler(), controls.handler(), self._hub.handler()))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((*SERVICES, health_name, reflection.SERVICE_NAME), server)
        try:
            return int(server.add_insecure_port(self._settings.listen))
        except RuntimeError as error:
            raise OSError(f"--listen: cannot bind {self._settings.listen}: {error}") from error

    async def _until_told(self, tasks: list[asyncio.Task[None]]) -> None:
        """Return on SIGTERM or SIGINT; raise when the engine or a task fails."""
        told = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, told.set)
        waiting = asyncio.create_task(told.wait())
        ends: list[asyncio.Future[Any]] = [waiting, self._engine.failed, *tasks]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        for end in ends[1:]:
            if end.done():
                await end

    async def _keep_house(self) -> None:
        """What is done on a timer: flush the record, and take a reading in case a scrape cannot."""
        for turn in itertools.count():
            await asyncio.sleep(HOUSEKEEPING_S)
            if self._recorder is not None:
                self._recorder.flush()
            if turn % READING_EVERY == 0:
                self._metrics.refresh()

    async def _report_health(self) -> None:
        """The server is healthy as such; the service is once a worker is there to do the work."""
        status = health_pb2.HealthCheckResponse
        await self._health.set("", status.SERVING)
        while True:
            serving = bool(self._engine.workers)
            name = session.SERVICE.full_name
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)
            await self._changed.wait()
            self._changed.clear()

    def _read(self) -> Reading:
        """The gauges and counters now."""
        stats, groups = self._core.stats, [g for g in self._hub.groups.values() if g.complete]
        return Reading(
            state=self._engine.snapshot(False, False, 0),
            heard={g.name: g.heard for g in groups},
            prefix_cache=self._settings.prefix_cache,
            counters=dataclasses.asdict(stats)
            | {
                "prefix_cache_queries": stats.prompt_tokens,
                "prefix_cache_hits": stats.prompt_tokens_cached,
                "recompute_seconds": stats.recompute_us / 1e6,
                "swap_seconds": stats.swap_us / 1e6,
                "requests_cancelled": stats.finished.get("cancelled", 0),
                "requests_aborted": self._engine.num_aborted,
            },
            preemptions={"swap": stats.num_swaps, "recompute": stats.num_preemptions - stats.num_swaps},
            swaps={"blocks": stats.swapped_blocks, "bytes": stats.swapped_bytes},
            finished={finish.name.lower(): 0 for finish in Finish} | stats.finished,
        )


def main() -> None:
    """Read the configuration and run."""
    settings = SchedulerSettings.load()
    settings.check()
    log = logs.setup("scheduler", settings.log_level)
    # What exists now lives as long as the process: collections need not look at it again.
    gc.freeze()
    try:
        asyncio.run(_run(settings, log))
    except OSError as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        log.exception("failed", error=str(error))
        sys.exit(1)


async def _run(settings: SchedulerSettings, log: structlog.stdlib.BoundLogger) -> None:
    await Service(settings, log).run()


if __name__ == "__main__":
    main()
