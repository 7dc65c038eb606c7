"""The rows of the GPU table, for any engine that can `run` requests: what is timed, and how often.

Pagoda's client and vLLM are both measured by this code, so that a row means the same for each. Every repeat
has prompts that the engine has not seen; a figure is the median of the repeats. Times are in seconds unless a
name says otherwise.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.workload import Request, fixed, redrawn, sharegpt_like, stop_ids

PROMPT_LEN, ANSWER_LEN = 512, 256  # of the latency rows
BATCHES = (1, 8, 64)
FIXED_PROMPT_LEN, FIXED_ANSWER_LEN = 1024, 128
MAX_UNKNOWN = 1024  # most tokens of an answer whose length is not known ahead
WARM_LEN = 64  # most tokens of a prompt, and of an answer, of the mixed load that warms
STEADY = 0.1  # a warm load's time has settled when it moves by no more than this share
WARM_LIMIT_S = 45.0

Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One run: from handing over all requests to the last result."""

    seconds: float
    output_tokens: int


class Engine(Protocol):
    """What is measured. `vocab_size` bounds the token ids."""

    vocab_size: int

    def run(self, requests: Sequence[Request], temperature: float, stops: Sequence[int] = ()) -> Outcome:
        """Run all requests at once, end-of-text ignored.

        Without `stops` every answer must have the length that its request says, which the engine's adapter
        asserts; with them that length is the most it may have.
        """
        ...


@dataclass
class Load:
    """How much of everything; `say` gets a line for each row as it is done."""

    num_sharegpt: int = 1000
    num_fixed: int = 512
    num_stop_ids: int = 760
    repeat: int = 3
    batches: Sequence[int] = BATCHES
    temperatures: Sequence[float] = (0.0, 1.0)
    say: Callable[[str], None] = print
    _seeds: Iterator[int] = field(default_factory=lambda: itertools.count(1_000_001))

    def unseen(self) -> int:
        """A seed that nothing was drawn with before."""
        return next(self._seeds)


def warm(engine: Engine, load: Load) -> None:
    """Run loads of every kind until the time of one no longer falls.

    First all requests of the mixed load at once, cut short, so that every size of batch is met at each
    temperature; then the same small load again and again.
    """
    start = time.monotonic()
    for temperature in load.temperatures:
        mixed = sharegpt_like(load.num_sharegpt, seed=load.unseen())
        engine.run([(prompt[:WARM_LEN], min(n, WARM_LEN)) for prompt, n in mixed], temperature)
    before = float("inf")
    while time.monotonic() - start < WARM_LIMIT_S:
        now = engine.run(fixed(min(64, load.num_fixed), PROMPT_LEN, 32, seed=load.unseen()), 0.0).seconds
        if abs(now - before) <= STEADY * now:
            break
        before = now
    load.say(f"warm after {time.monotonic() - start:.1f} s")


def latency(engine: Engine, load: Load, batch: int) -> Row:
    """First token: all prompts to one token each. Per token: what the other tokens add, divided by them."""

    def times(answer_len: int) -> list[float]:
        seeds = [load.unseen() for _ in range(load.repeat)]
        return [engine.run(fixed(batch, PROMPT_LEN, answer_len, s), 0.0).seconds for s in seeds]

    engine.run(fixed(batch, PROMPT_LEN, 1, load.unseen()), 0.0)
    first, whole = times(1), times(1 + ANSWER_LEN)
    first_s, whole_s = statistics.median(first), statistics.median(whole)
    row = {
        "workload": "latency",
        "batch": batch,
        "input_len": PROMPT_LEN,
        "output_len": ANSWER_LEN,
        "ttft_s": first,
        "full_s": whole,
        "ttft_ms": 1e3 * first_s,
        "tpot_ms": 1e3 * (whole_s - first_s) / ANSWER_LEN,
    }
    load.say(f"latency, batch {batch:<3} TTFT {row['ttft_ms']:8.2f} ms   TPOT {row['tpot_ms']:7.3f} ms")
    return row


def throughput(
    engine: Engine,
    load: Load,
    name: str,
    requests: Sequence[Request],
    temperature: float,
    stops: Sequence[int] = (),
) -> Row:
    """Output tokens a second of all requests at once, prompts included in the time."""
    runs = [engine.run(redrawn(requests, load.unseen()), temperature, stops) for _ in range(load.repeat)]
    input_tokens = sum(len(prompt) for prompt, _ in requests)
    row = {
        "workload": name,
        "temperature": temperature,
        "requests": len(requests),
        "input_tokens": input_tokens,
        "output_tokens": runs[-1].output_tokens,
        "seconds": [run.seconds for run in runs],
        "output_tok_s": statistics.median(run.output_tokens / run.seconds for run in runs),
        "total_tok_s": statistics.median((input_tokens + run.output_tokens) / run.seconds for run in runs),
    }
    if stops:
        row |= {"stop_ids": len(stops), "mean_output": runs[-1].output_tokens / len(requests)}
    spread = " ".join(f"{run.seconds:.2f}" for run in runs)
    load.say(
        f"{name:<14} T={temperature:.0f} {row['output_tok_s']:9.0f} output tok/s "
        f"{row['total_tok_s']:9.0f} in all   ({spread} s)"
    )
    return row


def sharegpt_rows(engine: Engine, load: Load) -> Iterator[Row]:
    """The mixed load at each temperature."""
    for temperature in load.temperatures:
        yield throughput(engine, load, "sharegpt-like", sharegpt_like(load.num_sharegpt), temperature)


def fixed_rows(engine: Engine, load: Load) -> Iterator[Row]:
    """Long prompts, short answers, greedy."""
    requests = fixed(load.num_fixed, FIXED_PROMPT_LEN, FIXED_ANSWER_LEN)
    yield throughput(engine, load, "1024in-128out", requests, 0.0)


def latency_rows(engine: Engine, load: Load) -> Iterator[Row]:
    """Every batch size."""
    for batch in load.batches:
        yield latency(engine, load, batch)


def stops_rows(engine: Engine, load: Load) -> Iterator[Row]:
    """Answers end when one of many stop ids is drawn, so that nobody knows their lengths ahead."""
    requests = [(prompt, MAX_UNKNOWN) for prompt, _ in sharegpt_like(load.num_sharegpt)]
    stops = stop_ids(load.num_stop_ids, engine.vocab_size)
    yield throughput(engine, load, "lengths-unknown", requests, 1.0, stops)


ROWS: dict[str, Callable[[Engine, Load], Iterator[Row]]] = {
    "latency": latency_rows,
    "sharegpt": sharegpt_rows,
    "fixed": fixed_rows,
    "stops": stops_rows,
}
