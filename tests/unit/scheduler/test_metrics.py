"""What /metrics says, read as Prometheus reads it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import urllib.error
from collections.abc import AsyncIterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from scheduler_svc.__main__ import Service
from scheduler_svc.config import SchedulerSettings
from scheduler_svc.metrics import MetricsServer
from tests.support.metrics import scrape
from tests.support.session_client import request
from tests.unit.scheduler.conftest import LocalScheduler, until

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def fetch(port: int, token: str = "") -> Samples:
    """All samples of a scrape."""
    families = text_string_to_metric_families(scrape(f"http://127.0.0.1:{port}/metrics", token))
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    """The one sample of this name that has these labels."""
    found = [v for (n, own), v in samples.items() if n == f"pagoda:{name}" and own >= set(labels.items())]
    assert len(found) == 1, (name, labels, found)
    return found[0]


@pytest.fixture
async def metrics_port(local: LocalScheduler) -> AsyncIterator[int]:
    """Where the scheduler's metrics are served."""
    service = Service.__new__(Service)
    service._core, service._engine, service._hub = local.engine.core, local.engine, local.hub
    service._settings = SchedulerSettings()
    local.metrics.read = service._read
    server = MetricsServer(local.metrics, SchedulerSettings(metrics_port=0))
    yield server.port
    await server.close()


async def test_counters_are_those_of_the_requests(local: LocalScheduler, metrics_port: int) -> None:
    await local.attach()
    async with local.session() as client:
        prompt = [1, 5, 7] * 5
        await client.results(await client.submit(request(prompt, max_tokens=20, ignore_eos=True, n=2)))
        await client.results(await client.submit(request(prompt, max_tokens=5, ignore_eos=True)))
        (long,) = await client.submit(request(prompt, max_tokens=400, ignore_eos=True))
        (bad,) = await client.submit(request([]))
        await client.results([bad])
        await until(lambda: client.received[long].tokens)
        samples = await asyncio.to_thread(fetch, metrics_port)
        assert value(samples, "num_requests_running", model_name="simulated", engine="scheduler") == 1
        assert value(samples, "kv_cache_usage_perc", engine="w0") > 0
        states = [value(samples, "kv_blocks", engine="w0", state=s) for s in ("free", "cached", "held")]
        assert sum(states) == 512 and states[-1] > 0
        assert value(samples, "kv_shared_blocks", engine="w0") == 0, "one request is on its own"
        assert value(samples, "kv_lookahead_blocks", engine="w0") <= states[-1]
        await client.stop(long)
        await until(lambda: not local.engine.core.groups)
    samples = await asyncio.to_thread(fetch, metrics_port)
    assert value(samples, "num_requests_running") == 0
    assert value(samples, "kv_cache_usage_perc", engine="w0") == 0
    assert value(samples, "prompt_tokens_total") == 45
    assert value(samples, "prompt_tokens_cached_total") == 24, "three full blocks, twice"
    assert value(samples, "prefix_cache_queries_total") == 45
    assert value(samples, "prefix_cache_hits_total") == 24
    assert value(samples, "generation_tokens_total") >= 45
    assert value(samples, "request_success_total", finished_reason="length") == 2
    assert value(samples, "requests_cancelled_total") == 1
    assert value(samples, "admission_rejections_total", reason="invalid_request") == 1
    for part in ("queue", "prefill", "decode", "inference"):
        assert value(samples, f"request_{part}_time_seconds_count") == 3
    assert value(samples, "cache_config_info", block_size="4", num_gpu_blocks="512") == 1
    assert value(samples, "last_progress_timestamp_seconds") > 1.7e9
    assert 0 <= value(samples, "worker_last_heard_seconds", engine="w0") < 5
    for part in ("plan", "wire", "gpu", "output"):
        assert value(samples, "step_seconds_count", part=part) > 0


async def test_waiting_requests_are_counted_by_what_they_wait_for(
    local: LocalScheduler, metrics_port: int
) -> None:
    worker = await local.attach(slots=1)
    async with local.session() as client:
        await client.submit(*(request([1, 2], max_tokens=500, ignore_eos=True) for _ in range(3)))
        await until(lambda: local.engine.core.num_running == 1)
        samples = await asyncio.to_thread(fetch, metrics_port)
        assert value(samples, "num_requests_waiting") == 2
        assert value(samples, "num_requests_waiting_by_reason", reason="capacity") == 2
        assert value(samples, "num_requests_waiting_by_reason", reason="deferred") == 0
        await worker.stop()
        await until(lambda: not local.engine.core.workers)
        samples = await asyncio.to_thread(fetch, metrics_port)
        assert value(samples, "num_requests_waiting_by_reason", reason="deferred") == 3
        assert value(samples, "replayed_requests_total") == 1
        assert value(samples, "num_workers") == 0


async def test_a_stuck_loop_serves_the_last_reading(
    local: LocalScheduler, metrics_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler_svc.metrics.SCRAPE_TIMEOUT_S", 0.05)
    await local.attach()
    local.metrics.refresh()
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        scraped = threads.submit(fetch, metrics_port)
        # Blocks this loop, and so the scheduler's: nothing can run on it until the scrape is answered.
        samples = scraped.result(20)
    assert value(samples, "num_workers") == 1


async def test_a_token_guards_metrics(local: LocalScheduler) -> None:
    server = MetricsServer(local.metrics, SchedulerSettings(metrics_port=0, token="secret"))
    for wrong in ("", "Secret"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            await asyncio.to_thread(fetch, server.port, wrong)
        assert refused.value.code == 401
    assert await asyncio.to_thread(fetch, server.port, "secret")
    await server.close()


async def test_aliases_are_what_vllm_has(local: LocalScheduler, metrics_port: int) -> None:
    """The same numbers; groups are numbered; refusals are the gateway's to give under vLLM's name."""
    for group in ("left", "right"):
        await local.attach(group=group)
    async with local.session() as client:
        (long,) = await client.submit(request([1, 5, 7], max_tokens=400, ignore_eos=True))
        (bad,) = await client.submit(request([]))
        await client.results([bad])
        await until(lambda: client.received[long].tokens)
        await client.stop(long)
        await until(lambda: not local.engine.core.groups)
    server = MetricsServer(local.metrics, SchedulerSettings(metrics_port=0, metrics_alias="vllm"))
    samples = await asyncio.to_thread(fetch, server.port)
    await server.close()
    ours = {key: v for key, v in samples.items() if key[0].startswith("pagoda:")}
    assert {name for name, _ in await asyncio.to_thread(fetch, metrics_port)} >= {name for name, _ in ours}
    alias = {(name, labels): v for (name, labels), v in samples.items() if name.startswith("vllm:")}
    engines = {(name, dict(labels)["engine"]) for name, labels in alias}
    assert {e for n, e in engines if n == "vllm:kv_cache_usage_perc"} == {"0", "1"}
    assert {e for n, e in engines if n == "vllm:gpu_cache_usage_perc"} == {"0", "1"}
    assert {e for n, e in engines if n == "vllm:num_requests_running"} == {"0"}
    assert not any(name.startswith("vllm:admission_rejections") for name, _ in alias)
    ended = frozenset({"model_name": "simulated", "engine": "0", "finished_reason": "abort"}.items())
    assert alias["vllm:request_success_total", ended] == 1
    assert alias["vllm:prompt_tokens_total", ended - {("finished_reason", "abort")}] == 3
