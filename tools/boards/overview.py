"""Overview: is it well, how much does it do, and where to look next."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from tools.boards.panels import Panel, Query, add, frame, lines, row, stat
from tools.boards.queries import mean, quantile, rate, total

GATEWAY, SCHEDULER = 'engine="gateway"', 'engine="scheduler"'
CORES = 'sum by (tier, instance) (rate(process_cpu_seconds_total{job="pagoda"}[$__rate_interval]))'


def headline() -> list[Panel]:
    """What one looks at first."""
    return [
        stat(
            "Services that answer",
            "Gateways, schedulers and workers whose metrics Prometheus can read.",
            Query('sum(up{job="pagoda"})', "services"),
            "short",
        ),
        stat(
            "Alerts that fire",
            "docs/monitoring.md says what each means and what to do.",
            Query('count(ALERTS{alertname=~"Pagoda.*", alertstate="firing"}) or vector(0)', "alerts"),
            "short",
            [(1, "red")],
        ),
        stat(
            "Running",
            "Requests that hold slots now.",
            Query(total("num_requests_running"), "running"),
            "short",
        ),
        stat(
            "Waiting",
            "Requests in the queue now.",
            Query(total("num_requests_waiting"), "waiting"),
            "short",
            [(50, "orange"), (500, "red")],
        ),
        stat(
            "First token, p95",
            "19 of 20 requests had their first token sooner.",
            Query(quantile(0.95, "time_to_first_token_seconds"), "p95"),
            "s",
            [(2, "orange"), (10, "red")],
        ),
        stat(
            "KV cache in use",
            "Of the fullest worker.",
            Query(total("kv_cache_usage_perc", how="max"), "usage"),
            "percentunit",
            [(0.9, "orange"), (0.98, "red")],
        ),
    ]


def traffic() -> list[Panel]:
    """Tokens and requests."""
    return [
        row("What it does"),
        lines(
            "Tokens per second",
            "Prompt tokens of admitted requests, those that the prefix cache had, and tokens generated.",
            [
                Query(rate("prompt_tokens_total"), "prompt"),
                Query(rate("prompt_tokens_cached_total"), "of these cached"),
                Query(rate("generation_tokens_total"), "generated"),
            ],
            "short",
        ),
        lines(
            "Requests ended",
            "By how. length: max_tokens or the context's end. cancelled: the client left, or Abort.",
            [Query(rate("request_success_total", "finished_reason", SCHEDULER), "{{finished_reason}}")],
            "reqps",
            stacked=True,
        ),
        lines(
            "Requests there",
            "Running holds slots; waiting is the queue.",
            [
                Query(total("num_requests_running"), "running"),
                Query(total("num_requests_waiting"), "waiting"),
            ],
            "short",
        ),
    ]


def felt() -> list[Panel]:
    """Latency and trouble as users have them."""
    return [
        row("What users feel"),
        lines(
            "Time to first token",
            "From a request's arrival at the gateway to its first token.",
            [
                Query(quantile(0.5, "time_to_first_token_seconds"), "p50"),
                Query(quantile(0.95, "time_to_first_token_seconds"), "p95"),
            ],
            "s",
        ),
        lines(
            "Time between tokens",
            "From one token of a stream to the next.",
            [
                Query(quantile(0.5, "inter_token_latency_seconds"), "p50"),
                Query(quantile(0.95, "inter_token_latency_seconds"), "p95"),
            ],
            "s",
        ),
        lines(
            "Requests that went wrong",
            "refused: not admitted. failed: ended with an error. left: the client went before the end.",
            [
                Query(rate("admission_rejections_total", only=GATEWAY), "refused"),
                Query(rate("requests_failed_total"), "failed"),
                Query(rate("requests_cancelled_total", only=GATEWAY), "left"),
            ],
            "reqps",
        ),
    ]


def cost() -> list[Panel]:
    """Memory, device and processors."""
    return [
        row("What it takes"),
        lines(
            "KV cache in use",
            "Share of each worker's blocks that requests hold.",
            [Query(total("kv_cache_usage_perc", "engine", how="max"), "{{engine}}")],
            "percentunit",
            highest=1,
        ),
        lines(
            "Time of a step",
            "Mean time of a step on the device, by worker.",
            [Query(mean("worker_step_seconds", "engine", 'part="device"'), "{{engine}}")],
            "s",
        ),
        lines(
            "Processors",
            "Cores that each service keeps busy. A gateway of several processes does not tell.",
            [Query(CORES, "{{tier}} {{instance}}")],
            "short",
        ),
    ]


def board() -> Dashboard:
    """The board."""
    made = frame("overview", "Overview", "Is it well, how much does it do, and where to look next.")
    return add(made, *headline(), *traffic(), *felt(), *cost())
