"""Beam exactness in full: Pagoda's searches beside transformers' `generate(num_beams=...)`, on real prompts.

    python -m benchmarks.beams --json FILE [--prompts 40] [--first 0] [--max-tokens 16] [--at-once 8]
                               [--num-blocks 2048] [--scheduler=--no-prefix-cache ...]

Every width (2, 4, 8), one and two stop ids, three length penalties and the three ways to end: 54 searches a
prompt, fp32. Prints a line a prompt and writes the figures as JSON; ends with 1 where a difference is not
excused by a near tie. Few blocks make it preempt. What transformers found is kept in the cache, so that
another setting takes a fraction of the first one's time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from pagoda.models import cache_dir
from tests.support.beam_reference import Result
from tests.support.beams import Case, Wanted, check, matrix, run, wanted
from tests.support.cluster import cluster
from tests.support.data import Prompt, model_folder
from tests.support.reference import model_digest
from tests.support.runs import shorter_than

LONGEST = 200  # tokens of a prompt


def reference(cases: list[Case]) -> list[Wanted]:
    """What transformers finds for the cases of one prompt, kept in the cache."""
    facts = [model_digest(), [asdict(case) for case in cases], torch.__version__, transformers.__version__]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_dir() / "reference" / f"beams-{key}.json"
    if path.is_file():
        return [
            Wanted(
                [Result(tuple(r["tokens"]), r["score"], r["stopped"]) for r in row["results"]], row["closest"]
            )
            for row in json.loads(path.read_text())
        ]
    found = list(wanted(cases))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in found]))
    return found


def measure(prompts: list[Prompt], options: argparse.Namespace) -> dict[str, object]:
    """Run all searches of these prompts, compare, and say how it went."""
    excused, wrong, num_searches, num_tokens = [], [], 0, 0
    with cluster(
        model=str(model_folder()),
        scheduler_args=options.scheduler,
        worker_args=("--num-blocks", str(options.num_blocks)),
    ) as running:
        for i, prompt in enumerate(prompts, options.first):
            begun = time.monotonic()
            cases = matrix([prompt], options.max_tokens)
            wants = reference(cases)
            ready = time.monotonic()
            got = run(running.scheduler.address, cases, options.at_once)
            ended = time.monotonic()
            num_searches += len(cases)
            num_tokens += sum(len(tokens) for received in got for tokens in received.tokens.values())
            try:
                excused += [{"prompt": i, **asdict(item)} for item in check(cases, got, wants)]
            except AssertionError as error:
                wrong.append(f"prompt {i}: {error}")
            times = f"reference {ready - begun:.0f} s, Pagoda {ended - ready:.0f} s"
            print(f"prompt {i}: {times}; {len(excused)} excused, {len(wrong)} wrong so far", flush=True)
        now = running.snapshot()
    return {
        "prompts": len(prompts),
        "searches": num_searches,
        "result_tokens": num_tokens,
        "preemptions": now.num_preemptions,
        "swapped_tokens": now.swapped_tokens,
        "recomputed_tokens": now.recomputed_tokens,
        "excused": excused,
        "wrong": wrong,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="beam searches beside transformers'")
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures, as JSON")
    parser.add_argument("--prompts", type=int, default=40, help="how many (40)")
    parser.add_argument("--first", type=int, default=0, help="leave out so many (0)")
    parser.add_argument("--max-tokens", type=int, default=16, help="of each result (16)")
    parser.add_argument("--at-once", type=int, default=8, help="searches at a time (8)")
    parser.add_argument("--num-blocks", type=int, default=2048, help="KV blocks of the worker (2048)")
    parser.add_argument("--scheduler", action="append", default=[], help="an option of the scheduler")
    options = parser.parse_args()
    torch.set_num_threads(1)
    prompts = shorter_than(LONGEST, options.first + options.prompts)[options.first :]
    settings = {name: getattr(options, name) for name in ("max_tokens", "at_once", "num_blocks", "scheduler")}
    figures = settings | measure(prompts, options)
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({name: value for name, value in figures.items() if name != "wrong"}))
    if figures["wrong"]:
        sys.exit("\n".join(map(str, figures["wrong"])))  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
