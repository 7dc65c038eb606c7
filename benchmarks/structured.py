"""Does structured output hold? Random JSON schemas through the real services, every output validated.

    python -m benchmarks.structured [--num 500] [--json FILE]            # the embedded model, on the CPU
    python -m benchmarks.structured --device cuda --model FOLDER [--load-format dummy]
    python -m benchmarks.structured --url http://127.0.0.1:8000          # services that run already

At temperature 1 and with a seed for each schema. Outputs that max_tokens cut are counted and must be few; of
the others, jsonschema-rs, which knows nothing of how they were made, must find every one valid.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs

from benchmarks.gpu_facts import facts
from benchmarks.gpu_services import Services
from benchmarks.schemas import schema
from pagoda.models import EMBEDDED_MODEL

PACKAGES = ("torch", "llguidance", "jsonschema-rs", "transformers", "grpcio")
QUESTION = "Write JSON about a place that you like."
READY_S = 600.0


@dataclass
class Report:
    """What came of the schemas."""

    schemas: int = 0
    finished: int = 0
    valid: int = 0
    cut: int = 0
    tokens: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def wrong(self, least_finished: float) -> str:
        """Why this is no success, or nothing."""
        if self.problems:
            return f"{len(self.problems)} of {self.schemas} failed, the first: {self.problems[0]}"
        if self.finished < least_finished * self.schemas:
            return f"only {self.finished} of {self.schemas} finished; {least_finished:.0%} must"
        return ""


async def ask_all(
    url: str, numbers: Iterable[int], max_tokens: int, concurrency: int, temperature: float = 1.0
) -> Report:
    """Ask for JSON of each of these schemas.

    Args:
        url: of a gateway, without /v1.
        numbers: see `benchmarks.schemas.schema`; a schema's number is its request's seed, too.
        max_tokens: of each output.
        concurrency: requests at a time.
        temperature: of each request.
    """
    report = Report()
    gate = asyncio.Semaphore(concurrency)
    began = time.perf_counter()

    async with httpx.AsyncClient(base_url=url, timeout=READY_S, limits=httpx.Limits()) as client:

        async def ask(number: int) -> None:
            async with gate:
                reply = await client.post("/v1/chat/completions", json=_body(number, max_tokens, temperature))
            _judge(report, number, reply)

        await asyncio.gather(*(ask(number) for number in numbers))
    report.seconds = round(time.perf_counter() - began, 1)
    return report


def _body(number: int, max_tokens: int, temperature: float) -> dict[str, Any]:
    asked = {"name": f"schema_{number}", "schema": schema(number), "strict": True}
    return {
        "messages": [{"role": "user", "content": QUESTION}],
        "response_format": {"type": "json_schema", "json_schema": asked},
        "temperature": temperature,
        "seed": number,
        "max_tokens": max_tokens,
    }


def _judge(report: Report, number: int, reply: httpx.Response) -> None:
    report.schemas += 1
    if reply.status_code != 200:
        report.problems.append(f"schema {number}: {reply.status_code} {reply.text[:300]}")
        return
    answer = reply.json()
    (choice,) = answer["choices"]
    report.tokens += answer["usage"]["completion_tokens"]
    if choice["finish_reason"] != "stop":
        report.cut += 1
        return
    report.finished += 1
    text = choice["message"]["content"]
    if (problem := problem_of(schema(number), text)) is None:
        report.valid += 1
    else:
        report.problems.append(f"schema {number}: {problem}: {text!r}")


def problem_of(wanted: dict[str, Any], text: str) -> str | None:
    """Why a text is not JSON that a schema admits, or None."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"not JSON: {error}"
    validator = jsonschema_rs.validator_for(wanted, validate_formats=True)
    return next((error.message for error in validator.iter_errors(value)), None)


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description="structured output, validated", epilog=__doc__)
    p.add_argument("--num", type=int, default=500, help="schemas (default: %(default)s)")
    p.add_argument("--first", type=int, default=0, help="number of the first schema")
    p.add_argument("--max-tokens", type=int, default=300)
    p.add_argument("--concurrency", type=int, default=32)
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--least-finished", type=float, default=0.6, help="share that must end by itself")
    p.add_argument("--url", help="a running gateway; else services are started")
    p.add_argument("--model", default=EMBEDDED_MODEL)
    p.add_argument("--tokenizer-model", help="what the gateway loads, if not --model")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--load-format", default="auto")
    p.add_argument("--worker-args", type=shlex.split, default=[])
    p.add_argument("--json", type=Path, help="where the figures go")
    return p.parse_args()


def main() -> int:
    """Run it; returns the exit code."""
    options = parse()
    numbers = range(options.first, options.first + options.num)
    asked = (numbers, options.max_tokens, options.concurrency, options.temperature)
    if options.url:
        report = asyncio.run(ask_all(options.url, *asked))
    else:
        with tempfile.TemporaryDirectory() as logs, Services(Path(logs)) as services:
            services.start_scheduler()
            services.start_worker(
                *("-m", "gpu_worker", "--model", options.model, "--device", options.device),
                *("--dtype", options.dtype, "--load-format", options.load_format, "--metrics-port", "0"),
                *options.worker_args,
            )
            services.start_gateway(Path(options.tokenizer_model or options.model))
            services.wait_url(READY_S)
            report = asyncio.run(ask_all(services.url, *asked))
            services.check()
    figures = asdict(report) | {"problems": report.problems[:10]}
    print(json.dumps(figures, ensure_ascii=False, indent=1))
    if options.json:
        flags = {name: str(value) for name, value in vars(options).items()}
        options.json.write_text(json.dumps(figures | {"flags": flags, "facts": facts(PACKAGES)}, indent=1))
    if wrong := report.wrong(options.least_finished):
        print(f"FAILED: {wrong}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
