"""`pagoda bench`: load a server with random prompts and measure what its clients see."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pagoda.aio import AsyncClient
from pagoda.errors import PagodaError

# Below are a vocabulary's special tokens, most often; a prompt of them would be no prompt.
FIRST_PLAIN_TOKEN = 100
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Load:
    """What is asked for."""

    concurrency: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    shared_prefix: int
    seed: int


@dataclass
class Measured:
    """Times of the requests that succeeded, in seconds."""

    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    output_tokens: int = 0
    errors: list[str] = field(default_factory=list)


def run(load: Load, url: str, token: str | None, json_file: Path | None) -> None:
    """Measure, print, and write JSON where wanted. Raises PagodaError when no request succeeds."""
    console = Console()
    figures = asyncio.run(_measure(load, url, token))
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
    table = Table(title=f"{load.requests} requests, {load.concurrency} at a time")
    for heading in ("", *(f"p{p}" for p in PERCENTILES), "mean"):
        table.add_column(heading, justify="right")
    for name in ("ttft_ms", "tpot_ms", "latency_ms"):
        values = figures[name]
        table.add_row(name, *(f"{values[key]:.1f}" for key in (*(f"p{p}" for p in PERCENTILES), "mean")))
    console.print(table)
    console.print(
        f"{figures['output_tokens_per_s']:.1f} output tokens/s, {figures['total_tokens_per_s']:.1f} in all, "
        f"{figures['requests_per_s']:.2f} requests/s, {figures['errors']} errors, {figures['seconds']:.1f} s"
    )


async def _measure(load: Load, url: str, token: str | None) -> dict[str, Any]:
    async with AsyncClient(url, token) as client:
        model = (await client.models())[0]
        draw = random.Random(load.seed)
        low = min(FIRST_PLAIN_TOKEN, model.vocab_size - 1)

        def ids(count: int) -> list[int]:
            return [draw.randrange(low, model.vocab_size) for _ in range(count)]

        shared = ids(min(load.shared_prefix, load.prompt_tokens))
        prompts = [shared + ids(load.prompt_tokens - len(shared)) for _ in range(load.requests)]
        await client.generate(ids(4), max_tokens=2, ignore_eos=True, temperature=0.0)  # the first connects
        measured, todo = Measured(), iter(prompts)

        async def work() -> None:
            for prompt in todo:
                await _one(client, prompt, load.output_tokens, measured)

        begin = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(min(load.concurrency, load.requests))))
        seconds = time.perf_counter() - begin
    if not measured.latency:
        raise PagodaError(f"no request succeeded; the first error: {measured.errors[0]}")
    done = len(measured.latency)
    return {
        "model": asdict(model),
        "load": asdict(load),
        "seconds": seconds,
        "errors": len(measured.errors),
        "requests_per_s": done / seconds,
        "output_tokens_per_s": measured.output_tokens / seconds,
        "total_tokens_per_s": (measured.output_tokens + done * load.prompt_tokens) / seconds,
        "ttft_ms": _summary(measured.ttft),
        "tpot_ms": _summary(measured.tpot),
        "latency_ms": _summary(measured.latency),
    }


async def _one(client: AsyncClient, prompt: list[int], output_tokens: int, measured: Measured) -> None:
    begin = time.perf_counter()
    first, num_tokens = 0.0, 0
    try:
        stream = client.stream(prompt, max_tokens=output_tokens, ignore_eos=True, temperature=0.0)
        async with stream:
            async for chunk in stream:
                if chunk.token_ids and not first:
                    first = time.perf_counter()
                num_tokens += len(chunk.token_ids)
    except PagodaError as error:
        measured.errors.append(str(error))
        return
    end = time.perf_counter()
    measured.ttft.append(first - begin)
    measured.latency.append(end - begin)
    measured.output_tokens += num_tokens
    if num_tokens > 1:
        measured.tpot.append((end - first) / (num_tokens - 1))


def _summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds) or [0.0]
    values = {f"p{p}": ordered[min(len(ordered) * p // 100, len(ordered) - 1)] for p in PERCENTILES}
    values["mean"] = sum(ordered) / len(ordered)
    return {name: value * 1000 for name, value in values.items()}
