"""uvicorn, run inside of our own event loop and stopped by us."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway_svc.config import address

# What the kernel takes for a client before it has to read, and then once more uvicorn; by default, megabytes.
# Beyond it text gathers in the request's job, and comes as one chunk instead of many.
UNSENT_BYTES = 4096


def listen(name: str, host: str, port: int, shares_port: bool) -> socket.socket:
    """A socket to listen with. Raises SystemExit if the port is taken."""
    try:
        # A port in TIME_WAIT may be taken again at once; another listener on it is still an error.
        return bind(host, port, socket.SO_REUSEADDR, *([socket.SO_REUSEPORT] if shares_port else []))
    except OSError as error:
        raise SystemExit(
            f"error: {name}: cannot listen on {address(host, port)}: {error.strerror}"
        ) from error


def bind(host: str, port: int, *options: int) -> socket.socket:
    """A bound socket with these socket options on. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        for option in options:
            sock.setsockopt(socket.SOL_SOCKET, option, 1)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, for the process has its own; and it says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(HttpToolsProtocol):
    """A connection that keeps little for a client that does not read."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=UNSENT_BYTES)


class HttpServer:
    """One HTTP port."""

    def __init__(self, app: ASGIApp, sock: socket.socket, grace_s: float) -> None:
        self.port: int = sock.getsockname()[1]
        self._socket = sock
        # For the connections that it accepts: they inherit it. What is on its way to a client is not counted.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self._server = _Server(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=max(1, round(grace_s)),
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> asyncio.Task[None]:
        """Listen. The task that is returned ends when the server has stopped."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        await self._server.listening.wait()
        return self._task

    async def stop(self) -> None:
        """Take no new connections; let running responses go on for the grace period."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
