"""The memory figures of the paper that Pagoda follows, by its own scheduler core on a simulated device.

Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention" (arXiv
2309.06180). Rows: KV memory that is allocated and unused at every step; blocks that sharing saves; requests
that run at once in a fixed cache, beside Orca's three forms. docs/memory.md says what each means and how it
is measured. No service, no model, no clock: the same arguments give the same figures anywhere.

    python -m benchmarks.paper                            # drawn lengths and real text, some minutes
    python -m benchmarks.paper --quick                    # drawn lengths only, half a minute, no download
    python -m benchmarks.paper --json FILE --plots FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import paper_plots, paper_rows
from benchmarks.paper_lengths import ALPACA, SHAREGPT, Setting, Trace, drawn, real
from benchmarks.paper_rows import NUM_SLOTS, Admission, Beside, Saving, Waste

WIDTHS = (2, 4, 6)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is run: requests for admission and waste, requests for sharing."""

    admission: int
    sharing: int
    warm_up: int


FULL, QUICK = Sizes(3000, 500, paper_rows.WARM_UP), Sizes(800, 100, 1000)


@dataclasses.dataclass(frozen=True)
class Figures:
    """All that was found."""

    traces: list[dict[str, float | str]]
    waste: Waste
    savings: list[Saving]
    admission: list[Admission]
    beside: list[Beside]
    ceiling: float

    def missed(self) -> list[str]:
        """What misses its bar."""
        return paper_rows.missed(self.waste, self.savings, self.beside)


def traces_of(setting: Setting, n: int, with_text: bool, seed: int) -> list[Trace]:
    """Drawn lengths first, then those of real text. Raises DataUnavailableError when it cannot be had."""
    found = [drawn(setting, n, seed)]
    if with_text:
        from benchmarks.paper_text import alpaca_pairs, lengths, sharegpt_pairs

        pairs = alpaca_pairs() if setting is ALPACA else sharegpt_pairs()
        found += real(setting, *lengths(pairs), n, seed)
    return found


def measure(sizes: Sizes, with_text: bool, seed: int = 0) -> Figures:
    """Run every row."""
    savings, described = [], []
    for setting in (ALPACA, SHAREGPT):
        traces = traces_of(setting, sizes.sharing, with_text, seed)
        for trace in traces:
            described.append(paper_rows.describe(trace))
            for n in WIDTHS:
                print(f"sharing: {trace.name}, n = {n}", file=sys.stderr, flush=True)
                savings.append(paper_rows.parallel(trace, setting.name, n))
        for width in WIDTHS:
            print(f"sharing: {traces[0].name}, {width} beams", file=sys.stderr, flush=True)
            savings.append(paper_rows.beams(traces[0], setting.name, width))
    print("admission and waste", file=sys.stderr, flush=True)
    load = drawn(SHAREGPT, sizes.admission, seed)
    described.append(paper_rows.describe(load) | {"name": "ShareGPT, drawn: admission and waste"})
    admitted, beside, most, seen = paper_rows.admission(load, sizes.warm_up)
    wasted = paper_rows.waste(seen, sizes.warm_up)
    return Figures(described, wasted, savings, admitted, beside, most)


# --------------------------------------------------------------------------------------------- tables


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading.strip(">"), justify="right" if heading.startswith(">") else "left")
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def tables(figures: Figures) -> list[Table]:
    """What is printed."""
    lengths = _table(
        "Lengths, in tokens; spread is standard deviation over mean", "trace", ">requests", ">in", ">out",
        ">spread in", ">spread out", ">correlation", ">KV of a running request", ">prompts below a block",
    )  # fmt: skip
    for t in figures.traces:
        lengths.add_row(
            str(t["name"]), str(t["requests"]), f"{t['mean_in']:.1f}", f"{t['mean_out']:.1f}",
            f"{t['spread_in']:.2f}", f"{t['spread_out']:.2f}", f"{t['correlation']:.2f}",
            f"{t['mean_tokens']:.0f}", f"{t['below_a_block']:.0%}",
        )  # fmt: skip
    w = figures.waste
    waste = _table(
        "KV memory that is held and unused, at every step: block 16, m = 1, D = 2, ShareGPT-like",
        ">mean", ">p99", ">most", ">ends of blocks", ">look-ahead", ">look-ahead blocks",
        ">most ahead of a row", ">paper",
    )  # fmt: skip
    waste.add_row(
        f"{w.mean:.2%}", f"{w.p99:.2%}", f"{w.most:.2%}", f"{w.ends:.2%}", f"{w.ahead:.2%}",
        f"{w.lookahead_blocks:.1f}", f"{w.most_ahead} tokens", "3.7%",
    )  # fmt: skip
    saved = _table(
        "Blocks saved by sharing, of those without sharing", "method", "trace", ">n", ">saved",
        ">sharing allows", ">the lengths allow", ">paper", "",
    )  # fmt: skip
    for s in figures.savings:
        below = s.paper is not None and s.measured < s.paper
        saved.add_row(
            s.kind, s.trace, str(s.n), _percent(s.measured), _percent(s.arithmetic), _percent(s.lengths),
            _percent(s.paper), "below: no more to share" if below else "",
        )  # fmt: skip
    at_once = _table(
        f"Requests at once in {NUM_SLOTS} slots, ShareGPT, drawn; at most {figures.ceiling:.1f} can be",
        "system", ">at once", ">paper", ">slots with a token", ">paper", ">preemptions",
        ">recomputed a token", ">Pagoda beside it", ">ceiling", ">reached",
    )  # fmt: skip
    beside = {b.system: b for b in figures.beside}
    for a in figures.admission:
        b = beside.get(a.system)
        ratios = (f"{b.measured:.2f}x", f"{b.ceiling:.2f}x", f"{b.reached:.1%}") if b else ("", "", "")
        at_once.add_row(
            a.system, f"{a.running:.2f}", f"{a.paper:.2f}", _percent(a.token_states),
            _percent(a.paper_token_states), str(a.num_preemptions), f"{a.recomputed:.2f}", *ratios,
        )  # fmt: skip
    return [lengths, waste, saved, at_once]


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def as_json(figures: Figures, arguments: dict[str, Any]) -> str:
    """The figures with what they were made from."""
    made = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "arguments": arguments,
        **dataclasses.asdict(figures),
        "missed": figures.missed(),
    }
    return json.dumps(made, indent=1) + "\n"


def main() -> None:
    """Print the tables; exit 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small load of drawn lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plots", type=Path, help="draw the figures into this folder, as PNG and SVG")
    given = parser.parse_args()
    figures = measure(QUICK if given.quick else FULL, not given.quick, given.seed)
    console = Console(width=None if sys.stdout.isatty() else 170)
    for table in tables(figures):
        console.print(table)
    if given.json:
        given.json.write_text(as_json(figures, {"quick": given.quick, "seed": given.seed}), encoding="utf-8")
    if given.plots:
        paper_plots.draw(figures.waste, figures.savings, figures.admission, figures.ceiling, given.plots)
    missed = figures.missed()
    print("\n".join(missed) or "all bars met")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
