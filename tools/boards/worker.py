"""Worker: what each worker does with its device, and what it waits for."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from tools.boards.panels import Panel, Query, add, frame, lines, row, stat, variable
from tools.boards.queries import mean, quantile, rate, ratio, total

WORKER = 'engine=~"$worker"'
PROCESS = 'job="pagoda", tier="worker"'


def part(name: str) -> str:
    """The chosen workers' share of a step."""
    return f'{WORKER}, part="{name}"'


def headline() -> list[Panel]:
    """What one looks at first."""
    return [
        stat(
            "Steps per second",
            "Steps done by all workers.",
            Query(rate("worker_steps_total", only=WORKER), "steps"),
            "short",
        ),
        stat(
            "Tokens per second",
            "Tokens drawn by all workers.",
            Query(rate("worker_generated_tokens_total", only=WORKER), "t"),
            "short",
        ),
        stat(
            "Tokens of a step",
            "How much a message to the worker brings back.",
            Query(ratio("worker_generated_tokens_total", "worker_steps_total", WORKER), "tokens"),
            "short",
        ),
        stat(
            "Device busy",
            "Share of the time in which devices compute.",
            Query(f"avg({rate('worker_step_seconds_sum', 'engine', part('device'))})", "busy"),
            "percentunit",
        ),
        stat(
            "Heartbeat",
            "The longest since a worker sent something; a second is usual.",
            Query(total("worker_heartbeat_age_seconds", only=WORKER, how="max"), "since"),
            "s",
            [(3, "orange"), (10, "red")],
        ),
        stat(
            "Last step",
            "The longest since a worker's last step. It grows while there are no requests.",
            Query(total("worker_last_step_age_seconds", only=WORKER, how="max"), "since"),
            "s",
        ),
    ]


def steps() -> list[Panel]:
    """Steps and their parts."""
    return [
        row("Steps"),
        lines(
            "Steps per second",
            "Done, by worker.",
            [Query(rate("worker_steps_total", "engine", WORKER), "{{engine}}")],
            "short",
        ),
        lines(
            "Tokens per second",
            "Drawn, by worker; those for requests that had just been stopped included.",
            [Query(rate("worker_generated_tokens_total", "engine", WORKER), "{{engine}}")],
            "short",
        ),
        lines(
            "Device busy",
            "Share of its time in which a worker's device computes. Idle devices beside a queue are wrong.",
            [Query(rate("worker_step_seconds_sum", "engine", part("device")), "{{engine}}")],
            "percentunit",
            highest=1,
        ),
        lines(
            "Step on the device",
            "Changes of rows, forward and sampling. Long ones are prompts.",
            [
                Query(
                    quantile(share, "worker_step_seconds", "engine", part("device")),
                    f"{{{{engine}}}} p{share * 100:g}",
                )
                for share in (0.5, 0.95)
            ],
            "s",
        ),
        lines(
            "A step's mean time, by part",
            "stage: checked and packed. device: computed. output: reported.",
            [Query(mean("worker_step_seconds", "part", WORKER), "{{part}}")],
            "s",
            stacked=True,
        ),
        lines(
            "Stage and output, p95",
            "What the worker's host does around a step.",
            [
                Query(quantile(0.95, "worker_step_seconds", "engine", part(name)), f"{{{{engine}}}} {name}")
                for name in ("stage", "output")
            ],
            "s",
        ),
    ]


def between() -> list[Panel]:
    """Idle time, signs of life, sessions and memory."""
    return [
        row("Between steps"),
        lines(
            "Idle between steps",
            "0 where the next step was waiting already; the longest waits are those for requests.",
            [
                Query(quantile(0.95, "worker_idle_seconds", "engine", WORKER), "{{engine}} p95"),
                Query(mean("worker_idle_seconds", "engine", WORKER), "{{engine}} mean"),
            ],
            "s",
            width=6,
        ),
        lines(
            "Last sign of life",
            "Since the worker last sent something, and since its last step.",
            [
                Query(total("worker_heartbeat_age_seconds", "engine", WORKER, "max"), "{{engine}} message"),
                Query(total("worker_last_step_age_seconds", "engine", WORKER, "max"), "{{engine}} step"),
            ],
            "s",
            width=6,
        ),
        lines(
            "Sessions and what went wrong",
            "Sessions begun with a scheduler, the present one's epoch (0: none), steps that could not "
            "be run, and graphs that are still to be captured (CUDA).",
            [
                Query(total("worker_sessions_total", "engine", WORKER, "max"), "{{engine}} sessions"),
                Query(total("worker_epoch", "engine", WORKER, "max"), "{{engine}} epoch"),
                Query(total("worker_failures_total", "engine", WORKER, "max"), "{{engine}} failures"),
                Query(total("worker_graphs_pending", "engine", WORKER, "max"), "{{engine}} graphs pending"),
            ],
            "short",
            width=6,
        ),
        lines(
            "Memory of the process",
            "Resident memory of the host, weights and KV included on a CPU.",
            [Query(f"process_resident_memory_bytes{{{PROCESS}}}", "{{instance}}")],
            "bytes",
            width=6,
        ),
    ]


def board() -> Dashboard:
    """The board."""
    workers = variable("worker", "Worker", "pagoda:worker_steps_total", "engine", "Worker groups.")
    text = "What each worker does with its device, and what it waits for."
    made = frame("worker", "Worker", text, [workers])
    return add(made, *headline(), *steps(), *between())
