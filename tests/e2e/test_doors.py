"""Tools that people already hold, as they are, against the live services and a real model.

`make test-doors` installs the tools, apart from Pagoda's own environment, and runs these tests. A tool runs
as a process. What it counted must be what the gateway counted: no request was lost, none failed unseen.
docs/tools.md has these commands for users.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pagoda.models import EMBEDDED_MODEL as MODEL
from tests.support.cluster import Cluster, cluster
from tests.support.data import model_folder, tokenizer
from tests.support.metrics import scrape, total
from tests.support.reference import model

pytestmark = [pytest.mark.doors, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
CALLS = ROOT / "tests" / "support" / "doors"
ANSWER = "The capital of France is Paris."
PROMPT = "The capital of France is"
# Requests of a benchmark run, how many at once, and the tokens of each.
REQUESTS, STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS = 12, 3, 40, 8


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    """All three services, exact enough for a known answer."""
    with cluster(dtype="float32", worker_args=("--num-blocks", "512"), gateway_args=()) as services:
        yield services


@dataclass(frozen=True)
class Counts:
    """What the gateway has counted since it started."""

    requests: int
    succeeded: int
    lost: int
    prompt_tokens: int
    output_tokens: int

    def __sub__(self, before: Counts) -> Counts:
        mine, other = vars(self), vars(before)
        return Counts(**{name: mine[name] - other[name] for name in mine})


def counts(services: Cluster) -> Counts:
    """See `Counts`."""
    text = scrape(services.metrics)

    def value(name: str) -> int:
        return int(total(text, f"pagoda:{name}"))

    return Counts(
        requests=value("request_prompt_tokens_count"),
        succeeded=value("request_success_total"),
        lost=value("requests_failed_total") + value("requests_cancelled_total"),
        prompt_tokens=value("request_prompt_tokens_sum"),
        output_tokens=value("request_generation_tokens_sum"),
    )


def tool(environment: str, program: str, *arguments: str | Path, cwd: Path, **more: str) -> str:
    """Run a program of .venv-doors/ENVIRONMENT to its end, `more` in its environment; what it printed."""
    path = ROOT / ".venv-doors" / environment / "bin" / program
    assert path.exists(), f"{path} is missing: `make test-doors` installs it"
    variables = {**os.environ, **more}
    done = subprocess.run(
        [path, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, f"{program} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ------------------------------------------------------------------------------------------------- SDKs


def test_langchain(running: Cluster, tmp_path: Path) -> None:
    script = CALLS / "langchain_calls.py"
    said = json.loads(tool("sdks", "python", script, running.url, MODEL, cwd=tmp_path))
    num_tokens = len(tokenizer().encode(ANSWER)) + 1
    assert (said["invoke"], said["finish"], said["chain"]) == (ANSWER, "stop", ANSWER)
    assert "".join(said["stream"]) == "".join(said["astream"]) == ANSWER
    assert len([piece for piece in said["stream"] if piece]) > 1, "it streams"
    for usage in (said["usage"], said["stream_usage"]):
        assert usage["output_tokens"] == num_tokens
        assert usage["total_tokens"] == usage["input_tokens"] + num_tokens
    assert said["abatch"] == [ANSWER] * 3
    assert "".join(entry["token"] for entry in said["logprobs"][:-1]) == ANSWER
    assert all(len(entry["top_logprobs"]) == 2 for entry in said["logprobs"])
    tools = said["tools"]
    assert tools["call"] == tools["call_stream"] == [["get_weather", {"city": "Paris"}]]
    assert tools["call_finish"] == "tool_calls" and "31" in tools["told"]
    assert set(tools["place"]) == {"city", "country"}
    assert said["completion"].startswith(" Paris")
    assert said["completion_batch"] == [said["completion"]] * 2
    assert "".join(said["completion_stream"]) == said["completion"]
    assert said["completion_usage"]["completion_tokens"] == 2 * 4
    assert said["completion_usage"]["prompt_tokens"] == 2 * len(tokenizer().encode(PROMPT))


def test_litellm(running: Cluster, tmp_path: Path) -> None:
    # Else it fetches a list of prices when it is imported.
    local = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    script = CALLS / "litellm_calls.py"
    said = json.loads(tool("sdks", "python", script, running.url, MODEL, cwd=tmp_path, **local))
    num_tokens = len(tokenizer().encode(ANSWER)) + 1
    assert (said["completion"], said["finish"], said["as_vllm"]) == (ANSWER, "stop", ANSWER)
    assert "".join(said["stream"]) == ANSWER
    assert len([piece for piece in said["stream"] if piece]) > 1, "it streams"
    assert said["usage"]["completion_tokens"] == said["stream_usage"]["completion_tokens"] == num_tokens
    assert said["usage"]["prompt_tokens"] == said["stream_usage"]["prompt_tokens"]
    assert said["acompletion"] == [ANSWER] * 3
    for calls in (said["calls"], said["calls_as_vllm"]):
        assert calls and all(name == "get_weather" and set(json.loads(of)) == {"city"} for name, of in calls)
    assert said["text"].startswith(" Paris") and "".join(said["text_stream"]) == said["text"]
    assert said["text_usage"]["prompt_tokens"] == len(tokenizer().encode(PROMPT))
    assert (said["bad_value"]["type"], said["bad_value"]["status"]) == ("BadRequestError", 400)
    assert "temperature" in said["bad_value"]["text"]
    assert (said["bad_model"]["type"], said["bad_model"]["status"]) == ("NotFoundError", 404)


# --------------------------------------------------------------------------------------- benchmark tools


def aiperf(services: Cluster, folder: Path, *options: str) -> tuple[dict[str, Any], Counts]:
    """A run of aiperf; its figures and what the gateway counted meanwhile."""
    before = counts(services)
    tool(
        *("aiperf", "aiperf", "profile", "--model", MODEL, "--url", services.url),
        *("--tokenizer", model_folder(), "--streaming", "--ui", "none", "--no-gpu-telemetry"),
        *("--isl", str(PROMPT_TOKENS), "--osl", str(OUTPUT_TOKENS), "--extra-inputs", "ignore_eos:true"),
        *("--request-count", str(REQUESTS), "--concurrency", str(STREAMS)),
        *("--artifact-dir", folder / "artifacts", *options),
        cwd=folder,
    )
    figures = json.loads((folder / "artifacts" / "profile_export_aiperf.json").read_text())
    return figures, counts(services) - before


def check_aiperf(figures: dict[str, Any], counted: Counts) -> None:
    """What must hold of every run: nothing failed, and the numbers fit together."""
    assert figures["error_summary"] == [] and figures["was_cancelled"] is False
    assert figures["request_count"]["avg"] == REQUESTS == figures["completed_request_count"]["avg"]
    assert counted.requests == counted.succeeded == REQUESTS and counted.lost == 0
    assert counted.output_tokens == REQUESTS * OUTPUT_TOKENS
    assert 0 < figures["time_to_first_token"]["avg"] < figures["request_latency"]["avg"]
    assert figures["inter_token_latency"]["avg"] > 0
    seconds = figures["benchmark_duration"]["avg"]
    assert figures["request_throughput"]["avg"] == pytest.approx(REQUESTS / seconds, rel=0.01)


def test_aiperf_chat(running: Cluster, tmp_path: Path) -> None:
    """With the gateway's own counts, which aiperf then asks for with `stream_options`."""
    figures, counted = aiperf(running, tmp_path, "--endpoint-type", "chat", "--use-server-token-count")
    check_aiperf(figures, counted)
    assert figures["total_isl"]["avg"] == counted.prompt_tokens > REQUESTS * PROMPT_TOKENS, "and a template"
    assert figures["total_osl"]["avg"] == counted.output_tokens


