"""What the live services expose on /metrics: names, labels and buckets that dashboards know, true counts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

import pagoda
from pagoda.models import EMBEDDED_MODEL
from tests.support import figures
from tests.support.cluster import Cluster, cluster
from tests.support.cluster_sched import wait_until
from tests.support.metrics import samples, scrape, total, worker_url
from tests.support.raw_http import post

pytestmark = pytest.mark.timeout(600)

FINE = (0.00025, 0.0005, 0.001, 0.0025, 0.005)
LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
    *(160, 640, 2560),
)
TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
SAMPLES = (1, 2, 5, 10, 20)
ITERATION = (1, *(2**i for i in range(3, 15)))
SCHEDULER, GATEWAY, WORKER = "scheduler", "gateway", "worker"

# Where a metric is, its name behind "pagoda:" as the library that reads it says it, its kind and its labels
# beside model_name.
PLAIN: list[tuple[str, str, str, set[str]]] = [
    (SCHEDULER, "num_requests_running", "gauge", {"engine"}),
    (SCHEDULER, "num_requests_waiting", "gauge", {"engine"}),
    (SCHEDULER, "num_requests_waiting_by_reason", "gauge", {"engine", "reason"}),
    (SCHEDULER, "kv_cache_usage_perc", "gauge", {"engine"}),
    (SCHEDULER, "kv_waste_ratio", "gauge", {"engine"}),
    (SCHEDULER, "kv_sharing_ratio", "gauge", {"engine"}),
    (SCHEDULER, "kv_blocks", "gauge", {"engine", "state"}),
    (SCHEDULER, "kv_shared_blocks", "gauge", {"engine"}),
    (SCHEDULER, "kv_lookahead_blocks", "gauge", {"engine"}),
    (SCHEDULER, "last_progress_timestamp_seconds", "gauge", {"engine"}),
    (SCHEDULER, "worker_last_heard_seconds", "gauge", {"engine"}),
    (SCHEDULER, "cache_config_info", "gauge", {"engine", "block_size", "num_gpu_blocks"}),
    (SCHEDULER, "num_preemptions", "counter", {"engine"}),
    (SCHEDULER, "preemptions", "counter", {"engine", "mode"}),
    (SCHEDULER, "recomputed_tokens", "counter", {"engine"}),
    (SCHEDULER, "recompute_seconds", "counter", {"engine"}),
    (SCHEDULER, "swapped_tokens", "counter", {"engine"}),
    (SCHEDULER, "swapped_blocks", "counter", {"engine", "direction"}),
    (SCHEDULER, "swapped_bytes", "counter", {"engine", "direction"}),
    (SCHEDULER, "swap_seconds", "counter", {"engine"}),
    (SCHEDULER, "num_host_blocks_used", "gauge", {"engine"}),
    (SCHEDULER, "prompt_tokens", "counter", {"engine"}),
    (SCHEDULER, "prompt_tokens_cached", "counter", {"engine"}),
    (SCHEDULER, "generation_tokens", "counter", {"engine"}),
    (SCHEDULER, "request_success", "counter", {"engine", "finished_reason"}),
    (SCHEDULER, "admission_rejections", "counter", {"engine", "reason"}),
    (SCHEDULER, "prefix_cache_queries", "counter", {"engine"}),
    (SCHEDULER, "prefix_cache_hits", "counter", {"engine"}),
    (SCHEDULER, "requests_cancelled", "counter", {"engine"}),
    (SCHEDULER, "requests_aborted", "counter", {"engine"}),
    (SCHEDULER, "replayed_requests", "counter", {"engine"}),
    (SCHEDULER, "replayed_tokens", "counter", {"engine"}),
    (GATEWAY, "request_success", "counter", {"engine", "finished_reason"}),
    (GATEWAY, "requests_cancelled", "counter", {"engine"}),
    (GATEWAY, "admission_rejections", "counter", {"engine", "reason"}),
    (WORKER, "worker_heartbeat_age_seconds", "gauge", {"engine"}),
    (WORKER, "worker_steps", "counter", {"engine"}),
    (WORKER, "worker_generated_tokens", "counter", {"engine"}),
]
HISTOGRAMS: list[tuple[str, str, set[str], tuple[float, ...]]] = [
    (GATEWAY, "time_to_first_token_seconds", {"engine"}, FIRST_TOKEN),
    (GATEWAY, "inter_token_latency_seconds", {"engine"}, FINE + TOKEN),
    (GATEWAY, "request_time_per_output_token_seconds", {"engine"}, FINE + TOKEN),
    (GATEWAY, "e2e_request_latency_seconds", {"engine"}, LATENCY),
    (GATEWAY, "request_prompt_tokens", {"engine"}, COUNTS),
    (GATEWAY, "request_generation_tokens", {"engine"}, COUNTS),
    (GATEWAY, "request_params_n", {"engine"}, SAMPLES),
    (GATEWAY, "request_params_max_tokens", {"engine"}, COUNTS),
    (SCHEDULER, "request_queue_time_seconds", {"engine"}, LATENCY),
    (SCHEDULER, "request_inference_time_seconds", {"engine"}, LATENCY),
    (SCHEDULER, "request_prefill_time_seconds", {"engine"}, LATENCY),
    (SCHEDULER, "request_decode_time_seconds", {"engine"}, LATENCY),
    (SCHEDULER, "iteration_tokens_total", {"engine"}, ITERATION),
    (SCHEDULER, "request_num_preemptions", {"engine"}, ()),
    (SCHEDULER, "step_seconds", {"engine", "part"}, ()),
    (SCHEDULER, "device_idle_seconds", {"engine"}, ()),
    (WORKER, "worker_step_seconds", {"engine", "part"}, ()),
    (WORKER, "worker_idle_seconds", {"engine"}, ()),
]

BLOCK = 16
LONG = 3 * BLOCK + 5  # tokens of a prompt of which three blocks can be found again


@dataclass
class Sent:
    """What the clients of this test asked for and were told."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    max_tokens: int = 0

    def add(self, completion: pagoda.Completion, max_tokens: int) -> None:
        """One more answer."""
        assert completion.usage is not None
        self.requests += 1
        self.prompt_tokens += completion.usage.prompt_tokens
        self.cached_tokens += completion.usage.cached_tokens
        self.output_tokens += completion.usage.completion_tokens
        self.max_tokens += max_tokens


