"""Numbers as Grafana writes them, for the pictures: units of the boards, and round steps for axes."""

from __future__ import annotations

import math

SECONDS = ((1e-6, "µs"), (1e-3, "ms"), (1.0, "s"), (60.0, "min"), (3600.0, "h"))
COUNTS = ((1.0, ""), (1e3, " K"), (1e6, " Mil"))
BYTES = ((1.0, " B"), (2.0**10, " KiB"), (2.0**20, " MiB"), (2.0**30, " GiB"), (2.0**40, " TiB"))
STEPS = (1, 2, 2.5, 5, 10)


def written(value: float, unit: str) -> str:
    """`value` with its unit: "s", "percentunit", "reqps", "bytes" or "short"."""
    if unit == "percentunit":
        return f"{_digits(value * 100)}%"
    if unit == "reqps":
        return f"{_digits(value)} req/s"
    if unit == "s":
        return _scaled(value, SECONDS, " ")
    return _scaled(value, BYTES if unit == "bytes" else COUNTS, "")


def ticks(highest: float, unit: str, at_most: int = 4) -> list[float]:
    """Round values from 0 up to at least `highest`, at most so many beyond 0."""
    scale = 1.0
    if unit == "bytes":
        scale = max((size for size, _ in BYTES if size <= highest), default=1.0)
    raw = max(highest / scale, 1e-9) / at_most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step * power for step in STEPS if step * power >= raw * 0.999) * scale
    return [i * step for i in range(math.ceil(highest / step * 0.999) + 1)]


def _scaled(value: float, scale: tuple[tuple[float, str], ...], between: str) -> str:
    if value == 0:
        return f"0{between}{scale[-3][1]}".rstrip() if between else "0"
    size, name = next(((s, n) for s, n in reversed(scale) if abs(value) >= s * 0.9995), scale[0])
    return f"{_digits(value / size)}{between}{name}"


def _digits(value: float) -> str:
    """Three digits, as far as they say something."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
