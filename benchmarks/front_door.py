"""How many events and tokens one gateway process serves, with a simulated worker, all on the same two cores.

Scheduler, worker, gateway and the clients' process are real and speak real gRPC and HTTP; only the device is
simulated: it keeps time and draws tokens that anyone can compute, so that each one that comes is checked.

    python -m benchmarks.front_door           # both phases, and JSON with --json FILE

`keep-up`: clients read what comes as it comes; a chunk a stream and step. `slow`: clients read now and then,
with a small window, and what was computed meanwhile comes as one chunk. A chunk is a server-sent event.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.support.cluster import Cluster
from tests.support.cluster_sched import scheduler, sim_worker

MODEL = "smollm2-135m-instruct"  # only its tokenizer is used
VOCAB = 49152
NUM_CORES = 2
CLIENT_TIMEOUT_S = 600


@dataclass(frozen=True)
class Phase:
    """A load, and what it must reach: the device offers streams / iteration tokens a second."""

    name: str
    streams: int
    tokens: int
    iteration_ms: float
    pause_ms: float = 0.0
    min_chunks: float = 0.0  # a second
    min_tokens: float = 0.0  # a second


PHASES = (
    Phase("keep-up", streams=64, tokens=1000, iteration_ms=8.0, min_chunks=4000),
    Phase("slow", streams=256, tokens=2000, iteration_ms=8.0, pause_ms=1000.0, min_tokens=20_000),
)


def measure(phase: Phase, path: str = "/v1/completions") -> dict[str, Any]:
    """One run of a phase on services of its own.

    Raises:
        AssertionError: a token was lost or is another one, or the scheduler broke a rule of the wire.
    """
    blocks = phase.streams * (phase.tokens // 16 + 8)
    with scheduler() as running, sim_worker(
        running.address, iteration_ms=phase.iteration_ms, slots=phase.streams, blocks=blocks, vocab=VOCAB,
        model_name=MODEL, lenient=True,
    ) as worker:  # fmt: skip
        cluster = Cluster(running, MODEL, dtype="")
        try:
            cluster.start_gateway()
            assert cluster.gateway is not None
            tiers = {"gateway": cluster.gateway, "scheduler": running, "worker": worker}
            processes = {name: psutil.Process(tier.popen.pid) for name, tier in tiers.items()}
            before = {name: _cpu_s(process) for name, process in processes.items()}
            port = cluster.url.rsplit(":", 1)[1]
            arguments = ["--port", port, "--path", path, "--streams", str(phase.streams)]
            arguments += ["--tokens", str(phase.tokens), "--vocab", str(VOCAB)]
            arguments += ["--pause-ms", str(phase.pause_ms)]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.front_door_client", *arguments],
                stdout=subprocess.PIPE, timeout=CLIENT_TIMEOUT_S, check=True,
            )  # fmt: skip
            used = {name: _cpu_s(process) - before[name] for name, process in processes.items()}
        finally:
            if cluster.gateway is not None:
                cluster.gateway.stop()
    came = json.loads(done.stdout)
    assert not came["wrong"], came["wrong"][:5]
    assert came["tokens"] == phase.streams * phase.tokens, came
    return {
        "phase": phase.name,
        "path": path,
        "streams": phase.streams,
        "seconds": round(came["seconds"], 2),
        "chunks_per_s": round(came["chunks"] / came["seconds"]),
        "tokens_per_s": round(came["tokens"] / came["seconds"]),
        "tokens_per_chunk": round(came["tokens"] / came["chunks"], 2),
        "mb_per_s": round(came["bytes"] / came["seconds"] / 1e6, 2),
        "cpu_s": {name: round(seconds, 2) for name, seconds in {**used, "clients": came["cpu_s"]}.items()},
        "lost": 0,
    }


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    """Print the figures; exit 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="the best one counts")
    parser.add_argument("--only", choices=[phase.name for phase in PHASES])
    parser.add_argument("--path", choices=["/v1/completions", "/v1/chat/completions"], action="append")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    os.sched_setaffinity(
        0, sorted(os.sched_getaffinity(0))[:NUM_CORES]
    )  # and so everything started from here
    met, runs, figures = True, [], {}
    for phase in PHASES:
        if given.only not in (None, phase.name):
            continue
        for path in given.path or ["/v1/completions", "/v1/chat/completions"]:
            best: dict[str, Any] = {}
            for _ in range(given.rounds):
                runs.append(measure(phase, path))
                print("  ".join(f"{key} {value}" for key, value in runs[-1].items()), flush=True)
                best = max(best, runs[-1], key=lambda run: run.get("tokens_per_s", 0))
            met &= best["chunks_per_s"] >= phase.min_chunks and best["tokens_per_s"] >= phase.min_tokens
            figures[f"{phase.name} {path}"] = best
    if given.json:
        given.json.write_text(json.dumps({"best": figures, "runs": runs}, indent=2))
    keep_up, slow = PHASES
    bars = f"{keep_up.name} >= {keep_up.min_chunks:g} chunks/s, {slow.name} >= {slow.min_tokens:g} tokens/s"
    print(f"{bars}: {'met' if met else 'MISSED'}")
    sys.exit(not met)


if __name__ == "__main__":
    main()
