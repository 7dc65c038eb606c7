"""Boards: variables are filled in, and numbers are written as people read them."""

from __future__ import annotations

import pytest

from tools.boards import ask, queries
from tools.boards.units import ticks, written


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "s", "0 s"),
        (0.0000123, "s", "12.3 µs"),
        (0.05, "s", "50 ms"),
        (0.9999, "s", "1 s"),
        (2.345, "s", "2.35 s"),
        (90, "s", "1.5 min"),
        (0.403, "percentunit", "40.3%"),
        (1, "percentunit", "100%"),
        (1234, "short", "1.23 K"),
        (14.86, "short", "14.9"),
        (0.025, "short", "0.025"),
        (0, "bytes", "0"),
        (800 * 2**20, "bytes", "800 MiB"),
        (1.5, "reqps", "1.5 req/s"),
    ],
)
def test_values_are_written_with_their_unit(value: float, unit: str, text: str) -> None:
    assert written(value, unit) == text


@pytest.mark.parametrize(
    ("highest", "unit", "wanted"),
    [
        (1.0, "percentunit", [0, 0.25, 0.5, 0.75, 1]),
        (13, "short", [0, 5, 10, 15]),
        (0.128, "s", [0, 0.05, 0.1, 0.15]),
        (800 * 2**20, "bytes", [i * 200 * 2**20 for i in range(5)]),
    ],
)
def test_axes_have_round_steps(highest: float, unit: str, wanted: list[float]) -> None:
    assert ticks(highest, unit) == pytest.approx(wanted)


def test_variables_are_filled_in() -> None:
    expr = queries.rate("worker_steps_total", "engine", 'engine=~"${worker}"')
    filled = ask.fill(expr, {"model": ".*", "worker": "w0|w1"}, "20s")
    assert filled == (
        'sum by (engine) (rate(pagoda:worker_steps_total{model_name=~".*", engine=~"w0|w1"}[20s]))'
    )
    with pytest.raises(ask.QueryError, match="worker"):
        ask.fill(expr, {"model": ".*"}, "20s")


def test_legends_name_their_labels() -> None:
    assert ask.legend("{{engine}} p95", {"engine": "w0"}) == "w0 p95"
    assert ask.legend("p95", {}) == "p95"
