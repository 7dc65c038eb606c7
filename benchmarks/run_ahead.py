"""How long a worker's device waits between steps, with a simulated device of 8 ms an iteration.

Scheduler, worker, gateway and client are processes of their own and speak real gRPC. The client holds 64
streams, either over HTTP through the gateway, or in one session with the scheduler as a gateway does. `D`
is the number of steps in flight; 1 is lockstep.

    python -m benchmarks.run_ahead            # the table, and JSON with --json FILE
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.cluster import Cluster
from tests.support.cluster_sched import SchedulerProcess, scheduler, sim_worker
from tests.support.session_client import SessionClient, request
from tests.support.sim_worker import StepTimes, idle_times, share_queued_ahead

MAX_P50_MS = 0.1
MAX_P99_MS = 1.0
MODEL = "smollm2-135m-instruct"  # only its tokenizer is used


def prompt(row: int) -> list[int]:
    """32 tokens, another prompt for each row."""
    return [3 + row, 5, 7, 11] * 8


async def stream_session(address: str, num_rows: int, num_tokens: int) -> None:
    """Run `num_rows` requests through one session with the scheduler."""
    async with SessionClient(address, name="run-ahead") as client:
        handles = await client.submit(
            *(request(prompt(i), max_tokens=num_tokens, ignore_eos=True, seed=i) for i in range(num_rows))
        )
        for received in await client.results(handles):
            assert len(received.tokens[0]) == num_tokens, "tokens are missing"


async def stream_http(port: int, row: int, num_tokens: int) -> None:
    """Run one request through the gateway, reading its events as they come."""
    body = json.dumps(
        {
            "model": MODEL,
            "prompt": prompt(row),
            "max_tokens": num_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "seed": row,
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    received = b""
    while piece := await reader.read(1 << 16):
        received = received[-4096:] + piece
    writer.close()
    assert f'"completion_tokens":{num_tokens}'.encode() in received.replace(b" ", b""), received[-500:]


@contextlib.contextmanager
def worker_times(
    depth: int, num_rows: int, iteration_ms: float
) -> Iterator[tuple[SchedulerProcess, list[StepTimes]]]:
    """A scheduler and a worker; when the block ends, the list holds the times of the worker's steps."""
    times: list[StepTimes] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        scheduler("--max-inflight", str(depth)) as running,
        sim_worker(
            running.address,
            Path(folder) / "report.json",
            iteration_ms=iteration_ms,
            slots=num_rows,
            model_name=MODEL,
            lenient=True,
        ) as worker,
    ):
        yield running, times
        times += worker.report()


def measure(depth: int, num_rows: int, num_tokens: int, iteration_ms: float) -> list[StepTimes]:
    """The times of every step of a run with one session."""
    with worker_times(depth, num_rows, iteration_ms) as (running, times):
        asyncio.run(stream_session(running.address, num_rows, num_tokens))
    return times


def measure_gateway(depth: int, num_rows: int, num_tokens: int, iteration_ms: float) -> list[StepTimes]:
    """The times of every step of a run through the gateway."""

    async def stream_all(port: int) -> None:
        await asyncio.gather(*(stream_http(port, row, num_tokens) for row in range(num_rows)))

    with worker_times(depth, num_rows, iteration_ms) as (running, times):
        cluster = Cluster(running, MODEL, dtype="")
        try:
            cluster.start_gateway()
            asyncio.run(stream_all(int(cluster.url.rsplit(":", 1)[1])))
        finally:
            if cluster.gateway is not None:
                cluster.gateway.stop()
    return times


def summarize(client: str, depth: int, times: list[StepTimes], num_rows: int) -> dict[str, Any]:
    """The figures of a run, over the steps with all rows."""
    idle = np.array(idle_times(times, num_rows)) * 1000
    return {
        "client": client,
        "depth": depth,
        "steps": len(idle),
        "idle_p50_ms": round(float(np.percentile(idle, 50)), 4),
        "idle_p99_ms": round(float(np.percentile(idle, 99)), 4),
        "idle_max_ms": round(float(idle.max()), 4),
        "queued_ahead": round(share_queued_ahead(times, num_rows), 4),
    }


def main() -> None:
    """Print the table; exit 1 when the bar is missed at D = 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--iteration-ms", type=float, default=8.0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    rows = []
    for client, run in (("gateway", measure_gateway), ("session", measure)):
        for depth in (1, 2, 3):
            times = run(depth, given.rows, given.tokens, given.iteration_ms)
            rows.append(summarize(client, depth, times, given.rows))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if given.json:
        given.json.write_text(json.dumps({"runs": rows}, indent=2))
    ours = [row for row in rows if row["depth"] == 2]
    met = all(row["idle_p50_ms"] <= MAX_P50_MS and row["idle_p99_ms"] <= MAX_P99_MS for row in ours)
    print(f"bar at D = 2: p50 <= {MAX_P50_MS} ms, p99 <= {MAX_P99_MS} ms: {'met' if met else 'MISSED'}")
    sys.exit(not met)


if __name__ == "__main__":
    main()
