"""What the gateway counts, and that it counts truly."""

from __future__ import annotations

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families

from gateway_svc.metrics import BatchedHistogram, Metrics
from gateway_svc.server import GatewayServer
from pagoda.v1 import scheduler_pb2 as pb
from tests.unit.gateway.conftest import ids_of
from tests.unit.gateway.fake_scheduler import FakeScheduler

BOUNDS = [0.001, 0.01, 0.1]


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name and labels, what is the same for all left out."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            own = sample.labels.items() - {("model_name", "test-model"), ("engine", "gateway")}
            labels = tuple(sorted(own))
            found[sample.name, labels] = sample.value
    return found


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.001, 0.0011, 0.05, 0.1, 7.0]), st.integers(1, 4)), max_size=30)
)
def test_batches_count_as_single_observations_do(values: list[tuple[float, int]]) -> None:
    registry = CollectorRegistry()
    one_by_one = Histogram("a", "x", buckets=BOUNDS, registry=registry)
    together = Histogram("b", "x", buckets=BOUNDS, registry=registry)
    batched = BatchedHistogram(together, BOUNDS)
    for i, (value, count) in enumerate(values):
        batched.add(value, count)
        for _ in range(count):
            one_by_one.observe(value)
        if i % 7 == 0:
            batched.flush()
    batched.flush()
    for suffix, labels in [
        ("_count", {}),
        *(("_bucket", {"le": le}) for le in ("0.001", "0.01", "0.1", "+Inf")),
    ]:
        assert registry.get_sample_value("a" + suffix, labels) == registry.get_sample_value(
            "b" + suffix, labels
        )
    difference = registry.get_sample_value("a_sum") - registry.get_sample_value("b_sum")  # type: ignore[operator]
    assert abs(difference) < 1e-9


async def test_a_request_is_counted_once(
    http: httpx.AsyncClient, server: GatewayServer, fake: FakeScheduler
) -> None:
    fake.script = lambda request, index: [*ids_of("some words here"), 2][: 4 - index]
    body = {"prompt": [5, 6, 7], "n": 2, "max_tokens": 20, "stream": True}
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    assert (await http.post("/v1/completions", json={"prompt": "x", "temperature": -1})).status_code == 400
    fake.refuse = lambda request: pb.RequestFailure(code=8, message="full")
    assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 429
    own_port = f"http://127.0.0.1:{server.metrics.port}/metrics" if server.metrics else ""
    assert (await http.get(own_port)).text.startswith("# HELP")
    got = samples((await http.get("/metrics")).text)
    for name, count in (
        ("time_to_first_token_seconds", 1),
        ("inter_token_latency_seconds", 5),  # 4 + 3 tokens, less the first of each sample
        ("request_time_per_output_token_seconds", 2),
        ("e2e_request_latency_seconds", 1),
    ):
        assert got[f"pagoda:{name}_count", ()] == count, name
    for name, total in (
        ("request_prompt_tokens", 3),
        ("request_generation_tokens", 7),
        ("request_params_n", 2),
        ("request_params_max_tokens", 20),
    ):
        assert (got[f"pagoda:{name}_count", ()], got[f"pagoda:{name}_sum", ()]) == (1, total), name
    assert got["pagoda:request_success_total", (("finished_reason", "stop"),)] == 1
    assert got["pagoda:request_success_total", (("finished_reason", "length"),)] == 1
    assert got["pagoda:admission_rejections_total", (("reason", "invalid"),)] == 1
    assert got["pagoda:admission_rejections_total", (("reason", "queue_full"),)] == 1
    assert got["pagoda:requests_cancelled_total", ()] == 0
    assert {labels: v for (name, labels), v in got.items() if name == "pagoda:requests_failed_total"} == {
        (("code", "internal"),): 0,
        (("code", "unavailable"),): 0,
    }
    for status, count in (("200", 1), ("400", 1), ("429", 1)):
        labels = (("method", "POST"), ("route", "/v1/completions"), ("status", status))
        assert got["pagoda:http_requests_total", labels] == count
    buckets = {
        dict(labels)["le"] for name, labels in got if name == "pagoda:inter_token_latency_seconds_bucket"
    }
    assert {"0.00025", "0.005", "0.01", "80.0", "+Inf"} <= buckets


async def test_routes_are_patterns_and_not_paths(http: httpx.AsyncClient) -> None:
    """Paths are the clients' choice: as labels they would be series without end."""
    for path in ("/v1/models/a", "/v1/models/b/c", "/wp-admin", "/x.php"):
        await http.get(path)
    got = samples((await http.get("/metrics")).text)
    routes = {dict(labels)["route"] for name, labels in got if name == "pagoda:http_requests_total"}
    assert routes == {"/v1/models/{model:path}", "other"}


async def test_tokens_of_a_failed_request_are_no_success(
    http: httpx.AsyncClient, fake: FakeScheduler
) -> None:
    fake.refuse = lambda request: pb.RequestFailure(code=13, message="poison")
    assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 500
    got = samples((await http.get("/metrics")).text)
    assert got["pagoda:requests_failed_total", (("code", "internal"),)] == 1
    assert not any(name == "pagoda:request_success_total" for name, _ in got)


async def test_tokenize_and_detokenize(http: httpx.AsyncClient) -> None:
    text = "Hello 世界 👋🏽!"
    answer = (await http.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    assert answer["tokens"] == ids_of(text) and answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 8192 and len(answer["token_strs"]) == answer["count"]
    back = (await http.post("/detokenize", json={"tokens": answer["tokens"]})).json()
    assert back == {"prompt": text}
    chat = {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}
    ids = (await http.post("/tokenize", json=chat)).json()["tokens"]
    text = (await http.post("/detokenize", json={"tokens": ids})).json()["prompt"]
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n")


async def test_tokenizer_info(http: httpx.AsyncClient) -> None:
    """What lm-eval's remote tokenizer asks first."""
    info = (await http.get("/tokenizer_info")).json()
    assert (info["bos_token"], info["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert (info["model_max_length"], info["vocab_size"]) == (8192, 49152)
    assert "<|im_start|>" in info["chat_template"]


async def test_small_routes(http: httpx.AsyncClient) -> None:
    assert (await http.get("/health")).json() == {"status": "ok"}
    assert (await http.get("/ping")).status_code == 200
    assert (await http.get("/version")).json()["version"]
    assert (await http.get("/ready")).json() == {"status": "ready", "num_workers": 1}


def test_aliases_are_what_vllm_has() -> None:
    """Prefix, one engine for all, vLLM's words; what the scheduler gives under vLLM's name is left to it."""
    metrics = Metrics("m", alias="vllm")
    metrics.time_to_first_token.observe(0.01)
    metrics.inter_token_latency.add(0.02)
    metrics.success("stop")
    metrics.rejected("queue_full")
    text = metrics.expose().decode()
    engines = {labels["engine"] for name, labels in labelled(text) if name.startswith("vllm:")}
    assert engines == {"0"}
    names = {name for name, _ in labelled(text)}
    for name in ("time_to_first_token", "inter_token_latency", "time_per_output_token"):
        assert f"vllm:{name}_seconds_bucket" in names
    assert "vllm:admission_rejections_total" in names
    assert "pagoda:request_success_total" in names and "vllm:request_success_total" not in names
    assert not any(name.startswith("vllm:") for name, _ in labelled(Metrics("m").expose().decode()))


def labelled(text: str) -> list[tuple[str, dict[str, str]]]:
    """Name and labels of every sample."""
    return [(s.name, s.labels) for family in text_string_to_metric_families(text) for s in family.samples]
