"""Groups of sequences on a GPU, through the services: n samples of a prompt, and beam search, beside vLLM.

    python -m benchmarks.gpu_groups --out groups.json [--vllm vllm_beam_result.json]

Random weights, prompts of 256 tokens, end-of-text ignored: the workload of the peers' `bench_vllm_beam.py`,
whose JSON `--vllm` takes. n samples: 64 requests, 128 tokens a sample, temperature 1. Beams: 64 tokens, as
many results as beams; "beam tokens" are requests x width x 64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_client import Client, RunError
from benchmarks.gpu_flags import add_service_flags, described, start, worker_command
from benchmarks.gpu_models import PRESETS, config_folder
from benchmarks.gpu_services import ServiceError, Services, reporting
from benchmarks.workload import fixed

PACKAGES = ("torch", "triton", "grpcio", "protobuf", "numpy")
SEED = 3
# Beam tokens a second that a width and a number of requests must reach on an H100 with the 7B shape.
BEAM_BARS = {(4, 64): 10_000, (6, 16): 5_000}
N_BAR = 1.10  # times vLLM's output tokens a second


def measured(
    client: Client, o: argparse.Namespace, kind: str, width: int, num_requests: int
) -> dict[str, Any]:
    """One row: `repeat` runs after one that warms."""
    is_beam = kind == "beam"
    answer_len = o.beam_answer_len if is_beam else o.answer_len
    seconds = []
    for repeat in range(1 + o.repeat):
        prompts = fixed(num_requests, o.prompt_len, answer_len, SEED + repeat)
        beam_width = width if is_beam else None
        outcome = client.run(prompts, 0.0 if is_beam else 1.0, n=width, beam_width=beam_width)
        if repeat:
            seconds.append(outcome.seconds)
    rate = num_requests * width * answer_len / statistics.median(seconds)
    unit = "beam tokens/s" if is_beam else "output tokens/s"
    print(f"{kind} {width}, {num_requests} requests: {rate:8.0f} {unit}", flush=True)
    row = {"what": kind, "width": width, "requests": num_requests, "seconds": seconds, "tokens_s": rate}
    return row | {"prompt_len": o.prompt_len, "answer_len": answer_len}


def judged(rows: list[dict[str, Any]], vllm: Path | None) -> list[str]:
    """What is below its bar, in words; prints each figure beside its bar."""
    missed = []
    theirs = {}
    if vllm is not None:
        for row in json.loads(vllm.read_text())["results"]:
            if row["what"] == "n":
                tokens = row["requests"] * row["n"] * row["output_len"]
                theirs[row["n"]] = tokens / statistics.median(row["seconds"])
    for row in rows:
        bar: float | None = BEAM_BARS.get((row["width"], row["requests"])) if row["what"] == "beam" else None
        if row["what"] == "n" and row["width"] in theirs:
            peer = theirs[row["width"]]
            print(
                f"n = {row['width']}: {row['tokens_s']:.0f} beside {peer:.0f}: {row['tokens_s'] / peer:.3f}"
            )
            bar = N_BAR * peer if row["width"] > 1 else None
        if bar is not None and row["tokens_s"] < bar:
            missed.append(f"{row['what']} {row['width']}: {row['tokens_s']:.0f} tokens/s, not {bar:.0f}")
    return missed


def run(model: Path, o: argparse.Namespace) -> list[dict[str, Any]]:
    """Start the services, measure every row, end them."""
    services = Services(o.logs)
    rows = []
    with services:
        start(o, services, worker_command(o, model), "--no-prefix-cache")
        time.sleep(o.settle_s)
        with Client(services.address, o.limit_s, services) as client, reporting(services):
            for kind, width, num_requests in o.cases:
                rows.append(measured(client, o, kind, width, num_requests))
        services.check()
    return rows


def case(text: str) -> tuple[str, int, int]:
    """`n4x64` or `beam6x16`: kind, width and requests."""
    kind = "beam" if text.startswith("beam") else "n"
    width, num_requests = text.removeprefix(kind).split("x")
    return kind, int(width), int(num_requests)


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description="groups of sequences", epilog=__doc__)
    p.add_argument("--preset", choices=PRESETS, default="qwen2.5-7b")
    add_service_flags(p, logs=Path("/tmp/pagoda-groups"), slots=256, ready_s=300.0, settle_s=10.0)
    p.add_argument("--vllm", type=Path, help="JSON of bench_vllm_beam.py from the same machine")
    p.add_argument(
        "--cases",
        type=lambda text: [case(c) for c in text.split(",")],
        default="n1x64,n4x64,beam4x64,beam6x16",
    )
    p.add_argument("--prompt-len", type=int, default=256)
    p.add_argument("--answer-len", type=int, default=128)
    p.add_argument("--beam-answer-len", type=int, default=64)
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--limit-s", type=float, default=300.0, help="longest single run")
    return p.parse_args()


def main() -> int:
    """Run it; 1 where a run failed, 2 where a bar was missed."""
    o = parse()
    model = o.model or config_folder(o.preset, o.base)
    try:
        rows = run(model, o)
    except (ServiceError, RunError) as error:
        print(f"{model.name}: {error}", file=sys.stderr)
        return 1
    missed = judged(rows, o.vllm if o.vllm and o.vllm.exists() else None)
    if o.out:
        result = described(o, PACKAGES) | {"rows": rows, "missed": missed}
        o.out.write_text(json.dumps(result, indent=1))
    print(*missed, sep="\n")
    return 2 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
