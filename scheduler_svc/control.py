"""Looking into the scheduler and steering it: Abort, Snapshot and Watch."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import grpc.aio
import msgspec

from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc.core import snapshot as core
from scheduler_svc.engine import Engine
from scheduler_svc.errors import InvalidRequest, abort
from scheduler_svc.session import SchedulerService, model_info

SERVICE = "pagoda.v1.ControlService"
MIN_INTERVAL_MS = 50
DEFAULT_INTERVAL_MS = 1000
DEFAULT_MAX_REQUESTS = 1000


class ControlService:
    """Serves `ControlService`."""

    def __init__(self, engine: Engine, sessions: SchedulerService) -> None:
        self._engine = engine
        self._sessions = sessions

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """The service, for a server."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Abort": grpc.unary_unary_rpc_method_handler(
                    self.abort,
                    request_deserializer=pb.AbortRequest.FromString,
                    response_serializer=pb.AbortResponse.SerializeToString,
                ),
                "Snapshot": grpc.unary_unary_rpc_method_handler(
                    self.snapshot,
                    request_deserializer=pb.SnapshotRequest.FromString,
                    response_serializer=pb.SnapshotResponse.SerializeToString,
                ),
                "Watch": grpc.unary_stream_rpc_method_handler(
                    self.watch,
                    request_deserializer=pb.WatchRequest.FromString,
                    response_serializer=pb.WatchResponse.SerializeToString,
                ),
            },
        )

    async def abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.AbortResponse:
        """End a request of anybody's, or one sample of it."""
        if not request.request_id:
            await abort(context, InvalidRequest("request_id", "is empty"))
        index = request.index if request.HasField("index") else None
        return pb.AbortResponse(found=self._engine.abort(request.request_id, index))

    async def snapshot(
        self, request: pb.SnapshotRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.SnapshotResponse:
        """The state of the scheduler now."""
        return pb.SnapshotResponse(snapshot=self._snapshot(request))

    async def watch(self, request: pb.WatchRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
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
        taken = self._engine.snapshot(options.include_requests, options.include_blocks, limit)
        model = model_info(self._engine)
        return pb.Snapshot(
            unix_us=time.time_ns() // 1000,
            model=model,
            num_waiting=taken.num_waiting,
            num_running=taken.num_running,
            workers=[self._worker(worker) for worker in taken.workers],
            requests=[_request(request) for request in taken.requests],
            generation_tokens=taken.generation_tokens,
            prompt_tokens=taken.prompt_tokens,
            num_preemptions=taken.num_preemptions,
            num_sessions=self._sessions.num_sessions,
        )

    def _worker(self, worker: core.WorkerView) -> pb.WorkerSnapshot:
        device = self._engine.devices.get(worker.name, "")
        return pb.WorkerSnapshot(device=device, **msgspec.structs.asdict(worker))


def _request(request: core.RequestView) -> pb.RequestSnapshot:
    fields = msgspec.structs.asdict(request)
    fields["samples"] = [pb.SampleSnapshot(**msgspec.structs.asdict(s)) for s in request.samples]
    return pb.RequestSnapshot(**fields)
