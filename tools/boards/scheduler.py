"""Scheduler and wire: what a step costs beside the device's work; what is refused, and what repeated."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from tools.boards.panels import Panel, Query, add, frame, heat, lines, row, stat
from tools.boards.queries import buckets, mean, quantile, rate, select, total

SCHEDULER = 'engine="scheduler"'
PROCESS = 'job="pagoda", tier="scheduler"'


def part(title: str, text: str, name: str) -> Panel:
    """One part of a step's time."""
    only = f'part="{name}"'
    shares = [
        Query(quantile(share, "step_seconds", only=only), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99)
    ]
    return lines(title, text, [*shares, Query(mean("step_seconds", only=only), "mean")], "s", width=6)


def headline() -> list[Panel]:
    """What one looks at first."""
    return [
        stat("Workers", "Worker groups attached.", Query(total("num_workers"), "workers"), "short"),
        stat(
            "Steps per second",
            "Steps that workers answered.",
            Query(rate("step_seconds_count", only='part="gpu"'), "steps"),
            "short",
        ),
        stat(
            "Tokens of an iteration",
            "Mean of the tokens that go into one iteration.",
            Query(mean("iteration_tokens_total"), "tokens"),
            "short",
        ),
        stat(
            "Since the last result",
            "Grows while nothing runs; beside running requests it says that they stand still.",
            Query(f"time() - max({select('last_progress_timestamp_seconds')})", "since"),
            "s",
        ),
        stat(
            "Device waits",
            "Mean time that a device waited for a step.",
            Query(mean("device_idle_seconds"), "idle"),
            "s",
        ),
        stat(
            "Worker last heard",
            "The longest since a worker was heard; at 10 s it is given up.",
            Query(total("worker_last_heard_seconds", how="max"), "since"),
            "s",
            [(5, "red")],
        ),
    ]


def steps() -> list[Panel]:
    """Steps and their parts."""
    return [
        row("Where a step's time goes"),
        part("Plan", "Deciding what the step does, until it is sent.", "plan"),
        part("Wire", "The part of the way to the worker and back that no other step hides.", "wire"),
        part("Device", "The step on the device, as the worker measured it.", "gpu"),
        part(
            "Output", "From the steps' sending until their outputs are on the way to the gateways.", "output"
        ),
        lines(
            "All parts",
            "Seconds of each part in a second. The device's part is the only one that should be long.",
            [Query(rate("step_seconds_sum", "part"), "{{part}}")],
            "s",
        ),
        heat(
            "Tokens of an iteration, all of them",
            "Decodes make small iterations, prompts large ones.",
            Query(buckets("iteration_tokens_total"), "{{le}}"),
            "short",
        ),
        lines(
            "How long devices wait for a step",
            "0 is a step that was there already; the longest waits are those for requests.",
            [
                Query(quantile(0.5, "device_idle_seconds"), "p50"),
                Query(quantile(0.95, "device_idle_seconds"), "p95"),
                Query(mean("device_idle_seconds"), "mean"),
            ],
            "s",
        ),
    ]


def requests() -> list[Panel]:
    """What is refused, ended early or repeated."""
    return [
        row("Requests"),
        lines(
            "Refused",
            "By reason: by the gateway's checks and limits, and by the scheduler.",
            [
                Query(
                    rate("admission_rejections_total", "reason", 'engine="gateway"'),
                    "gateway: {{reason}}",
                ),
                Query(rate("admission_rejections_total", "reason", SCHEDULER), "scheduler: {{reason}}"),
            ],
            "reqps",
            width=6,
        ),
        lines(
            "Ended early",
            "cancelled: by their client or by Abort. aborted: those by Abort alone.",
            [
                Query(rate("requests_cancelled_total", only=SCHEDULER), "cancelled"),
                Query(rate("requests_aborted_total"), "aborted"),
            ],
            "reqps",
            width=6,
        ),
        lines(
            "Gone on after a worker's death",
            "Requests a second that went back to the queue, and the tokens that they had. None are lost.",
            [
                Query(rate("replayed_requests_total"), "requests"),
                Query(rate("replayed_tokens_total"), "tokens"),
            ],
            "short",
            width=6,
        ),
        lines(
            "The scheduler's process",
            "Cores busy. It is one thread: at 1 it is the bottleneck.",
            [Query(f"rate(process_cpu_seconds_total{{{PROCESS}}}[$__rate_interval])", "{{instance}}")],
            "short",
            width=6,
        ),
    ]


def board() -> Dashboard:
    """The board."""
    text = "What a step costs beside the device's work; what is refused, and what repeated."
    made = frame("scheduler", "Scheduler and wire", text)
    return add(made, *headline(), *steps(), *requests())
