"""Pictures of the boards from a live Prometheus, for docs/monitoring.md, where no Grafana can be had.

    python -m tools.boards.draw --url http://127.0.0.1:9090 --minutes 4 --out docs/boards

Every panel of a board is asked as Grafana would ask and drawn where the board puts it, with its title, unit
and legend. It is matplotlib's picture of the board's data, and looks like Grafana only from afar.
"""

from __future__ import annotations

import argparse
import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import dates
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from tools import boards
from tools.boards import ask
from tools.boards.units import ticks, written

WIDTH_PX, ROW_PX, GAP_PX, MARGIN_PX, HEAD_PX, DPI = 1600, 37, 8, 16, 58, 100
COLUMNS = 24
PAGE, CARD, EDGE, INK, FAINT, GRID = "#111217", "#181b1f", "#26292f", "#d8d9df", "#8e919a", "#2a2d33"
LINES = ("#73bf69", "#5794f2", "#f2cc0c", "#ff9830", "#f2495c", "#b877d9", "#56c5c0", "#fade2a")
LIMITS = {"green": "#73bf69", "orange": "#ff9830", "red": "#f2495c", "text": INK}
HEAT = LinearSegmentedColormap.from_list("heat", ["#3a2410", "#8a4511", "#e0752d", "#ffb357", "#fff3d6"])
NUM_POINTS = 240
NUM_TIMES = 5  # on the axis of time
HEADING_PT, LETTER_PX = 7.6, 0.81  # of a table's headings; how wide a letter is for each point of its size
COLORS_OF_A_FILE, KMEANS = 240, 1


@dataclass(frozen=True)
class Asked:
    """What is asked for: by whom, for which time, with which values of variables."""

    prometheus: ask.Prometheus
    start: float
    end: float
    rate_interval: str
    values: dict[str, str]

    def over(self, target: dict[str, Any]) -> list[ask.Series]:
        """A target's answers over the time, with a point that is no number where one is missing."""
        step = max((self.end - self.start) / NUM_POINTS, 1.0)
        found = self.prometheus.over(self.filled(target), self.start, self.end, step)
        moments = [self.start + i * step for i in range(int((self.end - self.start) / step) + 1)]
        return [ask.Series(one.labels, _whole(one.points, moments, step)) for one in found]

    def filled(self, target: dict[str, Any]) -> str:
        """A target's query."""
        return ask.fill(target["expr"], self.values, self.rate_interval)


def _whole(points: list[tuple[float, float]], moments: list[float], step: float) -> list[tuple[float, float]]:
    by_number = {round((t - moments[0]) / step): value for t, value in points}
    return [(t, by_number.get(i, float("nan"))) for i, t in enumerate(moments)]


@dataclass(frozen=True)
class Place:
    """A panel's place on the picture, in pixels from its upper left corner."""

    x: float
    y: float
    width: float
    height: float


def picture(name: str, asked: Asked) -> Figure:
    """A board."""
    board = boards.load(name)
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    height = HEAD_PX + bottom * ROW_PX + MARGIN_PX
    figure = Figure(figsize=(WIDTH_PX / DPI, height / DPI), dpi=DPI, facecolor=PAGE)
    page = figure.add_axes((0, 0, 1, 1))
    page.set_xlim(0, WIDTH_PX)
    page.set_ylim(height, 0)
    page.axis("off")
    page.text(MARGIN_PX + 4, 24, board["title"], color=INK, size=15, weight="bold", va="center")
    page.text(MARGIN_PX + 4, 45, board["description"], color=FAINT, size=9, va="center")
    span = " - ".join(time.strftime("%H:%M", time.gmtime(moment)) for moment in (asked.start, asked.end))
    page.text(WIDTH_PX - MARGIN_PX - 4, 24, span, color=FAINT, size=10, va="center", ha="right")
    for panel in board["panels"]:
        place = _place(panel["gridPos"])
        if panel["type"] == "row":
            page.text(
                place.x + 4, place.y + place.height / 2 + 3, panel["title"], color=INK, size=11, va="center"
            )
            continue
        _card(page, place, panel["title"])
        KINDS[panel["type"]](figure, page, place, panel, asked)
    return figure


def _place(grid: dict[str, int]) -> Place:
    column = (WIDTH_PX - 2 * MARGIN_PX) / COLUMNS
    return Place(
        MARGIN_PX + grid["x"] * column + GAP_PX / 2,
        HEAD_PX + grid["y"] * ROW_PX + GAP_PX / 2,
        grid["w"] * column - GAP_PX,
        grid["h"] * ROW_PX - GAP_PX,
    )


