"""What a worker shows to Prometheus. Names and buckets follow those of the other tiers."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from pagoda.exposition import plain_app, serve

STEP_BUCKETS = (
    *(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
)
LABELS = ("model_name", "engine")


class WorkerMetrics:
    """The worker's series, in a registry of their own."""

    def __init__(self, model_name: str, group_name: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        labels = (model_name, group_name)
        step = Histogram(
            "pagoda:worker_step_seconds",
            "Time of a step: stage (check and pack), device (diffs, forward, sampling), output (report).",
            (*LABELS, "part"),
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )
        self._parts = [step.labels(*labels, part) for part in ("stage", "device", "output")]
        self._idle = Histogram(
            "pagoda:worker_idle_seconds",
            "Time between the end of a step and the start of the next; 0 when that was waiting already.",
            LABELS,
            buckets=(0, *STEP_BUCKETS),
            registry=self.registry,
        ).labels(*labels)
        self._steps = self._counter("pagoda:worker_steps", "Steps done.", labels)
        self._tokens = self._counter("pagoda:worker_generated_tokens", "Tokens drawn.", labels)
        self._sessions = self._counter("pagoda:worker_sessions", "Sessions with a scheduler, begun.", labels)
        self._failures = self._counter("pagoda:worker_failures", "Steps that could not be run.", labels)
        self._gauge(
            "pagoda:worker_heartbeat_age_seconds", "Time since something was sent to the scheduler.", labels
        ).set_function(lambda: time.monotonic() - self._last_sent)
        self._gauge(
            "pagoda:worker_last_step_age_seconds", "Time since the last step was done.", labels
        ).set_function(lambda: time.monotonic() - self._last_step)
        self._epoch = self._gauge("pagoda:worker_epoch", "The session's epoch, 0 without one.", labels)
        self._graphs = self._gauge(
            "pagoda:worker_graphs_pending",
            "Graphs that are still to be captured when nothing else is to do.",
            labels,
        )
        self._last_sent = self._last_step = time.monotonic()

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, text, LABELS, registry=self.registry).labels(*labels)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(name, text, LABELS, registry=self.registry).labels(*labels)

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
