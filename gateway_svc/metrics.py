"""The gateway's metrics: what a client sees of a request. Names and buckets are vLLM's behind the colon.

Latency between tokens is counted in plain integers for each token and handed to Prometheus now and then: an
observation costs microseconds there, more when it is shared with other processes.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from pagoda.exposition import Aliased

_FINE = [0.00025, 0.0005, 0.001, 0.0025, 0.005]
_REQUEST = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]
_FIRST_TOKEN = [0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75]
_FIRST_TOKEN += [1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560]
_TOKEN = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
_COUNTS = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]
_SAMPLES = [1, 2, 5, 10, 20]
_LABELS = ("model_name", "engine")
_ENGINE = "gateway"  # the `engine` label, as the scheduler has it for what belongs to no worker group


class BatchedHistogram:
    """A histogram that is cheap to add to, and is flushed before it is read."""

    def __init__(self, child: Histogram, buckets: Sequence[float]) -> None:
        self._child = child
        self._bounds = list(buckets)
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Observe `value`, `count` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def flush(self) -> None:
        """Hand over what has been added; the library has no call for many observations, hence its parts."""
        for bucket, count in zip(self._child._buckets, self._counts, strict=True):
            if count:
                bucket.inc(count)
        self._child._sum.inc(self._sum)
        self._counts = [0] * len(self._counts)
        self._sum = 0.0


class Metrics:
    """Every metric that the gateway owns."""

    def __init__(
        self, model_name: str, registry: CollectorRegistry | None = None, alias: str = "none"
    ) -> None:
        self.registry = registry or CollectorRegistry()
        self._alias = alias
        self._labels = (model_name, _ENGINE)
        ProcessCollector(registry=self.registry)
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST_TOKEN
        )
        token_buckets = _FINE + _TOKEN
        self.inter_token_latency = BatchedHistogram(
            self._histogram("inter_token_latency_seconds", "Between one token and the next.", token_buckets),
            token_buckets,
        )
        self.time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds", "A sample's mean time for a token.", token_buckets
        )
        self.e2e_latency = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its last token.", _REQUEST
        )
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of the prompt.", _COUNTS)
        self.generation_tokens = self._histogram("request_generation_tokens", "Output tokens.", _COUNTS)
        self.params_n = self._histogram("request_params_n", "Samples asked for.", _SAMPLES)
        self.params_max_tokens = self._histogram("request_params_max_tokens", "max_tokens as asked.", _COUNTS)
        self._success = self._counter("request_success", "Samples that ended.", "finished_reason")
        self._cancelled = self._counter("requests_cancelled", "Requests whose client left before the end.")
        self._failed = self._counter("requests_failed", "Requests that ended with an error.", "code")
        self._rejections = self._counter("admission_rejections", "Requests not admitted.", "reason")
        # A counter that begins with its first event hides that event from every rate.
        self._cancelled.labels(*self._labels)
        for code in ("internal", "unavailable"):
            self._failed.labels(*self._labels, code)
        for reason in ("invalid", "queue_full", "unavailable"):
            self._rejections.labels(*self._labels, reason)
        self._http = Counter(
            "pagoda:http_requests",
            "HTTP requests by route and status.",
            ["route", "method", "status"],
            registry=self.registry,
        )

    def success(self, reason: str) -> None:
        """A sample ended."""
        self._success.labels(*self._labels, reason).inc()

    def cancelled(self) -> None:
        """A client left."""
        self._cancelled.labels(*self._labels).inc()

    def failed(self, code: str) -> None:
        """A request ended with an error after it was admitted."""
        self._failed.labels(*self._labels, code).inc()

    def rejected(self, reason: str) -> None:
        """A request was not admitted."""
        self._rejections.labels(*self._labels, reason).inc()

    def http(self, route: str, method: str, status: int) -> None:
        """An HTTP response began."""
        self._http.labels(route, method, str(status)).inc()

    def flush(self) -> None:
        """Hand over what is counted on the token path; a timer does, so that no scrape sees stale numbers."""
        self.inter_token_latency.flush()

    def expose(self) -> bytes:
        """The text that Prometheus reads; of all processes where there are several."""
        self.flush()
        return expose(self.registry, self._alias)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        metric = Histogram(f"pagoda:{name}", text, _LABELS, buckets=buckets, registry=self.registry)
        return metric.labels(*self._labels)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"pagoda:{name}", text, [*_LABELS, *labels], registry=self.registry)


def expose(registry: CollectorRegistry | None = None, alias: str = "none") -> bytes:
    """The text that Prometheus reads, gathered from the files of all processes where they share any.

    With the alias "vllm", under vLLM's names too, but for what the scheduler gives under them.
    """
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
    if registry is None:
        return b""
    return generate_latest(Aliased(registry, ("request_success",)) if alias == "vllm" else registry)
