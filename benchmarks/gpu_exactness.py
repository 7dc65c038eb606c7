"""Greedy continuations of real prompts in float32: Pagoda's services on the GPU beside transformers there.

    python -m benchmarks.gpu_exactness --write-prompts prompts.json      # where the test data can be had
    python -m benchmarks.gpu_exactness --model FOLDER --prompts prompts.json --out exactness.json

The 100 prompts of the CPU's exactness test, as token ids; TF32 is off. transformers generates one prompt at a
time, in a few processes side by side, because it is the host that it waits for; what it answers is kept in
`--reference`. Pagoda gets them 32 at a time. A difference is excused where the two best logits lie within
1e-3 (`tests.support.reference.Difference`), at most 2 times.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_facts import facts
from benchmarks.gpu_services import Services, reporting
from tests.support.reference import EXCUSED_OF_100, Difference
from tests.support.session_client import SessionClient, request

PACKAGES = ("torch", "triton", "transformers", "grpcio")
MAX_TOKENS = 64
AT_ONCE = 32
READY_S = 120
LIMIT_S = 120

Ids = list[int]


# ---------------------------------------------------------------------------------------- transformers


def _load(folder: str, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = False
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).eval()


@torch.inference_mode()
def _generate(folder: str, device: str, prompts: Sequence[Ids]) -> list[Ids]:
    torch.set_num_threads(1)
    model = _load(folder, device)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=MAX_TOKENS, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def reference(folder: Path, device: str, prompts: Sequence[Ids], processes: int) -> list[Ids]:
    """transformers' greedy continuation of each prompt, end-of-text included."""
    shares = [prompts[i::processes] for i in range(processes)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_generate, str(folder), device, share) for share in shares]
        parts = [job.result() for job in jobs]
    return [parts[i % processes][i // processes] for i in range(len(prompts))]


@torch.inference_mode()
def explain(model: Any, prompt: Ids, got: Ids, want: Ids) -> Difference:
    """How close the call was where `got` first leaves `want`; see `Difference`. They must not be equal."""
    position = next(
        (i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want))
    )
    wanted = want[position] if position < len(want) else None
    if position >= len(got):
        return Difference(position, None, wanted, 0.0, False, 0.0)
    ids = torch.tensor([[*prompt, *got[:-1]]], device=model.device)
    logits = model(ids, logits_to_keep=len(got) - position).logits[0].double()
    best = logits[0].topk(2)
    drawn = torch.tensor(got[position + 1 :], device=model.device)
    short = logits[1:].max(dim=1).values - logits[1:].gather(1, drawn[:, None])[:, 0] if len(drawn) else None
    return Difference(
        position,
        got[position],
        wanted,
        float(best.values[0] - best.values[1]),
        got[position] in best.indices.tolist(),
        0.0 if short is None else float(short.max()),
    )


# ---------------------------------------------------------------------------------------------- Pagoda


async def _continuations(address: str, prompts: Sequence[Ids]) -> list[Ids]:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(client: SessionClient, prompt: Ids) -> Ids:
        async with gate:
            handles = await client.submit(request(prompt, temperature=0.0, max_tokens=MAX_TOKENS))
            (received,) = await client.results(handles)
            if received.failure is not None:
                raise RuntimeError(f"a request failed: {received.failure.message}")
            return received.tokens[0]

    async with asyncio.timeout(LIMIT_S), SessionClient(address) as client:
        return list(await asyncio.gather(*(one(client, prompt) for prompt in prompts)))


def continuations(options: argparse.Namespace, prompts: Sequence[Ids]) -> list[Ids]:
    """Pagoda's, through scheduler and worker."""
    services = Services(options.logs)
    with services, reporting(services):
        services.start_scheduler()
        services.start_worker(
            *("-m", "gpu_worker", "--model", str(options.model), "--device", options.device),
            *("--dtype", "float32", "--num-blocks", "4096", "--metrics-port", "0"),
        )
        services.wait_attached(READY_S)
        return asyncio.run(_continuations(services.address, prompts))


# ---------------------------------------------------------------------------------------------- program


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both engines' continuations and where they differ."""
    prompts: list[Ids] = json.loads(options.prompts.read_text())[: options.num_prompts]
    began = time.perf_counter()
    if options.reference and options.reference.exists():
        wants: list[Ids] = json.loads(options.reference.read_text())[: len(prompts)]
    else:
        wants = reference(options.model, options.device, prompts, options.processes)
        if options.reference:
            options.reference.write_text(json.dumps(wants))
    middle = time.perf_counter()
    print(f"transformers: {len(wants)} continuations in {middle - began:.1f} s", flush=True)
    got = continuations(options, prompts)
    print(f"Pagoda: {len(got)} continuations in {time.perf_counter() - middle:.1f} s", flush=True)
    differ = [i for i in range(len(prompts)) if got[i] != wants[i]]
    found: dict[int, Difference] = {}
    if differ:
        model = _load(str(options.model), options.device)
        found = {i: explain(model, prompts[i], got[i], wants[i]) for i in differ}
    return {
        "workload": "exactness",
        "facts": facts(PACKAGES, options.commit),
        "prompts": len(prompts),
        "tokens": sum(map(len, got)),
        "at_once": AT_ONCE,
        "differ": len(differ),
        "allowed": EXCUSED_OF_100,
        "differences": [{"prompt": i, **asdict(d), "excused": d.excused} for i, d in found.items()],
        "passed": len(differ) <= EXCUSED_OF_100 and all(d.excused for d in found.values()),
    }


def main() -> int:
    """Compare and print; 1 when a difference is not excused."""
    parser = argparse.ArgumentParser(description="greedy continuations on the GPU beside transformers'")
    parser.add_argument("--write-prompts", type=Path, help="write the 100 prompts' token ids there, and end")
    parser.add_argument("--model", type=Path, help="folder of the model that the prompts are for")
    parser.add_argument("--prompts", type=Path, help="JSON: lists of token ids")
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--reference", type=Path, help="JSON of transformers' answers: read, or written")
    parser.add_argument("--processes", type=int, default=5, help="of transformers")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--logs", type=Path, default=Path("/tmp/pagoda-exactness"))
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.write_prompts:
        from tests.support.data import prompts

        options.write_prompts.write_text(json.dumps([list(prompt.ids) for prompt in prompts()]))
        return 0
    if not options.model or not options.prompts:
        parser.error("--model and --prompts are needed")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    result = measure(options)
    shown = {k: v for k, v in result.items() if k != "facts"}
    print(json.dumps(shown), flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
