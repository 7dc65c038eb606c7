"""How services show their metrics to Prometheus: a server, and `--metrics-alias vllm`.

The alias is a tier's metrics once more, under the names that dashboards made for vLLM ask for. What stands
after the colon is vLLM's already, so only three things differ. The prefix. Names that two tiers use: vLLM is
one process, so one tier gives each. And the label `engine`: vLLM numbers its engines and labels everything
with the number, so that a dashboard filters all panels by one of them. Here the first worker group is "0", as
is what belongs to no group; other groups are counted on in the order in which they came.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Metric, disable_created_metrics
from prometheus_client.exposition import ThreadingWSGIServer, make_wsgi_app
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

App = Callable[[dict[str, Any], Any], Iterable[bytes]]

disable_created_metrics()  # a series each that nobody reads

OURS, VLLM = "pagoda:", "vllm:"
NO_GROUP = frozenset({"scheduler", "gateway"})  # values of `engine` that name a tier

# vLLM's names that dashboards, autoscalers and the Gateway API Inference Extension read.
NAMES = frozenset(
    (
        "num_requests_running",
        "num_requests_waiting",
        "num_requests_waiting_by_reason",
        "kv_cache_usage_perc",
        "cache_config",
        "num_preemptions",
        "prompt_tokens",
        "prompt_tokens_cached",
        "generation_tokens",
        "request_success",
        "admission_rejections",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_inference_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_params_n",
        "request_params_max_tokens",
        "iteration_tokens_total",
        "request_num_preemptions",
    )
)
# What older dashboards call them.
FORMER = {
    "kv_cache_usage_perc": "gpu_cache_usage_perc",
    "inter_token_latency_seconds": "time_per_output_token_seconds",
}
FINISHED = {"cancelled": "abort"}  # values of `finished_reason` that vLLM words otherwise


class Aliased(CollectorRegistry):
    """What `registry` holds, and each metric that vLLM has too under vLLM's name.

    `elsewhere` are names, without prefix, that another tier gives under vLLM's name.
    """

    def __init__(self, registry: CollectorRegistry, elsewhere: Collection[str] = ()) -> None:
        super().__init__()
        self._registry = registry
        self._names = NAMES - set(elsewhere)
        self._engines: dict[str, str] = {}

    def collect(self) -> Iterator[Metric]:
        """Every metric, those under vLLM's names behind their own."""
        for metric in self._registry.collect():
            yield metric
            name = metric.name.removeprefix(OURS)
            if metric.name.startswith(OURS) and name in self._names:
                yield self._renamed(metric, name, name)
                if name in FORMER:
                    yield self._renamed(metric, name, FORMER[name])

    def register(self, collector: Collector) -> None:
        """Register with the registry that this one wraps."""
        self._registry.register(collector)

    def _renamed(self, metric: Metric, old: str, new: str) -> Metric:
        renamed = Metric(VLLM + new, metric.documentation, metric.type)
        renamed.samples = [self._sample(sample, old, new) for sample in metric.samples]
        return renamed

    def _sample(self, sample: Sample, old: str, new: str) -> Sample:
        labels = {**sample.labels, "engine": self._engine(sample.labels.get("engine", ""))}
        if "finished_reason" in labels:
            labels["finished_reason"] = FINISHED.get(labels["finished_reason"], labels["finished_reason"])
        name = VLLM + new + sample.name.removeprefix(OURS + old)
        return sample._replace(name=name, labels=labels)

    def _engine(self, group: str) -> str:
        if not group or group in NO_GROUP:
            return "0"
        return self._engines.setdefault(group, str(len(self._engines)))


def plain_app(registry: CollectorRegistry) -> App:
    """A WSGI application that answers with Prometheus's plain text, whatever else a scraper would take.

    As OpenMetrics, which every Prometheus asks for first, the library writes `_` for the colons in our names.
    """
    app: Any = make_wsgi_app(registry)

    def plain(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        environ.pop("HTTP_ACCEPT", None)
        answer: Iterable[bytes] = app(environ, start_response)
        return answer

    return plain


class _QuietHandler(WSGIRequestHandler):
    """Scrapes are not worth a log line each."""

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


def serve(app: App, host: str, port: int) -> WSGIServer:
    """Serve `app` from a thread, until the server is shut down and closed; port 0 takes any.

    Raises:
        OSError: the port cannot be bound.
    """
    server = make_server(host, port, app, ThreadingWSGIServer, _QuietHandler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