@dataclass
class Seen:
    """What was sent, and what each service then said of it."""

    sent: Sent
    text: dict[str, str]
    num_preemptions: int

    def families(self, service: str) -> dict[str, Metric]:
        """Its metrics by name."""
        return {family.name: family for family in text_string_to_metric_families(self.text[service])}

    def total(self, service: str, name: str, **labels: str) -> float:
        """A sum over samples; the name without its prefix."""
        return total(self.text[service], f"pagoda:{name}", **labels)


def send(running: Cluster) -> Sent:
    """Requests of every kind, whose tokens are known."""
    sent = Sent()
    prompt = list(range(1000, 1000 + LONG))
    options: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
    with pagoda.Client(running.grpc) as client:
        for _ in range(2):  # the second one finds the first one's blocks
            sent.add(client.generate(prompt, max_tokens=5, **options), 5)
        assert sent.cached_tokens == 3 * BLOCK
        sent.add(client.generate([7, 8, 9], max_tokens=4, n=3, **options), 4)
        # One that ends by a stop string, which is the gateway's business, and one by a stop id.
        text = client.generate("One two three", max_tokens=6, **options)
        sent.add(text, 6)
        assert len(text.token_ids) == 6
        # The stop has to reach the scheduler before the request ends by its length, hence many tokens.
        stopped = client.generate("One two three", max_tokens=300, stop=text.text[2:5], **options)
        sent.add(stopped, 300)
        assert stopped.finish_reason == "stop"
        by_id = client.generate("One two three", max_tokens=6, stop_token_ids=[text.token_ids[1]], **options)
        sent.add(by_id, 6)
        assert by_id.finish_reason == "stop" and len(by_id.token_ids) <= 2
        # More than the cache holds at once: some have to give way.
        many = client.batch(
            [list(range(i, i + 2 * BLOCK)) for i in range(2000, 2800, 100)], max_tokens=3 * BLOCK, **options
        )
        for completion in many:
            sent.add(completion, 3 * BLOCK)
        for wrong in ({"temperature": -1.0}, {"max_tokens": 0}, {"n": 0}):
            with pytest.raises(pagoda.InvalidRequest):
                client.generate("x", **wrong)
    return sent


