"""What a worker shows to Prometheus. Names and buckets follow those of the other tiers."""

from __future__ import annotations

import time
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from pagoda.exposition import plain_app, serve

STEP_BUCKETS = (
    *(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
)
_Kind = TypeVar("_Kind", Counter, Gauge, Histogram)
LABELS = ("model_name", "engine")


class WorkerMetrics:
    """The worker's series, in a registry of their own."""

    def __init__(self, model_name: str, group_name: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def made(kind: type[_Kind], name: str, text: str, **options: Any) -> _Kind:
            metric = kind(f"pagoda:worker_{name}", text, LABELS, registry=self.registry, **options)
            return metric.labels(model_name, group_name)

        step = Histogram(
            "pagoda:worker_step_seconds",
            "Time of a step: stage (check and pack), device (diffs, forward, sampling), output (report).",
            (*LABELS, "part"),
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )
        self._parts = [step.labels(model_name, group_name, part) for part in ("stage", "device", "output")]
        text = "Time between the end of a step and the start of the next; 0 when that was waiting already."
        self._idle = made(Histogram, "idle_seconds", text, buckets=(0, *STEP_BUCKETS))
        self._steps = made(Counter, "steps", "Steps done.")
        self._tokens = made(Counter, "generated_tokens", "Tokens drawn.")
        self._sessions = made(Counter, "sessions", "Sessions with a scheduler, begun.")
        self._failures = made(Counter, "failures", "Steps that could not be run.")
        sent = made(Gauge, "heartbeat_age_seconds", "Time since something was sent to the scheduler.")
        sent.set_function(lambda: time.monotonic() - self._last_sent)
        done = made(Gauge, "last_step_age_seconds", "Time since the last step was done.")
        done.set_function(lambda: time.monotonic() - self._last_step)
        self._epoch = made(Gauge, "epoch", "The session's epoch, 0 without one.")
        text = "Graphs that are still to be captured when nothing else is to do."
        self._graphs = made(Gauge, "graphs_pending", text)
        self._last_sent = self._last_step = time.monotonic()

    def serve(self, port: int) -> None:
        """Serve /metrics on the loopback address, from a thread of its own.

        Raises:
            OSError: the port cannot be bound.
        """
        serve(plain_app(self.registry), "127.0.0.1", port)

    def step(self, stage: float, device: float, report: float, idle: float, num_tokens: int) -> None:
        """Count one step; times in seconds."""
        for part, seconds in zip(self._parts, (stage, device, report), strict=True):
            part.observe(seconds)
        self._idle.observe(idle)
        self._steps.inc()
        self._tokens.inc(num_tokens)
        self._last_step = time.monotonic()

    def graphs(self, num_pending: int) -> None:
        """Note how many graphs are still to be captured."""
        self._graphs.set(num_pending)

    def sent(self) -> None:
        """Note that a message went to the scheduler."""
        self._last_sent = time.monotonic()

    def session(self, epoch: int) -> None:
        """Note that a session began, or with epoch 0 that it ended."""
        self._epoch.set(epoch)
        if epoch:
            self._sessions.inc()

    def failure(self) -> None:
        """Count a step that could not be run."""
        self._failures.inc()
