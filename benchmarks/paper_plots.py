"""Draws the figures of `benchmarks.paper` beside the paper's, as PNG and as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper_rows import Admission, Saving, Waste

OURS, PAPER, LENGTHS = "#2f6db3", "#b0b0b0", "#d9a441"


def draw(
    waste: Waste, savings: Sequence[Saving], systems: Sequence[Admission], ceiling: float, folder: Path
) -> None:
    """Write waste, sharing and admission into `folder`, each as .png and .svg."""
    import matplotlib

    matplotlib.use("Agg")
    # The same figures give the same file: nothing random and no date in it.
    matplotlib.rcParams.update({"svg.hashsalt": "pagoda", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for name, plot in (
        ("waste", lambda: _waste(pyplot, waste, systems)),
        ("sharing", lambda: _sharing(pyplot, savings)),
        ("admission", lambda: _admission(pyplot, systems, ceiling)),
    ):
        figure = plot()
        figure.tight_layout()
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{name}.png", dpi=130)
        pyplot.close(figure)


_Bars = tuple[str, str, Sequence[float | None]]


def _bars(axes: Any, labels: Sequence[str], groups: Sequence[_Bars]) -> None:
    """Bars side by side: for each group its name, colour and a value a label."""
    width = 0.8 / len(groups)
    for i, (name, colour, values) in enumerate(groups):
        places = [place + (i - (len(groups) - 1) / 2) * width for place in range(len(labels))]
        drawn = [(p, v) for p, v in zip(places, values, strict=True) if v is not None]
        bars = axes.bar([p for p, _ in drawn], [v for _, v in drawn], width, label=name, color=colour)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks(range(len(labels)), labels)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _waste(pyplot: Any, waste: Waste, systems: Sequence[Admission]) -> Any:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.2))
    left.plot([100 * value for value in waste.series], color=OURS, linewidth=0.8)
    left.axhline(3, color="black", linewidth=0.8, linestyle="--")
    left.set(xlabel="steps, in 1/400 of the load", ylabel="% of held slots unused", ylim=(0, 5))
    left.set_title(f"Waste: mean {waste.mean:.2%}, of it look-ahead {waste.ahead:.2%}")
    left.spines[["top", "right"]].set_visible(False)
    ours, paper = (
        [100 * value for value in column]
        for column in ([s.token_states for s in systems], [s.paper_token_states for s in systems])
    )
    _bars(right, [s.system for s in systems], [("simulated here", OURS, ours), ("paper", PAPER, paper)])
    right.set(ylabel="% of all slots with a known token", ylim=(0, 118))
    return figure


def _sharing(pyplot: Any, savings: Sequence[Saving]) -> Any:
    kinds = list(dict.fromkeys(s.kind for s in savings))
    names = [name for name in dict.fromkeys(s.trace for s in savings) if name.endswith("drawn")]
    figure, grid = pyplot.subplots(len(kinds), len(names), figsize=(9.5, 2.9 * len(kinds)), squeeze=False)
    for row, kind in zip(grid, kinds, strict=True):
        for axes, name in zip(row, names, strict=True):
            shown = [s for s in savings if s.kind == kind and s.trace == name]
            groups = [
                ("Pagoda", OURS, [100 * s.measured for s in shown]),
                ("what the lengths allow", LENGTHS, [100 * s.lengths for s in shown]),
                ("paper", PAPER, [None if s.paper is None else 100 * s.paper for s in shown]),
            ]
            _bars(axes, [f"{'n' if kind == 'parallel' else 'width'} = {s.n}" for s in shown], groups)
            axes.set(ylabel="% of blocks saved", title=f"{kind}: {name}")
            axes.margins(y=0.2)
    return figure


def _admission(pyplot: Any, systems: Sequence[Admission], ceiling: float) -> Any:
    figure, axes = pyplot.subplots(figsize=(6.5, 3.2))
    groups = [
        ("simulated here", OURS, [s.running for s in systems]),
        ("paper", PAPER, [s.paper for s in systems]),
    ]
    _bars(axes, [s.system for s in systems], groups)
    axes.axhline(ceiling, color="black", linewidth=0.8, linestyle="--")
    axes.text(-0.4, ceiling, f"no allocator runs more than {ceiling:.1f}", va="bottom", fontsize=8)
    axes.set(ylabel="requests at once", ylim=(0, 1.2 * ceiling))
    return figure
