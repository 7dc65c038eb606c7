"""Several gateway processes on the same ports: the kernel deals connections out among them (SO_REUSEPORT).

The parent holds the ports, serves the metrics of all, and ends when a child does: what restarts it is the
supervisor that runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from multiprocessing.process import BaseProcess

import structlog
import uvloop

from gateway_svc.config import GatewaySettings
from pagoda import logs


def run(settings: GatewaySettings) -> None:
    """Serve with `settings.processes` processes until SIGTERM or SIGINT, or until one of them ends.

    Raises:
        SystemExit: a process ended by itself, or a port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="pagoda-metrics-") as folder, _held_ports(settings) as settings:
        # Read by the metrics library when it is imported, here and in the children.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        context = multiprocessing.get_context("spawn")
        children: list[BaseProcess] = [
            context.Process(target=_child, args=(settings,), name=f"gateway-{i}")
            for i in range(settings.processes)
        ]
        for child in children:
            child.start()
        try:
            uvloop.run(_watch(settings, children))
        finally:
            _end(children, settings.grace_s)


@contextlib.contextmanager
def _held_ports(settings: GatewaySettings) -> Iterator[GatewaySettings]:
    """The settings with ports chosen, and the ports ours: nobody else's, not even another gateway's."""
    from gateway_svc.openai.server import listen

    chosen: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        for name, host, port in (
            ("http_port", settings.http_host, settings.http_port),
            ("grpc_port", settings.grpc_host, settings.grpc_port),
        ):
            flag = "--" + name.replace("_", "-")
            # Without sharing first: sharing would succeed beside another gateway that shares.
            with contextlib.closing(listen(flag, host, port, shares_port=False)) as alone:
                chosen[name] = alone.getsockname()[1]
            stack.enter_context(contextlib.closing(_hold(flag, host, chosen[name])))
        yield settings.model_copy(update=chosen)


def _hold(flag: str, host: str, port: int) -> socket.socket:
    """A socket that keeps the port for our children, and takes no connections itself.

    Without SO_REUSEADDR, if nothing is left in TIME_WAIT: a second gateway is then refused from the start on,
    and not only when the children listen.
    """
    from gateway_svc.openai.server import bind, listen

    try:
        return bind(host, port, socket.SO_REUSEPORT)
    except OSError:
        return listen(flag, host, port, shares_port=True)


def _child(settings: GatewaySettings) -> None:
    from gateway_svc import server

    logs.setup("gateway", settings.log_level)
    parent = multiprocessing.parent_process()
    server.run(settings, shares_port=True, parent_sentinel=parent.sentinel if parent else None)


async def _watch(settings: GatewaySettings, children: list[BaseProcess]) -> None:
    """Serve metrics until told to stop. Raises SystemExit when a child ends by itself."""
    from gateway_svc.metrics import expose
    from gateway_svc.metrics_app import metrics_app
    from gateway_svc.openai.server import HttpServer, listen

    log = structlog.get_logger().bind(service="gateway")
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[BaseProcess | None] = loop.create_future()

    def end(child: BaseProcess | None) -> None:
        if not stop.done():
            stop.set_result(child)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, None)
    for child in children:
        loop.add_reader(child.sentinel, end, child)
    sock = listen("--metrics-port", settings.metrics_host, settings.metrics_port, shares_port=False)
    exposed = functools.partial(expose, alias=settings.metrics_alias)
    metrics = HttpServer(metrics_app(exposed, settings.token), sock, settings.grace_s)
    await metrics.start()
    log.info(
        "serving",
        processes=len(children),
        http_port=settings.http_port,
        grpc_port=settings.grpc_port,
        metrics_port=metrics.port,
    )
    try:
        died = await stop
    finally:
        for child in children:
            loop.remove_reader(child.sentinel)
        await metrics.stop()
    if died is not None:
        died.join()
        log.error("process_died", process=died.name, exit_code=died.exitcode)
        raise SystemExit(died.exitcode if died.exitcode and died.exitcode > 0 else 1)


def _end(children: list[BaseProcess], grace_s: float) -> None:
    """Ask every child to stop, and make it stop if it does not."""
    for child in children:
        if child.is_alive():
            child.terminate()
    for child in children:
        child.join(grace_s + 5)
        if child.is_alive():
            child.kill()
            child.join()
