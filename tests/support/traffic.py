"""Requests of every kind that boards can show, sent to live services for a while.

    python -m tests.support.traffic --url http://127.0.0.1:8000 --grpc 127.0.0.1:8001 --seconds 240

Chats and completions, alone and many at once; samples of one prompt; prompts that begin alike; clients that
leave; aborts; and requests that are refused. What fits and what is preempted is up to the server.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc

import pagoda
from pagoda.models import EMBEDDED_MODEL
from pagoda.v1 import scheduler_pb2 as pb
from pagoda.v1 import scheduler_pb2_grpc as rpc

GREEDY = {"temperature": 0.0, "ignore_eos": True}
PREFIX = list(range(1000, 1048))
PAUSE_S, WAVE_S = 1.0, 60.0


@dataclass
class Traffic:
    """What has been sent, by kind. The kinds take turns in threads of their own."""

    url: str
    grpc: str
    scheduler: str
    sent: Counter[str] = field(default_factory=Counter)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def run(self, stop: threading.Event, waves: bool = False) -> None:
        """Send until told to stop, then wait for what is still out. With `waves`, more and less in turn.

        Raises what a request raised that should have been answered.
        """
        kinds: Sequence[Callable[[pagoda.Client], None]] = (
            self.chats,
            self.chats_over_http,
            self.many,
            self.samples,
            self.alike,
            self.leaves,
            self.aborts,
            self.refused,
        )

        def repeat(kind: Callable[[pagoda.Client], None], client: pagoda.Client) -> None:
            while not stop.is_set():
                kind(client)
                self.sent[kind.__name__] += 1
                height = math.sin(2 * math.pi * time.monotonic() / WAVE_S) if waves else 0.0
                stop.wait(PAUSE_S * (1 + height))

        with pagoda.Client(self.grpc) as client, ThreadPoolExecutor(len(kinds)) as threads:
            for done in [threads.submit(repeat, kind, client) for kind in kinds]:
                done.result()

    def chats(self, client: pagoda.Client) -> None:
        """A streamed conversation."""
        question = {"role": "user", "content": f"What is {next(self._numbers)} plus one?"}
        with client.stream_chat([question], max_tokens=16, temperature=0.0) as stream:
            assert [chunk.text for chunk in stream]

    def chats_over_http(self, client: pagoda.Client) -> None:
        """The same over the OpenAI route, and not streamed."""
        question = {"role": "user", "content": f"What is {next(self._numbers)} minus one?"}
        body = json.dumps({"model": EMBEDDED_MODEL, "messages": [question], "max_tokens": 16}).encode()
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            assert json.load(reply)["choices"]

    def many(self, client: pagoda.Client) -> None:
        """More at once than a small cache holds, so that some have to give way."""
        first = 2000 + 800 * (next(self._numbers) % 20)
        prompts = [list(range(i, i + 32)) for i in range(first, first + 800, 100)]
        client.batch(prompts, max_tokens=40, **GREEDY)

    def samples(self, client: pagoda.Client) -> None:
        """Four answers to one prompt."""
        begin = 20000 + next(self._numbers)
        client.generate(list(range(begin, begin + 40)), n=4, max_tokens=12, **GREEDY)

    def alike(self, client: pagoda.Client) -> None:
        """A prompt whose beginning has been computed before."""
        client.generate([*PREFIX, 30000 + next(self._numbers)], max_tokens=8, **GREEDY)

    def leaves(self, client: pagoda.Client) -> None:
        """A client that goes when it has seen some tokens."""
        with client.stream("Once upon a time", max_tokens=300, **GREEDY) as stream:
            next(iter(stream))

    def aborts(self, client: pagoda.Client) -> None:
        """An operator that ends a request."""
        name = f"aborted-{time.monotonic_ns()}"
        begun = threading.Event()

        def read() -> None:
            with client.stream("It was", request_id=name, max_tokens=300, **GREEDY) as stream:
                for _ in stream:
                    begun.set()

        with grpc.insecure_channel(self.scheduler) as channel, ThreadPoolExecutor(1) as thread:
            reading = thread.submit(read)
            begun.wait(30)
            rpc.ControlServiceStub(channel).Abort(pb.AbortRequest(request_id=name), timeout=10)
            reading.result()

    def refused(self, client: pagoda.Client) -> None:
        """A request that makes no sense."""
        try:
            client.generate("x", temperature=-1.0)
        except pagoda.InvalidRequest:
            return
        raise AssertionError("a temperature below 0 was accepted")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the gateway's OpenAI routes")
    parser.add_argument("--grpc", default="127.0.0.1:8001", help="of the gateway")
    parser.add_argument("--scheduler", default="127.0.0.1:50051")
    parser.add_argument("--seconds", type=float, default=240.0)
    given = parser.parse_args()
    traffic, stop = Traffic(given.url, given.grpc, given.scheduler), threading.Event()
    threading.Timer(given.seconds, stop.set).start()
    traffic.run(stop, waves=True)
    print(dict(traffic.sent))


if __name__ == "__main__":
    main()
