"""Pagoda beside other engines on the same two cores: one stream, 32 at once, 32 with a shared prefix.

    python -m benchmarks.cpu [--rounds 5] [--peers vllm-default ctranslate2-float32 ...] [--json FILE]
    python -m benchmarks.cpu --peers            # Pagoda alone

Pagoda is measured through its services: this process is the client (the SDK's asyncio client over gRPC, by
token ids), and gateway, scheduler and worker run beside it, all pinned to cores 0 and 1. The peers are called
in process (`peers_cpu.py`), pinned to the same cores. Engines alternate: each round gives each a new process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

from benchmarks import peers_cpu
from benchmarks.workload_cpu import MAX_TOKENS, prompts, rate
from pagoda.aio import AsyncClient

READY_S = 120
CORES = {0, 1}
# (row of the table, kind, peer, share of the peer's figure that must be reached)
BARS = (
    ("32 at once beside vLLM", "many", "vllm-default", 0.8),
    ("32 at once beside CTranslate2", "many", "ctranslate2-float32", 2.0),
    ("one stream beside vLLM", "one", "vllm-default", 1.0),
    ("shared prefix beside vLLM", "shared", "vllm-default", 1.0),
)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Pagoda:
    """All services, started with `pagoda serve` on cores 0 and 1, ready and warm.

    Raises RuntimeError when they are not ready within READY_S seconds.
    """

    def __init__(self, model: Path, dtype: str) -> None:
        http, self._grpc = _free_port(), _free_port()
        command = [sys.executable, "-m", "pagoda.cli.main", "serve", "--model", str(model), "--dtype", dtype]
        command += ["--http-port", str(http), "--grpc-port", str(self._grpc)]
        command += ["--scheduler-port", str(_free_port()), "--metrics-port", str(_free_port())]
        self._process = subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, sorted(CORES))), *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait(f"http://127.0.0.1:{http}/ready")
        asyncio.run(self._load(prompts("many", -1), 4))

    def _wait(self, url: str) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(url, timeout=2) as reply:
                    if reply.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        self.close()
        raise RuntimeError("Pagoda did not become ready; run `pagoda serve` to see why")

    async def _load(self, chosen: list[list[int]], max_tokens: int) -> tuple[float, float, float]:
        first: list[float] = []

        async def one(client: AsyncClient, prompt: list[int]) -> None:
            count = 0
            options: Any = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
            async for chunk in client.stream(prompt, **options):
                if not first:
                    first.append(time.perf_counter())
                count += len(chunk.token_ids)
            if count != max_tokens:
                raise RuntimeError(f"{count} tokens came, not {max_tokens}")

        async with AsyncClient(f"127.0.0.1:{self._grpc}") as client:
            await client.models()  # connected before the clock starts, as the peers are loaded
            start = time.perf_counter()
            await asyncio.gather(*(one(client, prompt) for prompt in chosen))
            return start, first[0], time.perf_counter()

    def run(self, kind: str, repeat: int) -> float:
        """Output tokens a second on `prompts(kind, repeat)`, by `workload_cpu.rate`."""
        chosen = prompts(kind, repeat)
        times = asyncio.run(self._load(chosen, MAX_TOKENS[kind]))
        return rate(kind, len(chosen) * MAX_TOKENS[kind], *times)

    def close(self) -> None:
        """End all services."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def measure(peers: list[str], kinds: list[str], rounds: int, model: Path, dtype: str) -> dict[str, Any]:
    """Tokens a second by engine and kind: every round's, and the median."""
    names = ["pagoda", *peers]
    results: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in kinds} for name in names}
    for repeat in range(rounds):
        for name in names:
            with Pagoda(model, dtype) if name == "pagoda" else peers_cpu.Peer(name, model) as engine:
                for kind in kinds:
                    speed = engine.run(kind, repeat)
                    results[name][kind].append(round(speed, 1))
                    print(f"round {repeat + 1}/{rounds} {name} {kind}: {speed:.1f} tokens/s", flush=True)
    medians = {n: {k: statistics.median(v) for k, v in by.items()} for n, by in results.items()}
    return {"rounds": results, "median": medians}


def verdicts(median: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """One entry for each bar whose peer was measured: the ratio and whether it is reached."""
    found = []
    for title, kind, peer, bar in BARS:
        if kind in median["pagoda"] and kind in median.get(peer, {}):
            ratio = median["pagoda"][kind] / median[peer][kind]
            found.append({"row": title, "ratio": round(ratio, 3), "bar": bar, "reached": ratio >= bar})
    return found


def main() -> int:
    """Measure and judge; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description="Pagoda and other engines on the CPU")
    parser.add_argument("--model", type=Path, default=peers_cpu.default_model())
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--peers", nargs="*", choices=peers_cpu.PEERS, default=list(peers_cpu.PEERS))
    parser.add_argument("--kinds", nargs="+", choices=MAX_TOKENS, default=list(MAX_TOKENS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.sched_setaffinity(0, CORES)
    result = measure(options.peers, options.kinds, options.rounds, options.model, options.dtype)
    result["bars"] = verdicts(result["median"])
    print(json.dumps({"median": result["median"], "bars": result["bars"]}, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    return 0 if all(bar["reached"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
