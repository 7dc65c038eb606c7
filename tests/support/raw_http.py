"""A client of the OpenAI routes that is nothing but a socket: a test decides when each byte is read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

PIECE = 1 << 16
# Loopback has segments of 64 KB, which make the kernel buffer megabytes for a client that does not read.
# Small segments and a small window leave it some 50 KB, so that the server feels the slow client.
SMALL_SEGMENT, SMALL_WINDOW = 536, 2048


@dataclass
class Answer:
    """What a response said. Samples are by their index."""

    status: int
    done: bool = False
    num_events: int = 0
    text: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    token_ids: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    finish: dict[int, str] = field(default_factory=dict)
    prompt_token_ids: list[int] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    def add(self, body: dict[str, Any]) -> None:
        """Take in a whole body, or one event of a stream."""
        self.error = body.get("error") or self.error
        self.usage = body.get("usage") or self.usage
        self.prompt_token_ids = body.get("prompt_token_ids") or self.prompt_token_ids
        for choice in body.get("choices", ()):
            index = choice["index"]
            self.text[index] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            self.prompt_token_ids = choice.get("prompt_token_ids") or self.prompt_token_ids
            self.token_ids[index] += choice.get("token_ids") or ()
            if choice["finish_reason"]:
                self.finish[index] = choice["finish_reason"]


class RawRequest:
    """One POST of JSON on a connection of its own; `received` is all that has been read of the response."""

    def __init__(self, sock: socket.socket) -> None:
        self.received = bytearray()
        self.ended = False
        self._socket = sock

    async def read(self, most: int = PIECE) -> int:
        """Read what has come, at most so many bytes, waiting for the first; how many. 0 is the end."""
        data = await asyncio.get_running_loop().sock_recv(self._socket, most)
        self.received += data
        self.ended = not data
        return len(data)

    async def rest(self) -> Answer:
        """Read to the end; the answer."""
        while await self.read():
            pass
        return parse(bytes(self.received))

    async def wait_for(self, text: bytes, count: int = 1) -> None:
        """Read until `text` has come so often."""
        while self.received.count(text) < count:
            assert await self.read(), f"the response ended: {bytes(self.received)[-500:]!r}"

    def leave(self) -> None:
        """Close the connection, whatever is still to come."""
        self._socket.close()


@contextlib.asynccontextmanager
async def post(
    url: str, body: dict[str, Any], path: str = "/v1/completions", small: bool = False
) -> AsyncIterator[RawRequest]:
    """A request that has been sent; `small` makes the kernel buffer little of its response."""
    where = urlsplit(url)
    assert where.hostname is not None
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {where.netloc}\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
    with socket.socket() as sock:
        sock.setblocking(False)
        if small:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_WINDOW)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SMALL_SEGMENT)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, (where.hostname, where.port))
        await loop.sock_sendall(sock, head.encode() + content)
        yield RawRequest(sock)


def parse(response: bytes) -> Answer:
    """The answer in the bytes of a response that has ended."""
    head, _, rest = response.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = _dechunked(rest) if headers.get("transfer-encoding") == "chunked" else rest
    answer = Answer(int(status_line.split()[1]))
    if not headers["content-type"].startswith("text/event-stream"):
        answer.add(json.loads(body))
        return answer
    for event in body.decode().split("\n\n"):
        data = event.removeprefix("data: ")
        if data == "[DONE]":
            answer.done = True
        elif data:
            answer.num_events += 1
            answer.add(json.loads(data))
    return answer


def _dechunked(body: bytes) -> bytes:
    pieces = []
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        pieces.append(body[:length])
        body = body[length + 2 :]
    return b"".join(pieces)
