"""Asks a live Prometheus what a board asks, as Grafana would: variables filled in, each target a query."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 30.0
LABEL_VALUES = re.compile(r"label_values\((.+), (\w+)\)")


class QueryError(Exception):
    """Prometheus refuses a query, or cannot be asked."""


@dataclass(frozen=True)
class Series:
    """One answer: its labels, and (time, value) pairs in seconds."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


class Prometheus:
    """A client of the HTTP API at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer. Raises QueryError."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=TIMEOUT_S) as reply:
                answer = json.loads(reply.read())
        except urllib.error.HTTPError as error:
            raise QueryError(f"{parameters}: {error.read().decode(errors='replace')}") from error
        except OSError as error:
            raise QueryError(f"{self.url}: {error}") from error
        return answer["data"]

    def at(self, expr: str, time_s: float) -> list[Series]:
        """The value of each series at one moment; a scalar is one series without labels."""
        data = self.get("query", query=expr, time=f"{time_s:.3f}")
        if data["resultType"] == "scalar":
            return [Series({}, [_point(data["result"])])]
        return [Series(found["metric"], [_point(found["value"])]) for found in data["result"]]

    def over(self, expr: str, start_s: float, end_s: float, step_s: float) -> list[Series]:
        """The values of each series over a time."""
        data = self.get(
            "query_range", query=expr, start=f"{start_s:.3f}", end=f"{end_s:.3f}", step=f"{step_s:g}"
        )
        return [Series(found["metric"], [*map(_point, found["values"])]) for found in data["result"]]

    def choices(self, query: str) -> list[str]:
        """What a variable of the form label_values(selector, label) offers. Raises QueryError for others."""
        match = LABEL_VALUES.fullmatch(query)
        if match is None:
            raise QueryError(f"{query!r} is not label_values(selector, label)")
        selector, label = match.groups()
        values: list[str] = self.get(f"label/{label}/values", **{"match[]": selector})
        return values


def fill(expr: str, values: dict[str, str], rate_interval: str) -> str:
    """`expr` with Grafana's variables and ours filled in.

    Raises QueryError when one is left over.
    """
    known = {
        "__rate_interval": rate_interval,
        "__interval": rate_interval,
        "__range": rate_interval,
        **values,
    }

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in known:
            raise QueryError(f"{expr}: nothing is known of the variable {name!r}")
        return known[name]

    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, expr)


def legend(text: str, labels: dict[str, str]) -> str:
    """What a series is called: {{label}} is replaced by its value."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), text)


def _point(pair: list[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])
