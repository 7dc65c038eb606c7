"""Clients that people really use, against the live services and a real model: OpenAI's SDK, buf, ours."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

import pagoda
from pagoda.models import EMBEDDED_MODEL as MODEL
from tests.support.cluster import Cluster
from tests.support.data import tokenizer

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
BUF = ROOT / "node_modules" / ".bin" / "buf"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
PROMPT = "The capital of France is"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}


# ------------------------------------------------------------------------------------------ OpenAI's SDK


def test_openai_models(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == [MODEL]


def test_openai_chat(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(messages=QUESTION, max_tokens=32, **GREEDY)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (ANSWER, "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(tokenizer().encode(ANSWER)) + 1, "the end counts as one"


def test_openai_chat_stream_with_usage(sdk: openai.OpenAI) -> None:
    chunks = list(
        sdk.chat.completions.create(
            messages=QUESTION, max_tokens=32, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(tokenizer().encode(ANSWER)) + 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


def test_openai_completion_and_stop(sdk: openai.OpenAI) -> None:
    whole = sdk.completions.create(prompt=PROMPT, max_tokens=12, **GREEDY).choices[0].text
    assert whole.startswith(" Paris")
    stopped = sdk.completions.create(prompt=PROMPT, max_tokens=12, stop=["ari", "zz"], **GREEDY).choices[0]
    assert (stopped.text, stopped.finish_reason) == (" P", "stop")
    echoed = sdk.completions.create(prompt=PROMPT, max_tokens=12, echo=True, **GREEDY).choices[0].text
    assert echoed == PROMPT + whole


def test_openai_completion_stream(sdk: openai.OpenAI) -> None:
    whole = sdk.completions.create(prompt=PROMPT, max_tokens=12, **GREEDY).choices[0].text
    chunks = sdk.completions.create(prompt=PROMPT, max_tokens=12, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole


def test_openai_logprobs(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        messages=QUESTION, max_tokens=32, logprobs=True, top_logprobs=3, **GREEDY
    )
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content or []
    assert "".join(entry.token for entry in entries[:-1]) == ANSWER
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        best = entry.top_logprobs[0]
        # Greedy draws the best; probabilities are at most 1 and sorted.
        assert (best.token, best.logprob) == (entry.token, entry.logprob)
        values = [top.logprob for top in entry.top_logprobs]
        assert 0 >= values[0] >= values[1] >= values[2]
    legacy = sdk.completions.create(prompt=PROMPT, max_tokens=3, logprobs=2, **GREEDY).choices[0].logprobs
    assert legacy is not None and legacy.tokens is not None and legacy.tokens[0] == " Paris"
    assert legacy.top_logprobs is not None and all(len(top) == 2 for top in legacy.top_logprobs)


def test_openai_n_samples(sdk: openai.OpenAI) -> None:
    """Sample i is what a single request with seed + i gives; greedy samples are all the same."""
    same = sdk.chat.completions.create(messages=QUESTION, max_tokens=32, n=3, **GREEDY)
    assert [choice.message.content for choice in same.choices] == [ANSWER] * 3
    options: dict[str, Any] = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8}
    three = sdk.completions.create(n=3, seed=40, **options)
    texts = [choice.text for choice in three.choices]
    assert len(set(texts)) > 1
    assert texts == [sdk.completions.create(seed=40 + i, **options).choices[0].text for i in range(3)]
    assert three.usage is not None and three.usage.completion_tokens == 24


async def test_openai_async(running: Cluster) -> None:
    url = f"{running.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
        whole, stream = await asyncio.gather(
            client.chat.completions.create(messages=QUESTION, max_tokens=32, **GREEDY),
            client.chat.completions.create(messages=QUESTION, max_tokens=32, stream=True, **GREEDY),
        )
        assert whole.choices[0].message.content == ANSWER
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == ANSWER


def test_openai_errors(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert missing.value.code == "model_not_found"


# --------------------------------------------------------------------------------------------------- buf


@pytest.fixture(scope="module")
def buf() -> Path:
    """buf as package.json pins it, installed if it is not there yet."""
    done = subprocess.run(["make", str(BUF.relative_to(ROOT))], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"npm is needed for buf:\n{done.stdout}{done.stderr}"
    return BUF


def buf_curl(buf: Path, address: str, method: str, data: dict[str, Any]) -> list[dict[str, Any]]:
    """Call a method that buf learns of by reflection; the responses."""
    url = f"http://{address}/{method}"
    command = [
        buf,
        "curl",
        "--protocol",
        "grpc",
        "--http2-prior-knowledge",
        "--reflect",
        "-d",
        json.dumps(data),
    ]
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=120, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    decoder, responses, at = json.JSONDecoder(), [], 0
    while at < len(done.stdout):
        value, at = decoder.raw_decode(done.stdout, at)
        responses.append(value)
        at += len(done.stdout[at:]) - len(done.stdout[at:].lstrip())
    return responses


def test_buf_curl_lists_models(running: Cluster, buf: Path) -> None:
    (response,) = buf_curl(buf, running.grpc, "pagoda.v1.InferenceService/ListModels", {})
    (model,) = response["models"]
    assert model["name"] == MODEL and model["vocabSize"] == 49152


def test_buf_curl_generates(running: Cluster, buf: Path) -> None:
    request = {
        "chat": {"messages": QUESTION},
        "sampling": {"temperature": 0, "maxTokens": 32},
        "requestId": "from-buf",
    }
    responses = buf_curl(buf, running.grpc, "pagoda.v1.InferenceService/Generate", request)
    assert "".join(response.get("text", "") for response in responses) == ANSWER
    assert responses[0]["requestId"] == "from-buf"
    assert responses[-1]["usage"]["completionTokens"] == len(tokenizer().encode(ANSWER)) + 1
    assert responses[-1]["finishReason"] == "FINISH_REASON_STOP"


def test_buf_curl_looks_into_the_scheduler(running: Cluster, buf: Path) -> None:
    (response,) = buf_curl(buf, running.scheduler.address, "pagoda.v1.ControlService/Snapshot", {})
    assert [worker["name"] for worker in response["snapshot"]["workers"]] == ["w0"]


# -------------------------------------------------------------------------------------- SDK, command line


def test_pagoda_sdk(running: Cluster) -> None:
    with pagoda.Client(running.grpc) as client:
        assert [model.name for model in client.models()] == [MODEL]
        assert client.chat(QUESTION, temperature=0.0, max_tokens=32).text == ANSWER
        ids = client.tokenize(PROMPT)
        assert ids == tokenizer().encode(PROMPT)
        completion = client.generate(ids, temperature=0.0, max_tokens=4, logprobs=1)
        assert completion.text.startswith(" Paris") and len(completion.samples[0].logprobs) == 4
        with client.stream_chat(QUESTION, temperature=0.0, max_tokens=32) as stream:
            assert "".join(chunk.text for chunk in stream) == ANSWER
        texts = client.batch([PROMPT, {"messages": QUESTION}], temperature=0.0, max_tokens=8)
        assert texts[0].text.startswith(" Paris") and texts[1].text == ANSWER
        with pytest.raises(pagoda.InvalidRequest) as wrong:
            client.generate("x", temperature=-1.0)
        assert wrong.value.field == "sampling.temperature"


async def test_pagoda_async_sdk(running: Cluster) -> None:
    async with pagoda.AsyncClient(running.grpc) as client:
        whole, chunks = await asyncio.gather(
            client.chat(QUESTION, temperature=0.0, max_tokens=32),
            _texts(client.stream_chat(QUESTION, temperature=0.0, max_tokens=32)),
        )
    assert (whole.text, "".join(chunks)) == (ANSWER, ANSWER)


async def _texts(stream: pagoda.AsyncStream) -> list[str]:
    return [chunk.text async for chunk in stream]


def cli(*arguments: str, said: str = "") -> str:
    """Run `pagoda`; what it printed."""
    command = [sys.executable, "-m", "pagoda.cli.main", *arguments]
    done = subprocess.run(command, input=said, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_command_line_generate_and_models(running: Cluster) -> None:
    options = ("--temperature", "0", "--max-tokens", "32", "--url", running.grpc)
    assert cli("generate", QUESTION[0]["content"], "--chat", *options) == f"{ANSWER}\n"
    assert cli("models", "--url", running.grpc).startswith(MODEL)


def test_command_line_chat_has_several_turns(running: Cluster) -> None:
    turns = f"{QUESTION[0]['content']}\n/reset\n{QUESTION[0]['content']}\n/exit\n"
    said = cli("chat", "--temperature", "0", "--max-tokens", "32", "--url", running.grpc, said=turns)
    assert said.count(ANSWER) == 2


def test_command_line_batch(running: Cluster, tmp_path: Path) -> None:
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked = [{"messages": QUESTION, "max_tokens": 32}, {"prompt": PROMPT, "max_tokens": 2}]
    file.write_text("".join(json.dumps(line) + "\n" for line in asked))
    cli("batch", str(file), "--output", str(output), "--temperature", "0", "--url", running.grpc)
    bodies = [json.loads(line)["response"]["body"] for line in output.read_text().splitlines()]
    assert bodies[0]["choices"][0]["message"]["content"] == ANSWER
    assert bodies[1]["choices"][0]["text"].startswith(" Paris")


def test_command_line_bench(running: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    size = ("--concurrency", "3", "--requests", "6", "--prompt-tokens", "20", "--output-tokens", "5")
    cli("bench", *size, "--json", str(path), "--url", running.grpc)
    measured = json.loads(path.read_text())
    assert measured["errors"] == 0 and measured["output_tokens_per_s"] > 0
    assert measured["model"]["name"] == MODEL


def test_command_line_top(running: Cluster) -> None:
    shown = cli("top", "--once", "--scheduler", running.scheduler.address)
    assert MODEL in shown and "w0" in shown and "gateways 1" in shown
