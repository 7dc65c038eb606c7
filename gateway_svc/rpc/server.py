"""The gRPC server: inference, health and reflection on one port."""

from __future__ import annotations

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gateway_svc.config import address
from gateway_svc.gateway import Gateway
from gateway_svc.rpc.service import InferenceService
from pagoda.transport import SERVER_OPTIONS, server_interceptors
from pagoda.v1 import inference_pb2, inference_pb2_grpc

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name


class RpcServer:
    """Serves the gateway over gRPC. Health is SERVING only while a request can be served."""

    def __init__(self, gateway: Gateway, shares_port: bool) -> None:
        settings = gateway.settings
        options = dict(SERVER_OPTIONS)
        options["grpc.max_receive_message_length"] = settings.max_body_bytes
        options["grpc.so_reuseport"] = int(shares_port)
        self._gateway = gateway
        self._server = grpc.aio.server(
            options=list(options.items()), interceptors=server_interceptors(settings.token)
        )
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(gateway), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.port = 0

    async def start(self) -> None:
        """Listen. Raises SystemExit if the port is taken."""
        settings = self._gateway.settings
        listen = address(settings.grpc_host, settings.grpc_port)
        try:
            self.port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise SystemExit(f"error: --grpc-port: cannot listen on {listen}: {error}") from error
        await self.update_health()
        await self._server.start()

    async def update_health(self) -> None:
        """Say whether a request can be served now."""
        states = health_pb2.HealthCheckResponse
        status = states.SERVING if self._gateway.ready else states.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls; let running ones go on for `grace_s`."""
        await self._server.stop(grace_s)
