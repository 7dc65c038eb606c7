"""The OpenAI route under load, for any engine: a client process of its own streams completions."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_rows import Load, Row

CLIENT = "bench_serve.py"


class ClientFailedError(Exception):
    """The client process failed, or a request in it; the message ends with its last words."""


@dataclass(frozen=True)
class Route:
    """A server that is ready, and how much it gets.

    Attributes:
        url: of the server, without a path.
        model: the name that it serves.
        peers: the folder of the client script, the same one for every engine.
        concurrency: streams at once, one row each.
        num_requests: of each run.
        limit_s: the longest that one run of the client may take.
    """

    url: str
    model: str
    peers: Path
    concurrency: Sequence[int] = (64, 256)
    num_requests: int = 512
    limit_s: float = 240.0


def openai_rows(route: Route, load: Load, folder: Path) -> Iterator[Row]:
    """One row for each concurrency. Raises ClientFailedError where the client fails or a request does."""
    runs = [_run(route, load.unseen(), folder / f"openai-{i}.json") for i in range(load.repeat)]
    for results in zip(*runs, strict=True):
        row = {
            "workload": "openai",
            "concurrency": results[0]["concurrency"],
            "requests": route.num_requests,
            "output_tok_s": statistics.median(r["output_tok_s"] for r in results),
            "gap_p50_ms": statistics.median(r["gap_ms"]["50"] for r in results),
            "gap_p99_ms": statistics.median(r["gap_ms"]["99"] for r in results),
            "ttft_p50_ms": statistics.median(r["ttft_ms"]["50"] for r in results),
            "runs": list(results),
        }
        load.say(
            f"openai, {row['concurrency']:>3} at once {row['output_tok_s']:9.0f} output tok/s   gap p99 "
            f"{row['gap_p99_ms']:7.1f} ms   TTFT p50 {row['ttft_p50_ms']:7.1f} ms"
        )
        yield row


def _run(route: Route, seed: int, out: Path) -> list[Row]:
    command = [sys.executable, str(route.peers / CLIENT), "--url", route.url, "--model", route.model]
    command += ["--concurrency", ",".join(map(str, route.concurrency)), "--n", str(route.num_requests)]
    command += ["--seed", str(seed), "--out", str(out)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=route.limit_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise ClientFailedError(f"{CLIENT} did not end within {route.limit_s:.0f} s") from error
    if done.returncode:
        raise ClientFailedError(
            f"{CLIENT} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}"
        )
    results: list[Row] = json.loads(out.read_text())
    for result in results:
        if result["failed"]:
            raise ClientFailedError(f"{result['failed']} requests failed: {result['errors']}")
    return results
