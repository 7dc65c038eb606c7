"""`make demo`: starts scheduler, one CPU worker and gateway, asks a question over the OpenAI route, stops.

Free ports are taken, so that a cluster that runs already is left alone.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from pagoda.cli.cluster import ClusterError, ClusterSpec
from pagoda.cli.serve import Cluster, run_folder
from pagoda.models import EMBEDDED_MODEL

QUESTION = "What is the capital of France?"


class DemoError(Exception):
    """The gateway did not answer as it should."""


def main() -> int:
    """Run the demonstration; the exit status."""
    console = Console(stderr=True)
    spec = ClusterSpec(
        model=EMBEDDED_MODEL, device="cpu", http_port=0, grpc_port=0, scheduler_port=0, metrics_port=0
    )
    begin = time.monotonic()
    try:
        with run_folder(None) as folder:
            cluster = Cluster(spec, folder, console)
            try:
                cluster.start()
                cluster.wait_ready()
                console.print(
                    f"ready after {time.monotonic() - begin:.1f} s; asking over {cluster.spec.http_url}/v1"
                )
                print(f"\n> {QUESTION}")
                print(ask(cluster.spec))
            finally:
                console.print("\nstopping")
                cluster.stop()
    except (ClusterError, DemoError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print("stopped")
    return 0


def ask(spec: ClusterSpec) -> str:
    """Ask with streaming, print the answer as it comes; the line of figures."""
    begin = time.perf_counter()
    first = last = 0.0
    num_tokens = 0
    for chunk in stream(spec):
        if chunk.get("usage"):
            num_tokens = chunk["usage"]["completion_tokens"]
        for choice in chunk["choices"]:
            text = choice["delta"].get("content")
            if text:
                last = time.perf_counter()
                first = first or last
                print(text, end="", flush=True)
    print()
    if not first:
        raise DemoError("the answer is empty")
    rate = (num_tokens - 1) / (last - first) if last > first else 0.0
    return f"\ntime to first token {(first - begin) * 1000:.0f} ms, {rate:.1f} tokens/s, {num_tokens} tokens"


def stream(spec: ClusterSpec) -> Iterator[dict[str, Any]]:
    """The chunks of the streamed answer. Raises DemoError."""
    body = {
        "model": spec.model,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 64,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection(spec.host, spec.http_port, timeout=60)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise DemoError(f"the gateway answered {response.status}: {response.read().decode()}")
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if data == "[DONE]":
                return
            if data:
                yield json.loads(data)
        raise DemoError("the stream ended without [DONE]")
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