def test_aiperf_completions(running: Cluster, tmp_path: Path) -> None:
    """With its own counts: the prompts that it measured are the prompts that arrived."""
    figures, counted = aiperf(running, tmp_path, "--endpoint-type", "completions")
    check_aiperf(figures, counted)
    assert figures["total_isl"]["avg"] == counted.prompt_tokens == REQUESTS * PROMPT_TOKENS
    # It tokenizes the answers' texts again, and a text may have a shorter spelling than the one drawn.
    assert 0 < figures["total_osl"]["avg"] <= counted.output_tokens


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm(running: Cluster, tmp_path: Path, path: str) -> None:
    before, file = counts(running), tmp_path / "figures.json"
    tool(
        *("guidellm", "guidellm", "run", "--disable-progress"),
        *("--backend", f"kind=openai_http,target={running.url},model={MODEL},request_format={path}"),
        *("--profile", f"kind=concurrent,streams={STREAMS}"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--tokenizer", f"kind=huggingface_auto,model={model_folder()}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"),
        *("--output", f"kind=json,path={file}"),
        cwd=tmp_path,
        HF_HUB_OFFLINE="1",
    )
    counted = counts(running) - before
    assert running.gateway is not None
    (benchmark,) = json.loads(file.read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    wrong = [made["info"] for kind in ("errored", "incomplete") for made in benchmark["requests"][kind]]
    assert wrong == [], (metrics["request_totals"], counted, "".join(running.gateway.text[-20:]))
    assert metrics["request_totals"]["successful"] == metrics["request_totals"]["total"] == REQUESTS
    assert benchmark["warnings"] == []
    assert counted.requests == counted.succeeded == REQUESTS and counted.lost == 0
    prompt, output = (metrics[name]["successful"] for name in ("prompt_token_count", "output_token_count"))
    assert prompt["total_sum"] == counted.prompt_tokens >= REQUESTS * PROMPT_TOKENS
    assert output["total_sum"] == counted.output_tokens == REQUESTS * OUTPUT_TOKENS
    first, last = (metrics[name]["successful"] for name in ("time_to_first_token_ms", "request_latency"))
    assert 0 < first["mean"] < 1000 * last["mean"]


# --------------------------------------------------------------------------------------------- evaluation


def written_by_transformers(prompt: str, max_tokens: int) -> str:
    """The line that transformers writes after the prompt, greedily."""
    ids = torch.tensor([tokenizer().encode(prompt)])
    whole = model().generate(ids, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
    text: str = tokenizer().decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    return text.split("\n")[0].strip()


def lm_eval(folder: Path, task: str, *options: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run of lm-eval: its figures for a task of ours, and every question with its answer."""
    tool(
        *("lm-eval", "lm_eval", "run", "--tasks", task, "--include_path", CALLS / "lm_eval"),
        *("--log_samples", "--output_path", folder, *options),
        cwd=CALLS / "lm_eval",
        HF_HUB_OFFLINE="1",
        HF_HOME=str(folder / "cache"),
    )
    (figures,), (log,) = (list(folder.glob(f"*/{kind}_*")) for kind in ("results", "samples"))
    samples = [json.loads(line) for line in log.read_text().splitlines()]
    return json.loads(figures.read_text())["results"][task], samples


def asking(services: Cluster, more: str = "") -> tuple[str, ...]:
    """How to ask the gateway. lm-eval has no tokenizer then: it finds ours through /tokenizer_info."""
    address = f"model={MODEL},base_url={services.url}/v1/completions"
    return "--model", "local-completions", "--model_args", f"{address},num_concurrent=3,max_retries=1{more}"


def num_questions(name: str) -> int:
    return len((CALLS / "lm_eval" / name).read_text().splitlines())


def test_lm_eval_generates(running: Cluster, tmp_path: Path) -> None:
    """A multiple-choice set answered by writing the choice: the same words as transformers writes.

    It sends token ids.
    """
    before = counts(running)
    figures, samples = lm_eval(tmp_path, "capitals", *asking(running))
    counted = counts(running) - before
    assert len(samples) == num_questions("questions.jsonl")
    assert counted.requests == counted.succeeded == len(samples) and counted.lost == 0
    prompts = [sample["arguments"]["gen_args_0"]["arg_0"] for sample in samples]
    assert counted.prompt_tokens == sum(len(tokenizer().encode(prompt)) for prompt in prompts)
    expected = [written_by_transformers(prompt, 6) for prompt in prompts]
    assert [sample["filtered_resps"][0].strip() for sample in samples] == expected
    right = [text == sample["target"] for text, sample in zip(expected, samples, strict=True)]
    assert len(set(expected)) > 3, "the model does look at the questions"
    assert 0 < figures["exact_match,line"] == pytest.approx(sum(right) / len(right))


@pytest.fixture(scope="module")
def by_transformers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What lm-eval says of the model when it runs it itself, through transformers, in float32."""
    args = f"pretrained={model_folder()},dtype=float32"
    folder = tmp_path_factory.mktemp("transformers")
    yield lm_eval(folder, "facts", "--model", "hf", "--model_args", args, "--device", "cpu")


@pytest.mark.parametrize("requests", ["tokens", "texts"])
def test_lm_eval_compares_likelihoods(
    running: Cluster, by_transformers: Any, requests: str, tmp_path: Path
) -> None:
    """A multiple-choice set answered by likelihood, which takes the logprobs of prompts (`echo`): the same
    accuracy as transformers', question by question."""
    before = counts(running)
    more = "" if requests == "tokens" else ",tokenized_requests=False"
    figures, samples = lm_eval(tmp_path, "facts", *asking(running, more))
    counted = counts(running) - before
    choices = [choice for sample in samples for choice in sample["filtered_resps"]]
    assert len(samples) == num_questions("facts.jsonl") == 40
    assert counted.requests == counted.succeeded == len(choices) == 160 and counted.lost == 0
    expected, theirs = by_transformers
    for name in ("acc,none", "acc_norm,none"):
        assert 0.5 < figures[name] == expected[name] < 1, name
    assert any(sample["acc"] != sample["acc_norm"] for sample in theirs), "the two do differ"
    greedy = 0
    for mine, other in zip(samples, theirs, strict=True):
        assert mine["doc"] == other["doc"]
        assert (mine["acc"], mine["acc_norm"]) == (other["acc"], other["acc_norm"]), mine["doc"]
        for got, want in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
            assert float(got[0]) == pytest.approx(float(want[0]), abs=1e-3)
            assert got[1] == want[1], "whether the model would have written it"
            greedy += want[1] == "True"
    assert 0 < greedy < len(choices)
