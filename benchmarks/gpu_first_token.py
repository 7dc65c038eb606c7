"""Where the time to a first token goes, from client to client through all processes.

    python -m benchmarks.gpu_first_token --preset qwen2.5-7b [--repeat 9]
    python -m benchmarks.gpu_first_token --simulate --worker-args "--iteration-ms 11"

Takes the flags of `benchmarks.gpu`. One prompt of 512 tokens at a time, one token each, nothing else to do.
Prints the medians, in microseconds, between the stamps of `benchmarks/stamps.py`, and their sum.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter

from benchmarks import stamps
from benchmarks.gpu import Bench, parse
from benchmarks.gpu_rows import PROMPT_LEN
from benchmarks.gpu_services import Services
from benchmarks.workload import fixed

WARM = 5


def main() -> int:
    """Measure and print."""
    options = parse()
    bench = Bench(options)
    with stamps.stamped() as (folder, variables):
        spans = []
        with Services(options.logs, variables) as services:
            bench.start(services, bench.model, options.load_format)
            time.sleep(options.settle_s)
            with bench.client(services) as client:
                for _ in range(WARM + max(options.repeat, 3)):
                    outcome = client.run(fixed(1, PROMPT_LEN, 1, bench.load.unseen()), 0.0)
                    ended = time.perf_counter()
                    spans.append((ended - outcome.seconds, ended))
        report(spans[WARM:], stamps.read(folder))
    return 0


def report(spans: list[tuple[float, float]], found: list[stamps.Stamp]) -> None:
    """The way that most requests took, stamp by stamp."""
    ways = [
        [
            stamps.Stamp(began, "begins"),
            *(s for s in found if began < s.at < ended),
            stamps.Stamp(ended, "ends"),
        ]
        for began, ended in spans
    ]
    usual, times = Counter(tuple(s.name for s in way) for way in ways).most_common(1)[0]
    alike = [way for way in ways if tuple(s.name for s in way) == usual]
    print(f"{times} of {len(ways)} requests took this way; microseconds since the stamp before, and in all")
    for i, name in enumerate(usual):
        step = statistics.median(1e6 * (way[i].at - way[max(0, i - 1)].at) for way in alike)
        total = statistics.median(1e6 * (way[i].at - way[0].at) for way in alike)
        print(f"{step:9.0f} {total:9.0f}  {name}")


if __name__ == "__main__":
    sys.exit(main())