async def leave(running: Cluster) -> None:
    """A client that goes when it has seen some tokens."""
    body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    async with post(running.url, body) as request:
        await request.wait_for(b"data: ", 3)


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    """The services after these requests."""
    with cluster(
        dtype="bfloat16",
        scheduler_args=("--horizon-ms", "0"),
        worker_args=("--num-blocks", "30", "--block-size", str(BLOCK), "--max-model-len", "448"),
        gateway_args=(),
    ) as running:
        sent = send(running)
        asyncio.run(leave(running))
        running.assert_idle()
        # Steps that were on their way when the client left are still to be answered.
        wait_until(lambda: not running.snapshot().workers[0].num_inflight, 60, "every step is answered")
        text = {
            GATEWAY: scrape(running.metrics),
            SCHEDULER: scrape(f"http://{running.scheduler.metrics_address}/metrics"),
            WORKER: scrape(worker_url(running.workers["w0"])),
        }
        # The API's own port shows the same as the port for scrapes.
        assert set(text_names(scrape(f"{running.url}/metrics"))) >= set(text_names(text[GATEWAY]))
        yield Seen(sent, text, running.snapshot().num_preemptions)


def text_names(text: str) -> list[str]:
    """The names of all metrics."""
    return [family.name for family in text_string_to_metric_families(text)]


@pytest.mark.parametrize(("service", "name", "kind", "labels"), PLAIN, ids=lambda value: str(value))
def test_the_metric_is_there(seen: Seen, service: str, name: str, kind: str, labels: set[str]) -> None:
    family = seen.families(service)[f"pagoda:{name}"]
    assert family.type == kind
    for sample in family.samples:
        assert sample.labels.keys() >= {"model_name"} | labels
        assert sample.labels["model_name"] == EMBEDDED_MODEL


@pytest.mark.parametrize(
    ("service", "name", "labels", "buckets"), HISTOGRAMS, ids=lambda value: str(value)[:40]
)
def test_the_histogram_is_there(
    seen: Seen, service: str, name: str, labels: set[str], buckets: tuple[float, ...]
) -> None:
    family = seen.families(service)[f"pagoda:{name}"]
    assert family.type == "histogram"
    bounds = [s for s in family.samples if s.name.endswith("_bucket")]
    assert {float(s.labels["le"]) for s in bounds} >= set(buckets)
    assert all(s.labels.keys() >= {"model_name"} | labels for s in bounds)
    assert seen.total(service, f"{name}_count") > 0