def _card(page: Axes, place: Place, title: str) -> None:
    corners = "round,pad=0,rounding_size=3"
    page.add_patch(
        FancyBboxPatch((place.x, place.y), place.width, place.height, corners, fc=CARD, ec=EDGE, lw=1)
    )
    page.text(place.x + 10, place.y + 16, title, color=INK, size=9.5, va="center")


def _axes(figure: Figure, place: Place, left: float, top: float, right: float, bottom: float) -> Axes:
    """Axes inside a card, so many pixels from its edges."""
    width, height = figure.get_size_inches() * DPI
    axes = figure.add_axes(
        (
            (place.x + left) / width,
            1 - (place.y + place.height - bottom) / height,
            (place.width - left - right) / width,
            (place.height - top - bottom) / height,
        )
    )
    axes.set_facecolor("none")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(colors=FAINT, labelsize=7.5, length=0, pad=4)
    return axes


def _time_axis(axes: Axes, asked: Asked) -> None:
    axes.set_xlim(_moment(asked.start), _moment(asked.end))
    minutes = max(1, round((asked.end - asked.start) / 60 / NUM_TIMES))
    axes.xaxis.set_major_locator(dates.MinuteLocator(interval=minutes))
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M"))


def _moment(seconds: float) -> float:
    """A time as matplotlib counts it: days."""
    return seconds / 86400


def _stat(figure: Figure, page: Axes, place: Place, panel: dict[str, Any], asked: Asked) -> None:
    (target,) = panel["targets"]
    points = [(t, v) for one in asked.over(target) for t, v in one.points if v == v]
    defaults = panel["fieldConfig"]["defaults"]
    if not points:
        page.text(place.x + place.width / 2, place.y + place.height / 2, "No data", color=FAINT, ha="center")
        return
    value = points[-1][1]
    steps = defaults["thresholds"]["steps"]
    color = LIMITS[[s["color"] for s in steps if s["value"] is None or value >= s["value"]][-1]]
    axes = _axes(figure, place, 1, place.height * 0.62, 1, 1)
    axes.axis("off")
    line = color if color != INK else LINES[1]
    axes.plot([t for t, _ in points], [v for _, v in points], color=line, lw=1.1)
    axes.fill_between([t for t, _ in points], [v for _, v in points], color=line, alpha=0.18, lw=0)
    axes.set_xlim(asked.start, asked.end)
    axes.set_ylim(0, max(v for _, v in points) * 1.1 or 1)
    page.text(
        place.x + place.width / 2,
        place.y + place.height * 0.44,
        written(value, defaults.get("unit", "short")),
        color=color,
        size=21,
        ha="center",
        va="center",
    )


def _lines(figure: Figure, page: Axes, place: Place, panel: dict[str, Any], asked: Asked) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    unit, custom = defaults.get("unit", "short"), defaults["custom"]
    shown = [
        (ask.legend(target["legendFormat"], one.labels), one)
        for target in panel["targets"]
        for one in asked.over(target)
    ]
    rows = _legend(page, place, [name for name, _ in shown])
    axes = _axes(figure, place, 58, 34, 14, 26 + 17 * rows)
    stacked = custom.get("stacking", {}).get("mode") == "normal"
    below: dict[float, float] = {}
    highest = 0.0
    for i, (_, one) in enumerate(shown):
        color = LINES[i % len(LINES)]
        times = [_moment(t) for t, _ in one.points]
        base = [below.get(t, 0.0) if stacked else 0.0 for t, _ in one.points]
        tops = [b + v for b, (_, v) in zip(base, one.points, strict=True)]
        if stacked:
            below.update({t: top for (t, _), top in zip(one.points, tops, strict=True) if top == top})
        if stacked and not any(value > 0 for _, value in one.points):
            continue  # nothing but the edge of what is below
        axes.plot(times, tops, color=color, lw=1.3)
        axes.fill_between(times, base, tops, color=color, alpha=custom["fillOpacity"] / 100 * 0.8, lw=0)
        highest = max([highest, *(top for top in tops if top == top)])
    marks = ticks(defaults.get("max") or highest or 1, unit)
    axes.set_yticks(marks, [written(mark, unit) for mark in marks])
    axes.set_ylim(0, marks[-1] * 1.02)
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    _time_axis(axes, asked)


