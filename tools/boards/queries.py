"""PromQL of the boards: rates, means and quantiles of our metrics, for what the board's variables choose.

Names are without `pagoda:`. `only` is further matchers, such as 'engine="gateway"'.
"""

from __future__ import annotations

WINDOW = "$__rate_interval"
MODEL = 'model_name=~"$model"'


def select(name: str, only: str = "") -> str:
    """The series of a metric for the chosen models."""
    return f"pagoda:{name}{{{', '.join(filter(None, (MODEL, only)))}}}"


def total(name: str, by: str = "", only: str = "", how: str = "sum") -> str:
    """A gauge over all that exposes it, or for each value of the label `by`."""
    return f"{how}{_by(by)} ({select(name, only)})"


def rate(name: str, by: str = "", only: str = "") -> str:
    """How much a counter grows in a second."""
    return f"sum{_by(by)} (rate({select(name, only)}[{WINDOW}]))"


def mean(name: str, by: str = "", only: str = "") -> str:
    """The mean of what a histogram observed; nothing while it observes nothing."""
    return f"{rate(name + '_sum', by, only)} / ({rate(name + '_count', by, only)} > 0)"


def quantile(share: float, name: str, by: str = "", only: str = "") -> str:
    """A quantile of what a histogram observed."""
    labels = ", ".join(filter(None, (by, "le")))
    return f"histogram_quantile({share}, {rate(name + '_bucket', labels, only)})"


def buckets(name: str, only: str = "") -> str:
    """Observations a second in each bucket, for a heatmap."""
    return rate(name + "_bucket", "le", only)


def ratio(part: str, whole: str, only: str = "") -> str:
    """One counter's growth as a share of another's; nothing while that stands still."""
    return f"{rate(part, only=only)} / ({rate(whole, only=only)} > 0)"


def _by(by: str) -> str:
    return f" by ({by})" if by else ""
