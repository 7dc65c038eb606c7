"""The scheduler's metrics: vLLM's names after the colon, and a few that users of every engine ask for.

Counters and gauges are read from the core when they are scraped, on the engine's loop, so that an idle
engine shows nothing stale and a step pays nothing for them. Should the loop be stuck, the last reading is
served, and `last_progress_timestamp_seconds` tells. Only histograms are fed as things happen.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from pagoda.exposition import OURS, Aliased, plain_app, serve
from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc.config import SchedulerSettings
from scheduler_svc.core.events import Plan, RequestEnd

LABELS = ("model_name", "engine")
ENGINE = "scheduler"  # the `engine` label of what belongs to no one worker group
SCRAPE_TIMEOUT_S = 1.0

_FINE = (0.00025, 0.0005, 0.001, 0.0025, 0.005)
_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_STEP = (0.00005, 0.0001, *_FINE, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ITERATION = (1, *(8 << i for i in range(12)))
_PREEMPTIONS = (0, 1, 2, 3, 5, 10, 20, 50)


class Reading(msgspec.Struct):
    """The gauges and counters at one moment. `counters` are by metric name, `swaps` by unit and direction."""

    state: pb.Snapshot = msgspec.field(default_factory=pb.Snapshot)
    heard: dict[str, float] = {}  # when, of the monotonic clock, by worker group
    prefix_cache: bool = True
    counters: dict[str, Any] = {}
    preemptions: dict[str, int] = {}
    swaps: dict[str, dict[str, int]] = {}
    finished: dict[str, int] = {}


_COUNTERS = {
    "num_preemptions": "Requests preempted.",
    "recomputed_tokens": "Tokens whose KV was computed again after a preemption or a worker's death.",
    "recompute_seconds": "Device time of that, by the measured rate of long prompts.",
    "swapped_tokens": "Tokens whose KV went to host memory when their requests were preempted.",
    "swap_seconds": "Device time of copies to host memory and back.",
    "prompt_tokens": "Prompt tokens of admitted requests.",
    "prompt_tokens_cached": "Prompt tokens that the prefix cache had.",
    "generation_tokens": "Tokens generated.",
    "prefix_cache_queries": "Tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Tokens found in the prefix cache.",
    "replayed_requests": "Requests that went back to the queue when their worker died.",
    "replayed_tokens": "Output tokens that such requests had already.",
    "requests_cancelled": "Requests ended by their client or by Abort.",
    "requests_aborted": "Requests or samples ended by Abort.",
}

_HISTOGRAMS = (
    ("request_queue_time_seconds", "From arrival to admission.", _FINE + _LATENCY),
    ("request_prefill_time_seconds", "From admission to the first token.", _FINE + _LATENCY),
    ("request_decode_time_seconds", "From the first token to the last.", _FINE + _LATENCY),
    ("request_inference_time_seconds", "From admission to the last token.", _FINE + _LATENCY),
    ("request_num_preemptions", "Preemptions of a request.", _PREEMPTIONS),
    ("iteration_tokens_total", "Tokens that go into one iteration.", _ITERATION),
    ("device_idle_seconds", "How long a worker's device waited for a step.", _STEP),
)

# Gauges of a worker's blocks, by the field of its view.
_OF_BLOCKS = (
    ("kv_waste_ratio", "Allocated minus used token slots, over allocated.", "kv_waste_ratio"),
    ("kv_sharing_ratio", "Blocks saved by sharing over blocks referenced.", "kv_sharing_ratio"),
    ("kv_shared_blocks", "Held blocks that are in several block tables.", "num_shared_blocks"),
    ("kv_lookahead_blocks", "Held blocks for tokens that are not known yet.", "num_lookahead_blocks"),
    ("num_host_blocks_used", "Blocks of host memory that hold KV.", "num_host_blocks_used"),
)

_Family = CounterMetricFamily | GaugeMetricFamily | InfoMetricFamily
_Rows = Iterable[tuple[Any, ...]]


class Metrics:
    """All metrics of this process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.read: Callable[[], Reading] = Reading
        self.last_reading = Reading()
        self._loop = asyncio.get_running_loop()
        self._model = ""
        # Known from the start: a counter that begins with its first event hides that event from every rate.
        self._rejections = dict.fromkeys(("invalid_request", "queue_full", "no_worker"), 0)
        self._last_progress = time.time()
        ProcessCollector(registry=self.registry)
        self.registry.register(self)
        self._histograms = {row[0]: self._histogram(*row) for row in _HISTOGRAMS}
        text = "Where a step's time goes: plan, the part of the wire that is not hidden, gpu, output."
        self._step = self._histogram("step_seconds", text, _STEP, "part")
        self.set_model("")

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(OURS + name, text, [*LABELS, *labels], buckets=buckets, registry=self.registry)

    def set_model(self, name: str) -> None:
        """Name the model in the labels. Children are bound here, so that no step looks up a label."""
        if name != self._model:
            for histogram in (*self._histograms.values(), self._step):
                histogram.clear()
        self._model = name
        self._observe = {h: each.labels(name, ENGINE).observe for h, each in self._histograms.items()}
        self._plan_part, self._wire_part, self._gpu_part, self._output_part = (
            self._step.labels(name, ENGINE, part).observe for part in ("plan", "wire", "gpu", "output")
        )

    # -------------------------------------------------------------------------- as things happen

    def planned(self, plan: Plan) -> None:
        """A step was planned."""
        self._observe["iteration_tokens_total"](sum(plan.num_tokens) if plan.num_tokens else len(plan.slots))

    def turn(self, plan_s: float, output_s: float) -> None:
        """The engine made a turn: time until the plans were out, and then until the outputs were."""
        self._plan_part(plan_s)
        self._output_part(output_s)

    def step(self, wire_s: float, gpu_s: float, idle_s: float) -> None:
        """A worker answered a step."""
        self._wire_part(wire_s)
        self._gpu_part(gpu_s)
        self._observe["device_idle_seconds"](idle_s)

    def progress(self) -> None:
        """A result was applied."""
        self._last_progress = time.time()

    def rejected(self, reason: str) -> None:
        """A request was refused; `reason` is one of a fixed few."""
        self._rejections[reason] = self._rejections.get(reason, 0) + 1

    def request_ended(self, end: RequestEnd) -> None:
        """A request is over."""
        self._observe["request_num_preemptions"](end.num_preemptions)
        if end.first_scheduled is None:
            return
        self._observe["request_queue_time_seconds"](end.first_scheduled - end.arrived)
        if end.first_token is None:
            return
        self._observe["request_prefill_time_seconds"](end.first_token - end.first_scheduled)
        last = end.ended if end.last_token is None else end.last_token
        self._observe["request_decode_time_seconds"](last - end.first_token)
        self._observe["request_inference_time_seconds"](last - end.first_scheduled)

    # ------------------------------------------------------------------------- when they are read

    def refresh(self) -> None:
        """Take a reading; on the loop."""
        self.last_reading = self.read()

    async def _refresh(self) -> None:
        self.refresh()

    def collect(self) -> Iterator[Metric]:
        """Called by a scrape, in a thread of its own."""
        future = asyncio.run_coroutine_threadsafe(self._refresh(), self._loop)
        try:
            future.result(SCRAPE_TIMEOUT_S)
        except TimeoutError:
            future.cancel()  # the loop is stuck: the last reading has to do
        reading, progress = self.last_reading, self._last_progress
        for name, text in _COUNTERS.items():
            yield self._family(CounterMetricFamily, name, text, [(ENGINE, reading.counters.get(name, 0))])
        # The refusals are a copy, for the loop counts on.
        for name, what, label, counts in (
            ("request_success", "Requests", "finished_reason", reading.finished),
            ("admission_rejections", "Requests", "reason", dict(self._rejections)),
            *((f"swapped_{what}", f"Swapped {what}", "direction", c) for what, c in reading.swaps.items()),
            ("preemptions", "Preemptions", "mode", reading.preemptions),
        ):
            by_label = [(ENGINE, value, count) for value, count in counts.items()]
            yield self._family(CounterMetricFamily, name, f"{what} by {label}.", by_label, label)
        for name, text, number in (
            ("num_requests_running", "Requests that hold slots.", reading.state.num_running),
            ("num_requests_waiting", "Requests in the queue.", reading.state.num_waiting),
            ("last_progress_timestamp_seconds", "When a worker's result was last applied.", progress),
            ("num_workers", "Worker groups attached.", len(reading.state.workers)),
        ):
            yield self._family(GaugeMetricFamily, name, text, [(ENGINE, number)])
        # "deferred" waits for a worker to come back, "capacity" for room on one.
        deferred = 0 if reading.state.workers else reading.state.num_waiting
        waiting = [(ENGINE, "capacity", reading.state.num_waiting - deferred), (ENGINE, "deferred", deferred)]
        text = "Requests in the queue, by what they wait for."
        yield self._family(GaugeMetricFamily, "num_requests_waiting_by_reason", text, waiting, "reason")
        yield from self._of_workers(reading)

    def _of_workers(self, reading: Reading) -> Iterator[Metric]:
        now, workers = time.monotonic(), reading.state.workers
        usage = [(w.name, _held(w) / w.num_blocks) for w in workers]
        heard = [(w.name, now - reading.heard.get(w.name, 0.0)) for w in workers]
        yield self._family(GaugeMetricFamily, "kv_cache_usage_perc", "Share of the KV blocks held.", usage)
        for name, text, field in _OF_BLOCKS:
            rows = [(w.name, getattr(w, field)) for w in workers]
            yield self._family(GaugeMetricFamily, name, text, rows)
        text = "KV blocks; every block is in one of these states."
        by_state = [
            (w.name, *state)
            for w in workers
            for state in (("free", w.num_free_blocks), ("cached", w.num_cached_blocks), ("held", _held(w)))
        ]
        yield self._family(GaugeMetricFamily, "kv_blocks", text, by_state, "state")
        text = "Time since the worker was last heard."
        yield self._family(GaugeMetricFamily, "worker_last_heard_seconds", text, heard)
        caches = [(w.name, _cache_config(w, reading)) for w in workers]
        yield self._family(InfoMetricFamily, "cache_config", "The KV cache of a worker group.", caches)

    def _family(self, kind: type[_Family], name: str, text: str, rows: _Rows, *labels: str) -> Metric:
        """The metric with these rows: `engine`, what `labels` name further, and the value."""
        family = kind(OURS + name, text, labels=[*LABELS, *labels])
        for *own, value in rows:
            family.add_metric([self._model, *own], value)
        return family