def _legend(page: Axes, place: Place, names: list[str]) -> int:
    """Write the legend at the card's lower edge; how many rows it took."""
    rows: list[list[tuple[float, int]]] = [[]]
    x = 12.0
    for i, name in enumerate(names):
        width = 26 + 6.1 * len(name)
        if rows[-1] and x + width > place.width - 8:
            rows.append([])
            x = 12.0
        rows[-1].append((x, i))
        x += width + 8
    for number, entries in enumerate(rows):
        y = place.y + place.height - 13 - 17 * (len(rows) - 1 - number)
        for x, i in entries:
            left = place.x + x
            page.add_patch(Rectangle((left, y - 1.5), 13, 3, fc=LINES[i % len(LINES)], lw=0))
            page.text(left + 18, y, names[i], color=INK, size=7.8, va="center")
    return len(rows)


def _heat(figure: Figure, page: Axes, place: Place, panel: dict[str, Any], asked: Asked) -> None:
    (target,) = panel["targets"]
    unit = panel["options"]["yAxis"]["unit"]
    buckets = {float(one.labels["le"]): {t: v for t, v in one.points if v == v} for one in asked.over(target)}
    bounds = sorted(buckets)
    times = sorted({t for points in buckets.values() for t in points})
    cells = []
    for i, bound in enumerate(bounds):
        lower = buckets[bounds[i - 1]] if i else {}
        cells.append([max(buckets[bound].get(t, 0.0) - lower.get(t, 0.0), 0.0) for t in times])
    filled = [i for i, row in enumerate(cells) if max(row) > 0]
    axes = _axes(figure, place, 58, 34, 14, 26)
    if not filled:
        return
    first, last = max(filled[0] - 1, 0), filled[-1] + 1
    wanted = [[value or float("nan") for value in row] for row in cells[first:last]]
    edges = [_moment(asked.start), _moment(asked.end)]
    axes.imshow(
        wanted,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap=HEAT,
        norm=PowerNorm(0.5),
        extent=(_moment(times[0]), _moment(times[-1]), 0, len(wanted)),
    )
    step = max(1, len(wanted) // 6)
    places = range(0, len(wanted), step)
    names = [written(bounds[first + i], unit) if bounds[first + i] < float("inf") else "more" for i in places]
    axes.set_yticks([i + 1 for i in places], names)
    axes.set_xlim(*edges)
    axes.grid(color=GRID, lw=0.5, axis="x")
    axes.set_axisbelow(True)
    _time_axis(axes, asked)


def _table(figure: Figure, page: Axes, place: Place, panel: dict[str, Any], asked: Asked) -> None:
    (target,) = panel["targets"]
    columns = panel["transformations"][0]["options"]["include"]["names"]
    found = asked.prometheus.at(asked.filled(target), asked.end)
    cells = [[column, *(one.labels.get(column, "") for one in found)] for column in columns]
    widths = [max(map(len, texts)) + 2 for texts in cells]
    usable = place.width - 24
    size = min(HEADING_PT, usable / sum(widths) / LETTER_PX)
    lefts = [place.x + 12 + usable * sum(widths[:i]) / sum(widths) for i in range(len(columns))]
    for left, (column, *_) in zip(lefts, cells, strict=True):
        page.text(left, place.y + 46, column, color="#6e9fff", size=size, va="center")
    for row in range(len(found)):
        y = place.y + 74 + 26 * row
        page.plot([place.x + 8, place.x + place.width - 8], [y - 14, y - 14], color=GRID, lw=0.8)
        for left, (_, *values) in zip(lefts, cells, strict=True):
            page.text(left, y, values[row], color=INK, size=size + 0.6, va="center")


KINDS = {"stat": _stat, "timeseries": _lines, "heatmap": _heat, "table": _table}


def save(figure: Figure, path: Path) -> None:
    """Write a PNG with few colours, which keeps it small."""
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=DPI)
    image = Image.open(raw).convert("RGB")
    image.quantize(COLORS_OF_A_FILE, Image.Quantize.MEDIANCUT, KMEANS, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:9090", help="of Prometheus")
    parser.add_argument("--minutes", type=float, default=5.0, help="how far back")
    parser.add_argument("--ago", type=float, default=0.0, help="seconds from the pictures' end to now")
    parser.add_argument("--rate-interval", default="20s", help="what $__rate_interval stands for")
    parser.add_argument("--out", type=Path, default=Path("docs/boards"))
    parser.add_argument("--boards", nargs="+", choices=boards.BOARDS, default=boards.BOARDS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    end = time.time() - given.ago
    for name in given.boards:
        values = {
            v["name"]: v["allValue"]
            for v in boards.load(name)["templating"]["list"]
            if v["type"] != "datasource"
        }
        asked = Asked(ask.Prometheus(given.url), end - 60 * given.minutes, end, given.rate_interval, values)
        path = given.out / f"{name}.png"
        save(picture(name, asked), path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
