"""One model over several ranks beside the same model on one: the same tokens, in float32.

    python -m benchmarks.ranks --model FOLDER --prompts prompts.json --device cuda --out FILE
    python -m benchmarks.ranks --preset qwen2.5-0.5b --prompts prompts.json --device cuda    # random weights
    python -m benchmarks.ranks                                    # on a CPU, the embedded model, its prompts

Scheduler and worker as processes, `--tensor-parallel` W and then 1. Each prompt goes on greedily, as four
samples of one seed, and as a beam search of four beams. A greedy continuation may differ where the two best
logits of a single rank lie within 1e-3; such are counted and listed, at most 2 of 100. Nothing else may.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_facts import facts
from benchmarks.gpu_models import PRESETS, config_folder
from benchmarks.gpu_services import Services, reporting
from tests.support.reference import EXCUSED_MARGIN
from tests.support.runs import allowed, complete
from tests.support.session_client import Received, SessionClient, request

PACKAGES = ("torch", "triton", "grpcio")
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "max_tokens": 64},
    "n = 4": {"temperature": 0.8, "max_tokens": 32, "n": 4, "seed": 20261126},
    "4 beams": {"beam_width": 4, "n": 4, "max_tokens": 16},
}
AT_ONCE = {"greedy": 32, "n = 4": 8, "4 beams": 8}
READY_S, LIMIT_S = 180, 300

Ids = list[int]
Answers = dict[str, list[list[Ids]]]  # by way, prompt and sample


async def _answer(address: str, prompts: Sequence[Ids], way: str, salt: str) -> list[list[Ids]]:
    gate = asyncio.Semaphore(AT_ONCE[way])

    async def one(client: SessionClient, prompt: Ids) -> list[Ids]:
        async with gate:
            wanted = request(prompt, **WAYS[way])
            wanted.cache_salt = salt
            received = complete((await client.results(await client.submit(wanted)))[0])
            return [received.tokens[i] for i in sorted(received.tokens)]

    async with asyncio.timeout(LIMIT_S), SessionClient(address) as client:
        return list(await asyncio.gather(*(one(client, prompt) for prompt in prompts)))


async def _gap(address: str, ids: Ids) -> float:
    """What lies between the two best logits behind `ids`."""
    async with asyncio.timeout(LIMIT_S), SessionClient(address) as client:
        handles = await client.submit(request(ids, temperature=0.0, max_tokens=1, logprobs=2))
        received: Received = complete((await client.results(handles))[0])
    first, second = received.logprobs[0][0].top_logprobs
    return float(first - second)


def ties(address: str, prompts: Sequence[Ids], wants: list[list[Ids]], got: list[list[Ids]]) -> list[Any]:
    """Where greedy continuations part, and the gap there."""
    found = []
    for i, ((want,), (given,)) in enumerate(zip(wants, got, strict=True)):
        if want == given:
            continue
        at = next((p for p, (a, b) in enumerate(zip(want, given, strict=False)) if a != b), len(want))
        gap = asyncio.run(_gap(address, [*prompts[i], *want[:at]]))
        found.append({"prompt": i, "position": at, "gap": gap, "excused": gap < EXCUSED_MARGIN})
    return found


class Bench:
    """One run of the program."""

    def __init__(self, options: argparse.Namespace, prompts: list[Ids]) -> None:
        self.options, self.prompts = options, prompts
        self.got: Answers = {}
        self.rows: list[dict[str, Any]] = []

    def measure(self) -> bool:
        """Both worlds; whether they agree."""
        for size in (self.options.tensor_parallel, 1):
            services = Services(self.options.logs / f"tp{size}")
            with services, reporting(services):
                self._start(services, size)
                answers = {
                    way: asyncio.run(_answer(services.address, self.prompts, way, way)) for way in WAYS
                }
                print(f"{size} ranks: {', '.join(f'{w} {len(a)}' for w, a in answers.items())}", flush=True)
                if self.got:
                    self._compare(services.address, answers)
            self.got = self.got or answers
        return all(row["passed"] for row in self.rows)

    def _start(self, services: Services, size: int) -> None:
        o = self.options
        services.start_scheduler()
        model = o.model or (config_folder(o.preset, o.base) if o.preset else None)
        services.start_worker(
            *("-m", "gpu_worker", "--device", o.device, "--dtype", "float32", "--load-format", o.load_format),
            *(("--model", str(model)) if model else ()),
            *("--tensor-parallel", str(size), "--num-blocks", str(o.num_blocks), "--metrics-port", "0"),
            *o.worker_args,
        )
        services.wait_attached(READY_S)

    def _compare(self, address: str, wants: Answers) -> None:
        for way, answers in wants.items():
            theirs = self.got[way]
            differ = [i for i, (a, b) in enumerate(zip(answers, theirs, strict=True)) if a != b]
            found = ties(address, self.prompts, answers, theirs) if way == "greedy" else []
            excused = sum(tie["excused"] for tie in found)
            self.rows.append({
                "way": way, "prompts": len(answers), "tokens": sum(len(s) for a in answers for s in a),
                "differ": differ, "near_ties": found,
                "passed": excused == len(differ) <= allowed(len(answers)),
            })  # fmt: skip
            print(json.dumps(self.rows[-1]), flush=True)


def main() -> int:
    """Compare and print; 1 when a difference is not excused."""
    p = argparse.ArgumentParser(description="several ranks beside one", epilog=__doc__)
    p.add_argument("--model", type=Path, help="a model folder; the embedded model's without")
    p.add_argument("--preset", choices=PRESETS, help="a shape with random weights instead")
    p.add_argument("--load-format", help="dummy with --preset, else auto")
    p.add_argument("--prompts", type=Path, help="JSON: lists of token ids; the test data's without")
    p.add_argument("--num-prompts", type=int, default=50)
    p.add_argument("--tensor-parallel", type=int, default=2)
    p.add_argument("--device", default="cpu")
    p.add_argument("--num-blocks", type=int, default=4096)
    p.add_argument("--worker-args", type=shlex.split, default=[], help="more flags, in one word")
    p.add_argument("--base", type=Path, default=Path("/tmp/models"), help="where model folders are made")
    p.add_argument("--logs", type=Path, default=Path("/tmp/pagoda-ranks"))
    p.add_argument("--commit", default="")
    p.add_argument("--out", type=Path)
    options = p.parse_args()
    options.load_format = options.load_format or ("dummy" if options.preset else "auto")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.prompts:
        prompts = json.loads(options.prompts.read_text())
    else:
        from tests.support.data import prompts as chosen

        prompts = [list(prompt.ids) for prompt in chosen()]
    bench = Bench(options, prompts[: options.num_prompts])
    passed = bench.measure()
    result = {
        "workload": "ranks", "facts": facts(PACKAGES, options.commit), "ranks": options.tensor_parallel,
        "model": str(options.model or options.preset or "embedded"), "device": options.device,
        "results": bench.rows, "passed": passed,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