def test_the_scheduler_counts_what_was_sent(seen: Seen) -> None:
    sent = seen.sent
    left = 1  # the client that went is counted as it came, one prompt token for "Once"
    assert seen.total(SCHEDULER, "prompt_tokens_total") == sent.prompt_tokens + left
    assert seen.total(SCHEDULER, "prompt_tokens_cached_total") == sent.cached_tokens
    assert seen.total(SCHEDULER, "prefix_cache_queries_total") == sent.prompt_tokens + left
    assert seen.total(SCHEDULER, "prefix_cache_hits_total") == sent.cached_tokens
    # A client that left and a stop string cost tokens that nobody was shown.
    assert seen.total(SCHEDULER, "generation_tokens_total") >= sent.output_tokens + 3
    reasons = {
        reason: seen.total(SCHEDULER, "request_success_total", finished_reason=reason)
        for reason in ("length", "stop", "cancelled", "error")
    }
    assert reasons == {"length": sent.requests - 2, "stop": 2, "cancelled": 1, "error": 0}
    assert seen.num_preemptions > 0
    assert seen.total(SCHEDULER, "num_preemptions_total") == seen.num_preemptions
    assert seen.total(SCHEDULER, "request_num_preemptions_sum") == seen.num_preemptions
    assert seen.total(SCHEDULER, "preemptions_total") == seen.num_preemptions
    # A CPU copies a block much faster than it computes one, so that what was computed goes to host memory.
    assert (
        seen.total(SCHEDULER, "swapped_tokens_total") > 0 and seen.total(SCHEDULER, "swap_seconds_total") > 0
    )
    out, back = (seen.total(SCHEDULER, "swapped_blocks_total", direction=d) for d in ("out", "in"))
    assert out >= back > 0 == seen.total(SCHEDULER, "num_host_blocks_used")
    assert seen.total(SCHEDULER, "requests_cancelled_total") == 1
    assert seen.total(SCHEDULER, "admission_rejections_total", reason="invalid_request") == 2
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert seen.total(SCHEDULER, name) == 0
    (config,) = samples(seen.text[SCHEDULER], "pagoda:cache_config_info")
    assert (config.labels["block_size"], config.labels["num_gpu_blocks"]) == (str(BLOCK), "30")


def test_the_gateway_counts_what_its_clients_saw(seen: Seen) -> None:
    sent = seen.sent
    # What had begun when its client left is observed as far as it came.
    num_begun = sent.requests + 1
    assert seen.total(GATEWAY, "time_to_first_token_seconds_count") == num_begun
    assert seen.total(GATEWAY, "e2e_request_latency_seconds_count") == sent.requests
    assert seen.total(GATEWAY, "request_prompt_tokens_count") == num_begun
    assert seen.total(GATEWAY, "request_prompt_tokens_sum") == sent.prompt_tokens + 1
    assert seen.total(GATEWAY, "request_generation_tokens_sum") >= sent.output_tokens + 3
    assert seen.total(GATEWAY, "request_params_n_sum") == num_begun + 2
    assert seen.total(GATEWAY, "request_params_max_tokens_sum") == sent.max_tokens + 400
    samples_of_three = 2  # beside its first one
    assert seen.total(GATEWAY, "request_success_total") == sent.requests + samples_of_three
    assert seen.total(GATEWAY, "request_success_total", finished_reason="stop") == 2
    assert seen.total(GATEWAY, "requests_cancelled_total") == 1
    assert seen.total(GATEWAY, "admission_rejections_total") == 3


def test_scheduler_and_worker_agree(seen: Seen) -> None:
    """The worker draws what the scheduler counts, and what it drew for rows that had been stopped already."""
    drawn = seen.total(WORKER, "worker_generated_tokens_total")
    counted = seen.total(SCHEDULER, "generation_tokens_total")
    assert counted <= drawn
    steps = seen.total(WORKER, "worker_steps_total")
    assert steps == seen.total(SCHEDULER, "step_seconds_count", part="gpu")
    assert steps == seen.total(SCHEDULER, "iteration_tokens_total_count")
    figures.record(
        "metrics",
        metrics=len(PLAIN) + len(HISTOGRAMS),
        requests=seen.sent.requests,
        prompt_tokens=seen.sent.prompt_tokens,
        cached_tokens=seen.sent.cached_tokens,
        generation_tokens=counted,
        drawn_tokens=drawn,
        preemptions=seen.num_preemptions,
        steps=steps,
    )
