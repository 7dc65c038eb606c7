"""The clients of `benchmarks.front_door`: many streams over HTTP in one process, as cheap as they can be.

Nothing is parsed while the streams run: what comes is kept, and looked at when all have ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import uvloop

from tests.support.raw_http import parse
from tests.support.sim_worker import expected_output

SMALL_WINDOW = 4096  # bytes that the kernel keeps for a client that reads slowly


@dataclass
class Result:
    """What all streams together brought, in `seconds` from the first byte to the last."""

    streams: int = 0
    chunks: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Stream(asyncio.Protocol):
    """One POST and its response. With a pause it reads once, then nothing for so many seconds, and so on."""

    def __init__(self, request: bytes, pause_s: float) -> None:
        self.received: list[bytes] = []
        self.first = self.last = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._pause_s = pause_s
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.received.append(data)
        if self._pause_s:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(self._pause_s, self._resume)

    def _resume(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


def request_of(given: argparse.Namespace, row: int) -> bytes:
    """The bytes of one request: another prompt and seed for each row."""
    body: dict[str, Any] = {
        "max_tokens": given.tokens,
        "seed": row,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if given.path == "/v1/completions":
        body["prompt"] = [3 + row, 5, 7, 11] * 8
    else:
        body["messages"] = [{"role": "user", "content": f"Tell me {row} things."}]
    content = json.dumps(body).encode()
    head = f"POST {given.path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head.encode() + f"connection: close\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content


async def run(given: argparse.Namespace) -> Result:
    """Run all streams at once and check every token of each."""
    loop = asyncio.get_running_loop()
    streams = []
    for row in range(given.streams):
        sock = socket.socket()
        sock.setblocking(False)
        if given.pause_ms:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_WINDOW)
        await loop.sock_connect(sock, ("127.0.0.1", given.port))
        made = Stream(request_of(given, row), given.pause_ms / 1000)
        await loop.create_connection(lambda made=made: made, sock=sock)
        streams.append(made)
    await asyncio.gather(*(stream.ended for stream in streams))
    first = min(stream.first for stream in streams)
    result = Result(seconds=max(stream.last for stream in streams) - first, cpu_s=time.process_time())
    for row, stream in enumerate(streams):
        check(result, given, row, b"".join(stream.received))
    return result


def check(result: Result, given: argparse.Namespace, row: int, response: bytes) -> None:
    """Count a stream's chunks and tokens, and compare these with what the worker must have drawn."""
    answer = parse(response)
    ids = answer.token_ids[0]
    result.streams += 1
    result.bytes += len(response)
    result.chunks += answer.num_events - 1  # without the usage's
    result.tokens += len(ids)
    expected = expected_output(answer.prompt_token_ids, row, given.tokens, given.vocab)
    usage = (answer.usage or {}).get("completion_tokens")
    if ids != expected:
        at = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(ids))
        result.wrong.append(f"stream {row}: {len(ids)} of {len(expected)} tokens, different from {at} on")
    elif not answer.done or answer.finish.get(0) != "length" or usage != given.tokens:
        result.wrong.append(f"stream {row}: done {answer.done}, finish {answer.finish}, usage {usage}")


def main() -> None:
    """Print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", default="/v1/completions")
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--vocab", type=int, required=True)
    parser.add_argument("--pause-ms", type=float, default=0.0, help="between two reads; 0 reads as it comes")
    print(json.dumps(asdict(uvloop.run(run(parser.parse_args())))))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
