"""Pagoda on a GPU, end to end through its services, beside vLLM.

    python -m benchmarks.gpu --preset qwen2.5-7b --out pagoda.json [--vllm vllm.json]
    python -m benchmarks.gpu --preset qwen2.5-0.5b --rows openai --tokenizer FOLDER --peers FOLDER
    python -m benchmarks.gpu --simulate --num-requests 50 --num-fixed 16      # no GPU: a simulated worker

Scheduler and worker (and gateway, for `openai`) are processes of their own; this process is their client, by
token ids over one Session. Random weights, bf16, prefix cache off, end-of-text ignored; what the rows mean
says `gpu_rows.py`. `--vllm` takes the JSON of `gpu_vllm.py` from the same machine and prints both.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import gpu_bars
from benchmarks.gpu_client import Client, RefusedError, RunError
from benchmarks.gpu_flags import add_service_flags, described, start, worker_command
from benchmarks.gpu_models import IN_MEMORY, PRESETS, config_folder, room_for, write_checkpoint
from benchmarks.gpu_openai import ClientFailedError, Route, openai_rows
from benchmarks.gpu_rows import ROWS, Load, Row, warm
from benchmarks.gpu_services import ServiceError, Services, reporting
from benchmarks.workload import fixed

PACKAGES = ("torch", "triton", "grpcio", "protobuf", "numpy", "pydantic", "msgspec", "fastapi", "uvicorn")
SIMULATED_BLOCKS = 65536
# Where compiled kernels are kept: fresh folders make a start the first one.
CACHES = ("PAGODA_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")


class Bench:
    """One run of the program: its options, and the rows so far, which are written after each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.started = time.perf_counter()
        self.load = Load(
            num_sharegpt=options.num_requests,
            num_fixed=options.num_fixed,
            num_stop_ids=options.num_stop_ids,
            repeat=options.repeat,
            batches=options.batches,
            temperatures=options.temperatures,
            say=self.say,
        )
        self.model = options.model or config_folder(options.preset, options.base, options.tokenizer)
        names = {"engine": "pagoda", "preset": options.preset}
        self.result: dict[str, Any] = names | described(options, PACKAGES) | {"results": []}

    def say(self, text: str) -> None:
        """Print a line with the time since the start."""
        print(f"[{time.perf_counter() - self.started:6.1f} s] {text}", flush=True)

    def keep(self, row: Row) -> None:
        """Note a row and write what there is."""
        self.result["results"].append(row)
        if self.options.out:
            self.options.out.write_text(json.dumps(self.result, indent=1))

    def worker(self, model: Path, load_format: str) -> list[str]:
        """The worker's command, but for the scheduler's address."""
        o = self.options
        if o.simulate:
            simulated = ["--blocks", str(SIMULATED_BLOCKS), "--vocab", "151936", "--lenient"]
            return ["-m", "tests.support.sim_worker", "--slots", str(o.slots), *simulated, *o.worker_args]
        ranks = ("--tensor-parallel", str(o.tensor_parallel))
        return worker_command(o, model, *ranks, load_format=load_format)

    def start(self, services: Services, model: Path, load_format: str) -> None:
        """Start scheduler and worker and wait until they serve."""
        start(self.options, services, self.worker(model, load_format), "--no-prefix-cache")

    def client(self, services: Services) -> Client:
        """A session with the scheduler, which watches over the services."""
        return Client(services.address, self.options.limit_s, services)

    # ---------------------------------------------------------------------------------------- rows

    def measure_all(self) -> bool:
        """Every row that was asked for; whether something failed, which has then been told."""
        shared = [row for row in self.options.rows if row != "start"]
        try:
            if shared:
                self.measure(shared)
            if "start" in self.options.rows:
                self.measure_starts()
        except (ServiceError, RunError, ClientFailedError) as error:
            self.say(f"failed: {error}")
            self.result["failed"] = str(error)
            return True
        return False

    def measure(self, rows: list[str]) -> None:
        """All rows that one set of services can give."""
        services = Services(self.options.logs)
        with services:
            self.start(services, self.model, self.options.load_format)
            self.say("services ready")
            time.sleep(self.options.settle_s)
            with self.client(services) as client, reporting(services):
                warm(client, self.load)
                for name in [name for name in ROWS if name in rows]:
                    try:
                        for row in ROWS[name](client, self.load):
                            self.keep(row)
                    except RefusedError as error:  # what the worker cannot do costs one row, not the run
                        self.say(f"{name}: {error}")
                        self.keep({"workload": name, "error": str(error)})
            self.say(services.describe())
            if "openai" in rows:
                with reporting(services):
                    self.measure_openai(services)

    def measure_openai(self, services: Services) -> None:
        """The gateway's rows, over the same scheduler and worker."""
        o = self.options
        services.start_gateway(self.model, *o.gateway_args)
        services.wait_url(o.ready_s)
        route = Route(services.url, self.model.name, o.peers, num_requests=o.num_fixed, limit_s=o.limit_s)
        for row in openai_rows(route, self.load, o.logs):
            self.keep(row)

    def measure_starts(self) -> None:
        """Process start to first token: no kernel compiled yet, then again, then with weights to read."""
        o = self.options
        with tempfile.TemporaryDirectory(prefix="pagoda-start-", dir=o.base) as scratch:
            first, third = Path(scratch) / "a", Path(scratch) / "b"
            self.start_row("random weights, first start", first, self.model, o.load_format)
            self.start_row("random weights, second start", first, self.model, o.load_format)
            if o.checkpoint:
                base = room_for(o.preset, o.base)
                with tempfile.TemporaryDirectory(prefix="pagoda-start-", dir=base) as weights:
                    began = time.perf_counter()
                    folder = Path(weights) / o.preset
                    size = write_checkpoint(o.preset, folder)
                    taken = time.perf_counter() - began
                    where = "in memory" if base == IN_MEMORY else "and so in the page cache"
                    self.say(f"{size / 1e9:.2f} GB written to {base}, {where}, in {taken:.1f} s")
                    # With caches of its own: a first start, at which kernels are compiled, too.
                    self.start_row("safetensors in the page cache", third, folder, "auto", str(base))

    def start_row(self, kind: str, caches: Path, model: Path, load_format: str, weights: str = "") -> None:
        """One start, from the first process to the first token; `weights` says where they lie."""
        variables = {name: str(caches / name.lower()) for name in CACHES}
        services = Services(self.options.logs / kind.replace(", ", "-").replace(" ", "-"), variables)
        began = time.perf_counter()
        with services:
            self.start(services, model, load_format)
            attached = time.perf_counter() - began
            with self.client(services) as client, reporting(services):
                client.run(fixed(1, 512, 1, self.load.unseen()), 0.0)
                seconds = time.perf_counter() - began
        self.say(f"start, {kind}: {seconds:.2f} s to the first token, {attached:.2f} s to attached")
        row = {"workload": "start", "kind": kind, "seconds": seconds, "attached_s": attached}
        self.keep(row | ({"weights": weights} if weights else {}))


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description="Pagoda on a GPU through its services", epilog=__doc__)
    numbers = lambda of: lambda text: [of(x) for x in text.split(",")]  # noqa: E731
    p.add_argument("--preset", choices=PRESETS, default="qwen2.5-7b")
    p.add_argument("--rows", type=numbers(str), default=list(ROWS), help=",".join([*ROWS, "openai", "start"]))
    p.add_argument("--vllm", type=Path, help="JSON of vLLM's figures, to print beside, if there")
    add_service_flags(p, logs=Path("/tmp/pagoda-bench"))
    p.add_argument("--tokenizer", type=Path, help="folder with tokenizer*.json, which openai needs")
    p.add_argument("--peers", type=Path, default=Path(".peers/bench"), help="folder of bench_serve.py")
    p.add_argument("--tensor-parallel", type=int, default=1, help="devices that share the model")
    p.add_argument("--gateway-args", type=shlex.split, default=[], help="more flags, in one word")
    p.add_argument("--num-requests", type=int, default=1000, help="of the sharegpt-like load")
    p.add_argument("--num-fixed", type=int, default=512, help="of the fixed load and of the OpenAI route")
    p.add_argument("--num-stop-ids", type=int, default=760)
    p.add_argument("--batches", type=numbers(int), default=[1, 8, 64])
    p.add_argument("--temperatures", type=numbers(float), default=[0.0, 1.0])
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument(
        "--checkpoint", action="store_true", help="start: write a checkpoint and start from it too"
    )
    p.add_argument("--limit-s", type=float, default=120, help="longest single run")
    p.add_argument("--simulate", action="store_true", help="a simulated worker instead of a GPU")
    options = p.parse_args()
    if unknown := set(options.rows) - {*ROWS, "openai", "start"}:
        p.error(f"--rows: {', '.join(sorted(unknown))} is not a row")
    if "openai" in options.rows and not options.tokenizer and not options.model:
        p.error("the openai row needs --tokenizer")
    return options


def main() -> int:
    """Measure and print; 1 when a bar is missed, 2 when something failed."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the services are ended, too
    bench = Bench(options)
    bench.say(json.dumps(bench.result["facts"]))
    failed = bench.measure_all()
    theirs = options.vllm and options.vllm.exists() and json.loads(options.vllm.read_text())
    ours = gpu_bars.figures(bench.result["results"])
    known = gpu_bars.figures(theirs["results"] if theirs else [])
    shape = gpu_bars.shape(options.preset, options.tensor_parallel)
    verdicts = gpu_bars.verdicts(shape, ours, known)
    bench.result |= {"bars": verdicts, "vllm": theirs or None}
    if options.out:
        options.out.write_text(json.dumps(bench.result, indent=1))
    print(gpu_bars.table(shape, ours, known), flush=True)
    if failed:
        return 2
    return 0 if all(entry["reached"] for entry in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
