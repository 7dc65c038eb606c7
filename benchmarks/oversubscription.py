"""A cache for half of what the load needs: what preemption costs, in each of its modes.

    python -m benchmarks.oversubscription --preset qwen2.5-7b --out FILE       # about 8 minutes of an H100
    python -m benchmarks.oversubscription --device cpu --model FOLDER --dtype float32 --scale 0.2 --blocks 64
    python -m benchmarks.oversubscription --mixes short --ways auto,oracle  # a part of it

Three schedulers with a worker each, which differ in --preemption-mode alone, serve one load in turn: whatever
drifts drifts for all. The fourth way is an admission oracle over the first of them: it knows how long
every answer will be, and this client holds a request back until its whole worst case fits, so that nothing is
ever preempted. Requests of a mix are drawn until they would need twice the cache if all ran at once.

Figures are medians of the rounds, with the least and the most in brackets; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

from benchmarks.gpu_client import Client, RunError
from benchmarks.gpu_flags import add_service_flags, described, start, worker_command
from benchmarks.gpu_models import PRESETS, config_folder
from benchmarks.gpu_services import ServiceError, Services
from benchmarks.workload import Request, fixed, redrawn, sharegpt_like
from pagoda.v1 import scheduler_pb2 as pb
from pagoda.v1 import scheduler_pb2_grpc as rpc

BLOCK = 16
MODES = ("auto", "swap", "recompute")
ORACLE = "oracle"
SHORT, LONG, LONGEST = (64, 128), (1024, 256), 512  # prompt and answer; longest of either in the mixed load
BAR_ORACLE, BAR_MODES = 0.90, 0.97
OVERSUBSCRIBED = 2.0
MIXES = ("short", "long", "mixed")
COUNTERS = ("num_preemptions", "swapped_tokens", "recomputed_tokens")
PACKAGES = ("torch", "triton", "grpcio", "protobuf", "numpy")


def blocks_of(num_prompt: int, answer_len: int) -> int:
    """What a request holds at its end: its last token is never computed."""
    return -(-(num_prompt + answer_len - 1) // BLOCK)


def need(requests: Sequence[Request]) -> int:
    """Blocks that all of them would hold at once at the most, if they ran side by side from the start."""
    prompts = np.array([len(prompt) for prompt, _ in requests])
    answers = np.array([answer_len for _, answer_len in requests])
    return max(int((-(-(prompts + t) // BLOCK))[answers > t].sum()) for t in range(0, int(answers.max()), 4))


def mixes(scale: float, wanted: int, most: int) -> dict[str, list[Request]]:
    """The three loads, each of as many requests as need `wanted` blocks, and at most `most`."""
    short, long = (tuple(max(2, round(n * scale)) for n in lengths) for lengths in (SHORT, LONG))
    longest = max(2, round(LONGEST * scale))
    drawn = {
        "short": fixed(most, *short),
        "long": fixed(most, *long),
        "mixed": [
            (prompt[:: max(1, round(1 / scale))][:longest], min(longest, max(2, round(n * scale))))
            for prompt, n in sharegpt_like(most)
        ],
    }
    chosen = {}
    for name, requests in drawn.items():
        count = next((n for n in range(1, most) if need(requests[:n]) >= wanted), most)
        chosen[name] = requests[:count]
    return chosen


class Oracle(Client):
    """A client that submits a request, in order, when all that it can come to need is free."""

    def __init__(self, address: str, limit_s: float, services: Services, num_blocks: int) -> None:
        super().__init__(address, limit_s, services)
        self._num_blocks = num_blocks

    async def _drive(self, batch: pb.SessionRequest, received: Any) -> float:
        waiting = deque(zip(batch.submit.handles, batch.submit.requests, strict=True))
        held: dict[int, int] = {}
        free = self._num_blocks
        start = time.perf_counter()
        while received.num_open:
            handles, messages = [], []
            while waiting:
                handle, request = waiting[0]
                blocks = blocks_of(len(request.prompt_token_ids), request.sampling.max_tokens)
                if blocks > free:
                    break
                waiting.popleft()
                free -= blocks
                held[handle] = blocks
                handles.append(handle)
                messages.append(request)
            if handles:
                submit = pb.SubmitBatch(handles=handles, requests=messages)
                await self._call.write(pb.SessionRequest(submit=submit))
            reply = await self._call.read()
            if reply is grpc.aio.EOF:  # type: ignore[attr-defined]
                raise RunError(f"the session ended: {await self._call.details()}; {received.progress()}")
            received.take(reply.output)
            free += sum(held.pop(handle) for handle in reply.output.usage_handles)
        return time.perf_counter() - start


def counters(address: str) -> dict[str, int]:
    """What the scheduler has counted so far."""
    with grpc.insecure_channel(address) as channel:
        now = rpc.ControlServiceStub(channel).Snapshot(pb.SnapshotRequest(), timeout=10).snapshot
    return {name: getattr(now, name) for name in COUNTERS}


class Bench:
    """One run of the program."""

    def __init__(self, options: argparse.Namespace, stack: ExitStack) -> None:
        self.options = options
        self.started = time.perf_counter()
        self.services: dict[str, Services] = {}
        self.clients: dict[str, Client] = {}
        self.rows: list[dict[str, Any]] = []
        self._seed = 1_000_000
        model = options.model or config_folder(options.preset, options.base)
        for mode in (m for m in MODES if m in options.ways or m == MODES[0]):
            services = self.services[mode] = stack.enter_context(Services(options.logs / mode))
            self._start(services, mode, model)
            self.clients[mode] = stack.enter_context(Client(services.address, options.limit_s, services))
            self.say(f"services with --preemption-mode {mode} are ready")
        if ORACLE in options.ways:
            first = self.services[ORACLE] = self.services[MODES[0]]
            self.clients[ORACLE] = stack.enter_context(
                Oracle(first.address, options.limit_s, first, options.blocks)
            )

    def _start(self, services: Services, mode: str, model: Path) -> None:
        o = self.options
        share = ("--gpu-memory-utilization", "0.95") if o.device == "cuda" else ()  # three workers share it
        worker = worker_command(o, model, "--num-blocks", str(o.blocks), *share)
        start(o, services, worker, "--no-prefix-cache", "--preemption-mode", mode)

    def say(self, text: str) -> None:
        """Print a line with the time since the start."""
        print(f"[{time.perf_counter() - self.started:6.1f} s] {text}", flush=True)

    def run(self, way: str, mix: str, requests: Sequence[Request]) -> dict[str, Any]:
        """One load in one way, with prompts that were never seen."""
        self._seed += 1
        address = self.services[way].address
        before = counters(address)
        outcome = self.clients[way].run(redrawn(requests, self._seed), 0.0)
        after = counters(address)
        row = {
            "mix": mix,
            "way": way,
            "seconds": outcome.seconds,
            "tokens_per_s": outcome.output_tokens / outcome.seconds,
            **{name: after[name] - before[name] for name in COUNTERS},
        }
        if way == ORACLE and row["num_preemptions"]:
            raise RunError("the oracle's load was preempted")
        return row

    def measure(self, loads: dict[str, list[Request]]) -> None:
        """A round to warm, and then rounds of every mix in every way, the order turned in each."""
        ways = self.options.ways
        for number in range(-1, self.options.repeat):
            for mix, requests in loads.items():
                turn = number % len(ways)
                for way in ways[turn:] + ways[:turn]:
                    row = self.run(way, mix, requests)
                    self.say(f"{mix}, {way}: {row['tokens_per_s']:.1f} tokens/s, {row['seconds']:.2f} s")
                    if number >= 0:
                        self.rows.append({"round": number, **row})
            self.say("warm" if number < 0 else f"round {number + 1} of {self.options.repeat}")


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each mix: the rates, and what `auto` is of the oracle's and of the better forced mode's, of those
    that were measured."""
    found = []
    ways = {row["way"] for row in rows}
    for mix in dict.fromkeys(row["mix"] for row in rows):
        rates = {
            way: [row["tokens_per_s"] for row in rows if (row["mix"], row["way"]) == (mix, way)]
            for way in (*MODES, ORACLE)
            if way in ways
        }
        forced = [way for way in MODES[1:] if way in ways]
        better = max(forced, key=lambda way: statistics.median(rates[way]), default="")
        entry = {"mix": mix, "rates": {way: spread(values) for way, values in rates.items()}}
        entry |= {"better": better, "reached": True}
        for key, way, bar in (("of_oracle", ORACLE, BAR_ORACLE), ("of_better", better, BAR_MODES)):
            if {MODES[0], way} <= ways:
                entry[key] = spread([a / b for a, b in zip(rates[MODES[0]], rates[way], strict=True)])
                entry["reached"] &= entry[key][0] >= bar
        found.append(entry)
    return found


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and most."""
    return statistics.median(values), min(values), max(values)


def table(found: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> str:
    """The verdicts for people."""
    lines = []
    for entry in found:
        lines.append(f"{entry['mix']}:")
        for way, (median, least, most) in entry["rates"].items():
            mine = [row for row in rows if (row["mix"], row["way"]) == (entry["mix"], way)]
            counts = ", ".join(f"{statistics.median(row[c] for row in mine):.0f} {c}" for c in COUNTERS)
            lines.append(f"  {way:<10}{median:9.1f} tokens/s [{least:.1f}, {most:.1f}]   {counts}")
        for name, key, bar in (
            ("the oracle", "of_oracle", BAR_ORACLE),
            (entry["better"], "of_better", BAR_MODES),
        ):
            if key in entry:
                median, least, most = entry[key]
                lines.append(f"  auto is {median:.3f} of {name} [{least:.3f}, {most:.3f}], bar {bar}")
    return "\n".join(lines)


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A reader of some of these names with commas between them, into their order."""

    def read(text: str) -> list[str]:
        wanted = text.split(",")
        if unknown := set(wanted) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not of {', '.join(known)}")
        return [name for name in known if name in wanted]

    return read


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description="Half a cache, in every mode of preemption", epilog=__doc__)
    p.add_argument("--preset", choices=PRESETS, default="qwen2.5-7b")
    add_service_flags(p, logs=Path("/tmp/pagoda-oversubscription"), context=2048)
    p.add_argument("--blocks", type=int, default=3072, help="the cache's; mixes need twice as many")
    p.add_argument("--scale", type=float, default=1.0, help="of all lengths of prompts and answers")
    p.add_argument("--mixes", type=names(MIXES), default=[*MIXES], help="which of them, with commas")
    p.add_argument("--ways", type=names((*MODES, ORACLE)), default=[*MODES, ORACLE], help="likewise")
    p.add_argument("--repeat", type=int, default=5, help="rounds")
    p.add_argument("--limit-s", type=float, default=120, help="longest single run")
    return p.parse_args()


def main() -> int:
    """Measure and print; 1 when a bar is missed, 2 when something failed."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the services are ended, too
    loads = mixes(options.scale, int(OVERSUBSCRIBED * options.blocks), options.slots * 2)
    loads = {name: loads[name] for name in options.mixes}
    for name, requests in loads.items():
        print(f"{name}: {len(requests)} requests need {need(requests)} blocks of {options.blocks}")
    rows: list[dict[str, Any]] = []
    failed = ""
    with ExitStack() as stack:
        try:
            bench = Bench(options, stack)
            rows = bench.rows
            time.sleep(options.settle_s)
            bench.measure(loads)
        except (ServiceError, RunError) as error:
            failed = str(error)
            print(f"failed: {failed}", flush=True)
    found = verdicts(rows) if not failed else []
    result = described(options, PACKAGES) | {
        "loads": {name: {"requests": len(r), "blocks": need(r)} for name, r in loads.items()},
        "rows": rows,
        "verdicts": found,
        "failed": failed,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))
    print(table(found, rows), flush=True)
    return 2 if failed else int(not all(entry["reached"] for entry in found))


if __name__ == "__main__":
    sys.exit(main())
