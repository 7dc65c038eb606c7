"""One gateway process: the link to the scheduler, both doors, metrics, and an orderly end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import structlog
import uvloop

from gateway_svc.config import GatewaySettings
from gateway_svc.gateway import Gateway
from gateway_svc.metrics import Metrics
from gateway_svc.metrics_app import metrics_app
from gateway_svc.openai.app import build_app
from gateway_svc.openai.server import HttpServer, listen
from gateway_svc.rpc.server import RpcServer
from gateway_svc.scheduler_link import SchedulerLink
from gateway_svc.spans import Spans
from gateway_svc.text.tokenizer import ModelTokenizer, TokenizerError, load_tokenizer
from gateway_svc.ui.live import LiveState
from pagoda import models
from pagoda.tracing import Tracing

FLUSH_EVERY_S = 1.0
LAST_WORDS_S = 2.0  # for clients to be told that their requests end, after the grace period


def run(settings: GatewaySettings, shares_port: bool = False, parent_sentinel: int | None = None) -> None:
    """Serve until SIGTERM, SIGINT, or the end of the parent. `shares_port` for one process of several.

    Raises:
        SystemExit: the model cannot be found or loaded, or a port is taken.
    """
    try:
        tokenizer = load_tokenizer(models.resolve(settings.model), settings.tokenizer_threads)
        if settings.chat_template:
            tokenizer.use_chat_template(Path(settings.chat_template))
    except (FileNotFoundError, TokenizerError) as error:
        raise SystemExit(f"error: --model or --chat-template: {error}") from error
    uvloop.run(_serve(settings, tokenizer, shares_port, parent_sentinel))
    tokenizer.close()


async def _serve(
    settings: GatewaySettings, tokenizer: ModelTokenizer, shares_port: bool, parent_sentinel: int | None
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if parent_sentinel is not None:
        loop.add_reader(parent_sentinel, stop.set)
    server = GatewayServer(settings, tokenizer, shares_port)
    await server.start()
    try:
        await server.wait(stop)
    finally:
        if parent_sentinel is not None:
            loop.remove_reader(parent_sentinel)
        await server.stop()


class GatewayServer:
    """All of a gateway, on the running event loop."""

    def __init__(self, settings: GatewaySettings, tokenizer: ModelTokenizer, shares_port: bool) -> None:
        self._log = structlog.get_logger().bind(service="gateway")
        name = f"gateway-{socket.gethostname()}-{os.getpid()}"
        link = SchedulerLink(settings.scheduler, settings.token, name, settings.max_requests)
        metrics = Metrics(settings.served_name, alias=settings.metrics_alias)
        self.tracing = Tracing.start(settings.otlp_traces_endpoint, "gateway")
        spans = Spans(self.tracing, settings.served_name) if self.tracing is not None else None
        self.gateway = Gateway(settings, tokenizer, link, metrics, spans)
        self.rpc = RpcServer(self.gateway, shares_port)
        sock = listen("--http-port", settings.http_host, settings.http_port, shares_port)
        self.live = LiveState(settings.scheduler, settings.token)
        app = build_app(self.gateway, self.live)
        self.http = HttpServer(app, sock, settings.grace_s + LAST_WORDS_S)
        self.metrics: HttpServer | None = None
        if not shares_port:  # else the parent serves the metrics of all
            sock = listen("--metrics-port", settings.metrics_host, settings.metrics_port, shares_port=False)
            self.metrics = HttpServer(
                metrics_app(self.gateway.metrics.expose, settings.token), sock, LAST_WORDS_S
            )
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Listen on every port and dial the scheduler."""
        await self.rpc.start()
        self._tasks = [await door.start() for door in self._http_doors()]
        background = (self.gateway.link.run(), self._flush_metrics(), self._follow_link())
        self._tasks += [asyncio.create_task(work) for work in background]
        ports = {"http_port": self.http.port, "grpc_port": self.rpc.port}
        if self.metrics is not None:
            ports["metrics_port"] = self.metrics.port
        self._log.info("serving", model=self.gateway.model_name, **ports)

    async def wait(self, stop: asyncio.Event) -> None:
        """Return when `stop` is set; raise what ended a part of the gateway that should not end."""
        waiter = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait([waiter, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        for task in done - {waiter}:
            await task
            raise RuntimeError("a part of the gateway ended by itself")

    async def stop(self) -> None:
        """Take nothing new, let running requests go on for the grace period, then end."""
        self._log.info("stopping", open_requests=self.gateway.link.num_open)
        self.gateway.draining = True
        await self.live.close()
        await self.rpc.update_health()
        grace_s = self.gateway.settings.grace_s
        doors = [door.stop() for door in self._http_doors()]
        closing = asyncio.gather(self.rpc.stop(grace_s + LAST_WORDS_S), *doors)
        finished, _ = await asyncio.wait([closing], timeout=grace_s)
        if not finished:
            self.gateway.link.abandon("the gateway is shutting down")
        await closing
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)

    def _http_doors(self) -> list[HttpServer]:
        return [self.http] if self.metrics is None else [self.http, self.metrics]

    async def _flush_metrics(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_EVERY_S)
            self.gateway.metrics.flush()

    async def _follow_link(self) -> None:
        """Keep the health service in step with the link."""
        changed = asyncio.Event()
        self.gateway.link.on_change(changed.set)
        while True:
            changed.clear()
            await self.rpc.update_health()
            await changed.wait()
