"""What Pagoda's figures must be beside vLLM's from the same run: ratios, bars, and a table of both.

    python -m benchmarks.gpu_bars qwen2.5-7b pagoda.json ... vllm.json

Reads the JSON of `gpu.py`, of `gpu_vllm.py` and of the peers' own `bench_vllm.py`. A throughput there is a
list of times; the median counts, whatever else the file says.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Figures = dict[str, float]


@dataclass(frozen=True)
class Bar:
    """`must` and `aim` bound Pagoda's figure over vLLM's; None where nothing is asked."""

    figure: str
    must: float
    aim: float | None
    lower_is_better: bool = False

    def reached(self, ratio: float, bound: float) -> bool:
        """Whether a ratio is on the right side of a bound."""
        return ratio <= bound if self.lower_is_better else ratio >= bound


def _faster(must: float, aim: float | None, *figures: str) -> list[Bar]:
    return [Bar(figure, must, aim) for figure in figures]


def _sooner(must: float, aim: float | None, *figures: str) -> list[Bar]:
    return [Bar(figure, must, aim, lower_is_better=True) for figure in figures]


BARS: dict[str, list[Bar]] = {
    "qwen2.5-7b": [
        *_sooner(0.93, 0.84, "TPOT ms, batch 1", "TPOT ms, batch 8", "TPOT ms, batch 64"),
        *_sooner(0.85, 0.65, "TTFT ms, batch 1"),
        *_faster(1.10, 1.25, "sharegpt-like T=0", "sharegpt-like T=1"),
        *_faster(1.05, 1.15, "1024in-128out T=0"),
        *_faster(0.95, None, "lengths-unknown over known"),
        *_faster(1.15, 1.3, "openai 64"),
        *_faster(1.3, 1.6, "openai 256"),
        *_sooner(1.0, None, "openai 64 gap p99 ms", "openai 256 gap p99 ms"),
    ],
    "qwen2.5-0.5b": [
        *_sooner(0.48, 0.25, "TPOT ms, batch 1", "TPOT ms, batch 8"),
        *_sooner(0.40, 0.25, "TPOT ms, batch 64"),
        *_faster(2.5, 4.0, "sharegpt-like T=0", "sharegpt-like T=1"),
        *_faster(1.3, 1.8, "1024in-128out T=0"),
        *_faster(1.8, 3.0, "openai 64", "openai 256"),
    ],
}
# Over two devices, both engines.
BARS["qwen2.5-7b, 2 ranks"] = [
    *_sooner(0.90, None, "TPOT ms, batch 1", "TPOT ms, batch 8", "TPOT ms, batch 64"),
    *_faster(1.15, None, "sharegpt-like T=0", "sharegpt-like T=1"),
    *_faster(1.05, None, "1024in-128out T=0"),
]
# Seconds from process start to first token, Pagoda's alone: (must, aim).
ONE_RANK = {
    "random weights, first start": (30.0, 12.0),
    "random weights, second start": (20.0, 12.0),
    "safetensors in the page cache": (40.0, 12.0),
}
START_BARS = dict.fromkeys(BARS, ONE_RANK) | {
    "qwen2.5-7b, 2 ranks": {"random weights, first start": (35.0, None)}
}


def shape(preset: str, ranks: int) -> str:
    """The name under which a preset's bars stand, over so many ranks."""
    return preset if ranks == 1 else f"{preset}, {ranks} ranks"


def figures(rows: Sequence[Row]) -> Figures:
    """The figures that bars and people ask for, by name; throughputs are output tokens a second."""
    found: Figures = {}
    for row in rows:
        if "error" not in row:
            _READERS.get(row["workload"], _read_throughput)(row, found)
    return found


def _read_latency(row: Row, found: Figures) -> None:
    found[f"TPOT ms, batch {row['batch']}"] = row["tpot_ms"]
    found[f"TTFT ms, batch {row['batch']}"] = row["ttft_ms"]


def _read_throughput(row: Row, found: Figures) -> None:
    if row["workload"] == "lengths-unknown":  # their lengths differ from run to run
        speed = row["output_tok_s"]
    else:
        speed = row["output_tokens"] / statistics.median(row["seconds"])
    found[f"{row['workload']} T={row['temperature']:.0f}"] = speed


def _read_openai(row: Row, found: Figures) -> None:
    found[f"openai {row['concurrency']}"] = row["output_tok_s"]
    found[f"openai {row['concurrency']} gap p99 ms"] = row["gap_p99_ms"]


def _read_start(row: Row, found: Figures) -> None:
    found[f"start s, {row['kind']}"] = row["seconds"]


_READERS: dict[str, Callable[[Row, Figures], None]] = {
    "latency": _read_latency,
    "openai": _read_openai,
    "start": _read_start,
}


def ratios(ours: Figures, theirs: Figures) -> Figures:
    """Pagoda's figure over vLLM's, where both are known."""
    found = {name: ours[name] / theirs[name] for name in ours if theirs.get(name)}
    known, unknown = found.get("sharegpt-like T=1"), found.get("lengths-unknown T=1")
    if known and unknown:
        found["lengths-unknown over known"] = unknown / known
    return found


def verdicts(preset: str, ours: Figures, theirs: Figures) -> list[Row]:
    """One entry for each bar that can be judged."""
    found = ratios(ours, theirs)
    judged = []
    for bar in BARS.get(preset, ()):
        if (ratio := found.get(bar.figure)) is not None:
            entry: Row = {"figure": bar.figure, "ratio": round(ratio, 3), "must": bar.must, "aim": bar.aim}
            entry["reached"] = bar.reached(ratio, bar.must)
            entry["aim_reached"] = bar.aim is not None and bar.reached(ratio, bar.aim)
            judged.append(entry)
    for kind, (must, aim) in START_BARS.get(preset, {}).items():
        if (seconds := ours.get(f"start s, {kind}")) is not None:
            entry = {"figure": f"start s, {kind}", "seconds": round(seconds, 2), "must": must, "aim": aim}
            entry["aim_reached"] = aim is not None and seconds <= aim
            judged.append(entry | {"reached": seconds <= must})
    return judged


def table(preset: str, ours: Figures, theirs: Figures) -> str:
    """Both engines' figures, their ratio and what it should be, a line each."""
    judged = {entry["figure"]: entry for entry in verdicts(preset, ours, theirs)}
    both = ratios(ours, theirs)
    lines = [f"{preset:<36}{'Pagoda':>10}{'vLLM':>10}{'ratio':>8}  must / aim"]
    for name in dict.fromkeys([*ours, *theirs, *judged]):
        cells = [f"{side[name]:10.2f}" if name in side else " " * 10 for side in (ours, theirs)]
        ratio = f"{both[name]:8.3f}" if name in both else " " * 8
        entry = judged.get(name)
        verdict = f"{entry['must']} / {entry['aim']}  {_word(entry)}" if entry else ""
        lines.append(f"{name:<36}{cells[0]}{cells[1]}{ratio}  {verdict}".rstrip())
    return "\n".join(lines)


def _word(entry: Row) -> str:
    if not entry["reached"]:
        return "MISSED"
    return "reached, the aim too" if entry["aim_reached"] else "reached"


def main() -> None:
    """Print the table of the files that exist."""
    preset, *paths = sys.argv[1:]
    rows: dict[str, list[Row]] = {"pagoda": [], "vllm": []}
    for path in filter(Path.exists, map(Path, paths)):
        document = json.loads(path.read_text())
        rows[document["engine"]] += document["results"]
    print(table(preset, figures(rows["pagoda"]), figures(rows["vllm"])))


if __name__ == "__main__":
    main()