def _held(worker: pb.WorkerSnapshot) -> int:
    """Blocks that are in some block table."""
    return worker.num_blocks - worker.num_free_blocks - worker.num_cached_blocks


def _cache_config(worker: pb.WorkerSnapshot, reading: Reading) -> dict[str, str]:
    return {
        "block_size": str(worker.block_size),
        "num_gpu_blocks": str(worker.num_blocks),
        "num_cpu_blocks": str(worker.num_host_blocks),
        "enable_prefix_caching": str(reading.prefix_cache),
        "max_slots": str(worker.max_slots),
    }


class MetricsServer:
    """Serves /metrics from a thread; asks for the bearer token when there is one."""

    def __init__(self, metrics: Metrics, settings: SchedulerSettings) -> None:
        host, port, token = settings.metrics_host, settings.metrics_port, settings.token
        # vLLM's name for refusals shows the gateway's count, which has its own refusals, too.
        aliased = settings.metrics_alias == "vllm"
        registry = Aliased(metrics.registry, ("admission_rejections",)) if aliased else metrics.registry
        self._app = plain_app(registry)
        self._expected = f"Bearer {token}".encode() if token else b""
        try:
            self._server = serve(self._serve, host, port)
        except OSError as error:
            raise OSError(f"--metrics-port: cannot bind {host}:{port}: {error.strerror}") from error
        self.port: int = self._server.server_port

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Any:
        given = str(environ.get("HTTP_AUTHORIZATION", "")).encode()
        if self._expected and not hmac.compare_digest(given, self._expected):
            start_response("401 Unauthorized", [("Content-Type", "text/plain")])
            return [b"a bearer token is needed\n"]
        return self._app(environ, start_response)

    async def close(self) -> None:
        """Stop serving."""
        await asyncio.to_thread(self._server.shutdown)
        self._server.server_close()
