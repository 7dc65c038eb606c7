"""Where the time of a step goes on a GPU: kernels of decode iterations and prefills, by the device's clock.

    python -m benchmarks.gpu_profile --preset qwen2.5-7b [--decodes 1 64] [--prompts 1x512] [--out FILE]
                                     [--tensor-parallel 2]

Runs the worker's own model, rows and graphs on random weights, without services. For each case: milliseconds
by events (the median of five), what the host spends on handing it over, and the kernels by their share. A
share is the time from the end of the kernel before to its own end, because launches overlap. Of several ranks
it is the first that tells.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_facts import facts
from benchmarks.gpu_models import PRESETS, config_folder
from benchmarks.gpu_times import device_and_host_ms
from gpu_worker.config import WorkerSettings
from gpu_worker.launch import launch
from gpu_worker.models.loader import open_model
from gpu_worker.parallel import connect
from gpu_worker.placement import NUM_BUFFERS, place_on_cuda
from gpu_worker.staging import Stager
from pagoda.internal.v1 import worker_pb2

CONTEXT, ROOM = 400, 200
NAME_CHARS = 60
REPEATS = 5
WHO = ("rank", "world_size", "rendezvous")


class Bench:
    """A worker's insides, driven by hand-made steps. Every case begins with no rows."""

    def __init__(
        self, preset: str, max_slots: int, max_tokens: int, folder: Path, who: dict[str, Any]
    ) -> None:
        model = config_folder(preset, folder)
        settings = WorkerSettings(
            model=str(model), load_format="dummy", device="cuda", max_model_len=4096, max_slots=max_slots,
            max_batched_tokens=max_tokens, metrics_port=0, **who,
        )  # fmt: skip
        self.device = torch.device("cuda", settings.rank)
        torch.cuda.set_device(self.device)
        group = connect(settings, self.device)
        files = open_model(model, "dummy", 0)
        log = structlog.get_logger()
        self.limits, self.runner = place_on_cuda(settings, files, torch.bfloat16, self.device, log, group)
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self.stager = Stager(self.limits, self.device, NUM_BUFFERS, self.runner.padding)

    def run(self, step: worker_pb2.Step) -> None:
        """Stage a step and queue it."""
        self.runner.run(*self.stager.stage(step))

    def rows(
        self, first: int, count: int, length: int, room: int, computed: int = 0
    ) -> list[worker_pb2.NewRow]:
        """New rows in the slots from `first` on with blocks for `room` tokens, `computed` of them held to be
        in the cache already: what lies there does not matter here."""
        per_row = -(-room // self.limits.block_size)
        return [
            worker_pb2.NewRow(
                slot=slot, tokens=[5] * length, num_prompt_tokens=length, last_position=self.limits.max_len,
                blocks=range(slot * per_row, (slot + 1) * per_row), num_computed=computed,
            )
            for slot in range(first, first + count)
        ]  # fmt: skip

    def decoding(self, count: int, length: int, room: int) -> None:
        """From no rows to `count` that go on behind `length` tokens."""
        self.clear()
        rows = self.rows(0, count, length, room, length - 1)
        self.run(worker_pb2.Step(epoch=1, num_iterations=1, slots=range(count), new_rows=rows))
        torch.cuda.synchronize()

    def decode(self, count: int) -> dict[str, Any]:
        """One decode iteration of `count` rows behind some `CONTEXT` tokens each."""
        self.decoding(count, CONTEXT, CONTEXT + ROOM)
        step = worker_pb2.Step(epoch=1, num_iterations=1, slots=range(count))
        return {"case": f"decode {count}", **measure(lambda: self.run(step))}

    def mixed(self, decodes: int, count: int, length: int) -> dict[str, Any]:
        """`count` whole prompts beside `decodes` rows of one token each, behind `length` tokens."""
        room = length + ROOM
        step = worker_pb2.Step(
            epoch=1, num_iterations=1, slots=range(decodes + count),
            num_tokens=[1] * decodes + [length] * count, new_rows=self.rows(decodes, count, length, room),
        )  # fmt: skip
        case = f"decode {decodes} beside {count} x {length}"
        return {"case": case, **measure(lambda: self.run(step), lambda: self.decoding(decodes, length, room))}

    def prefill(self, count: int, length: int) -> dict[str, Any]:
        """`count` whole prompts in one step."""
        step = worker_pb2.Step(
            epoch=1, num_iterations=1, slots=range(count), num_tokens=[length] * count,
            new_rows=self.rows(0, count, length, length + ROOM),
        )  # fmt: skip
        return {"case": f"prefill {count} x {length}", **measure(lambda: self.run(step), self.clear)}


def measure(run: Callable[[], None], prepare: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Milliseconds on the device and on the host, and the kernels' shares in microseconds; `prepare` comes
    before each run and is not measured."""
    prepare()
    run()
    device_ms, host_ms = device_and_host_ms(run, REPEATS, prepare)
    prepare()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    return {
        "device_ms": device_ms,
        "host_ms": host_ms,
        "kernels": shares(recorded),
    }


def shares(recorded: profile) -> dict[str, dict[str, float]]:
    """For each kernel: how often it ran, and the microseconds by which it moved the end of all."""
    on_device = torch.autograd.DeviceType.CUDA
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name[:NAME_CHARS])
        for event in recorded.events() or ()
        if event.device_type == on_device
    )
    counts: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    latest = spans[0][0] if spans else 0.0
    for _, end, name in spans:
        counts[name] += 1
        moved[name] += max(0.0, end - latest)
        latest = max(latest, end)
    return {name: {"count": counts[name], "us": round(us, 1)} for name, us in moved.most_common()}


def show(row: dict[str, Any], top: int = 12) -> None:
    """Print a case and its largest kernels."""
    print(f"{row['case']}: {row['device_ms']:.3f} ms, handed over in {row['host_ms']:.3f} ms", flush=True)
    for name, share in list(row["kernels"].items())[:top]:
        each = share["us"] / share["count"]
        print(f"   {name:{NAME_CHARS}} {share['count']:5.0f} x {each:8.2f} us = {share['us']:9.1f}")


def main() -> None:
    """Measure and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, default="qwen2.5-7b")
    p.add_argument("--decodes", type=int, nargs="*", default=[1, 8, 64, 256, 512], help="rows")
    p.add_argument("--prompts", nargs="*", default=["1x512", "16x512"], help="how many, and how long")
    p.add_argument("--mixed", nargs="*", default=["448+7x1024"], help="rows, and prompts beside them")
    p.add_argument("--tensor-parallel", type=int, default=1, help="devices that share the model")
    p.add_argument("--slots", type=int, default=1024)
    p.add_argument("--batched-tokens", type=int, default=8192)
    p.add_argument("--commit", default="", help="what is measured, where git cannot say")
    p.add_argument("--out", type=Path, help="JSON file")
    o = p.parse_args()
    known = {name: os.environ.get(f"PAGODA_WORKER_{name.upper()}") for name in WHO}
    who = {name: value for name, value in known.items() if value is not None}
    if o.tensor_parallel > 1 and not who:
        command = [sys.executable, "-m", "benchmarks.gpu_profile", *sys.argv[1:]]
        # A rank that is done has ended well, which is more than a service may.
        sys.exit(launch(o.tensor_parallel, command, structlog.get_logger()))
    if who.get("rank", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as this process lives
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        bench = Bench(o.preset, o.slots, o.batched_tokens, Path(folder), who)
        for count in o.decodes:
            rows.append(bench.decode(count))
            show(rows[-1])
        for prompt in o.prompts:
            count, length = map(int, prompt.split("x"))
            rows.append(bench.prefill(count, length))
            show(rows[-1])
        for mixed in o.mixed:
            decodes, prompt = mixed.split("+")
            count, length = map(int, prompt.split("x"))
            rows.append(bench.mixed(int(decodes), count, length))
            show(rows[-1])
    if o.out and who.get("rank", "0") == "0":
        result = {"facts": facts(("torch", "triton"), o.commit), "preset": o.preset, "cases": rows}
        o.out.write_text(json.dumps(result, indent=1) + "\n")
    if who:
        torch.distributed.barrier()  # the end of one is the end of all


if __name__ == "__main__":
    main()
