"""Looking into the scheduler and steering it: Abort, Snapshot and Watch."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import grpc.aio

from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc.calls import handler
from scheduler_svc.engine import Engine
from scheduler_svc.errors import InvalidRequest, abort
from scheduler_svc.session import SchedulerService, model_info

SERVICE = pb.DESCRIPTOR.services_by_name["ControlService"]
MIN_INTERVAL_MS = 50
DEFAULT_INTERVAL_MS = 1000
DEFAULT_MAX_REQUESTS = 1000

Context = grpc.aio.ServicerContext[Any, Any]


class ControlService:
    """Serves `ControlService`."""

    def __init__(self, engine: Engine, sessions: SchedulerService) -> None:
        self._engine = engine
        self._sessions = sessions

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """The service, for a server."""
        return handler(SERVICE, Abort=self.abort, Snapshot=self.snapshot, Watch=self.watch)

    async def abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """End a request of anybody's, or one sample of it."""
        if not request.request_id:
            await abort(context, InvalidRequest("request_id", "is empty"))
        index = request.index if request.HasField("index") else None
        return pb.AbortResponse(found=self._engine.abort(request.request_id, index))

    async def snapshot(self, request: pb.SnapshotRequest, context: Context) -> pb.SnapshotResponse:
        """The state of the scheduler now."""
        return pb.SnapshotResponse(snapshot=self._snapshot(request))

    async def watch(self, request: pb.WatchRequest, context: Context) -> None:
        """Snapshots at an interval, until the caller leaves."""
        interval_ms = request.interval_ms if request.HasField("interval_ms") else DEFAULT_INTERVAL_MS
        if interval_ms < MIN_INTERVAL_MS:
            problem = f"is {interval_ms}; must be at least {MIN_INTERVAL_MS}"
            await abort(context, InvalidRequest("interval_ms", problem))
        while True:
            await context.write(pb.WatchResponse(snapshot=self._snapshot(request.options)))
            await asyncio.sleep(interval_ms / 1000)

    def _snapshot(self, options: pb.SnapshotRequest) -> pb.Snapshot:
        limit = options.max_requests if options.HasField("max_requests") else DEFAULT_MAX_REQUESTS
        snapshot = self._engine.snapshot(options.include_requests, options.include_blocks, limit)
        about = pb.Snapshot(
            unix_us=time.time_ns() // 1000,
            model=model_info(self._engine),
            num_sessions=self._sessions.num_sessions,
        )
        snapshot.MergeFrom(about)
        for worker in snapshot.workers:
            worker.device = self._engine.devices.get(worker.name, "")
            worker.num_ranks = self._engine.num_ranks.get(worker.name, 0)
        return snapshot
