"""Bad input over HTTP: the right status, the field's name, nothing left behind, and the service goes on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from gateway_svc.server import GatewayServer
from pagoda.v1 import scheduler_pb2 as pb
from tests.unit.gateway.conftest import MODEL, Running, ids_of, until
from tests.unit.gateway.fake_scheduler import FakeScheduler

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}
USER = [{"role": "user", "content": "hi"}]

NOT_A_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "foo"}}}
BAD_SCHEMA = {"type": "object", "properties": {"a": {"type": "strange"}}}
UNMET = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}


def function(name: str, parameters: Any = None, strict: bool = False) -> dict[str, Any]:
    """A tool."""
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


def named(name: str) -> dict[str, Any]:
    """A choice of a tool."""
    return {"type": "function", "function": {"name": name}}


# route, body, param: each is a 400.
BAD: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": USER, "temperature": -1}, "temperature"),
    (CHAT, {"messages": USER, "temperature": "hot"}, "temperature"),
    (CHAT, {"messages": USER, "n": 0}, "n"),
    (CHAT, {"messages": USER, "n": "2"}, "n"),
    (CHAT, {"messages": USER, "n": 1.5}, "n"),
    (CHAT, {"messages": USER, "top_p": 0}, "top_p"),
    (CHAT, {"messages": USER, "top_p": 1.1}, "top_p"),
    (CHAT, {"messages": USER, "min_p": 2}, "min_p"),
    (CHAT, {"messages": USER, "top_k": -2}, "top_k"),
    (CHAT, {"messages": USER, "presence_penalty": 3}, "presence_penalty"),
    (CHAT, {"messages": USER, "frequency_penalty": -3}, "frequency_penalty"),
    (CHAT, {"messages": USER, "repetition_penalty": 0}, "repetition_penalty"),
    (CHAT, {"messages": USER, "max_tokens": 0}, "max_tokens"),
    (CHAT, {"messages": USER, "max_completion_tokens": -5}, "max_completion_tokens"),
    (CHAT, {"messages": USER, "min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    (CHAT, {"messages": USER, "stop": ""}, "stop"),
    (CHAT, {"messages": USER, "stop": 5}, "stop"),
    (CHAT, {"messages": USER, "stop": ["a", 5]}, "stop[1]"),
    (CHAT, {"messages": USER, "stop": ["x"] * 100}, "stop"),
    (CHAT, {"messages": USER, "stop_token_ids": [-1]}, "stop_token_ids[0]"),
    (CHAT, {"messages": USER, "stop_token_ids": [2**40]}, "stop_token_ids[0]"),
    (CHAT, {"messages": USER, "logit_bias": {"five": 1}}, "logit_bias"),
    (CHAT, {"messages": USER, "logit_bias": {"5": "much"}}, "logit_bias"),
    (CHAT, {"messages": USER, "seed": "lucky"}, "seed"),
    (CHAT, {"messages": USER, "stream": "yes"}, "stream"),
    (CHAT, {"messages": USER, "stream_options": 1}, "stream_options"),
    (CHAT, {"messages": USER, "logprobs": 3}, "logprobs"),
    (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"messages": USER, "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": USER, "request_id": "x" * 200}, "request_id"),
    (CHAT, {"messages": USER, "request_id": "a\r\nb: c"}, "request_id"),
    (CHAT, {"messages": USER, "priority": 2**31}, "priority"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"content": "hi"}]}, "messages[0].role"),
    (CHAT, {"messages": [*USER, {"role": "user", "content": 5}]}, "messages[1].content"),
    (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
    (CHAT, {"messages": USER, "chat_template": "{{ 1 }}"}, "chat_template"),
    (CHAT, {"messages": USER, "chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    (
        CHAT,
        {"messages": USER, "continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
    ),
    (CHAT, {"messages": USER, "response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"messages": USER, "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        CHAT,
        {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
    ),
    (CHAT, {"messages": USER, "response_format": NOT_A_SCHEMA}, "response_format.json_schema.schema"),
    (CHAT, {"messages": USER, "tools": [{"type": "function"}]}, "tools[0].function"),
    (CHAT, {"messages": USER, "tools": [{"type": "search", "function": {"name": "f"}}]}, "tools[0].type"),
    (CHAT, {"messages": USER, "tools": [function("no spaces")]}, "tools[0].function.name"),
    (CHAT, {"messages": USER, "tools": [function("f"), function("f")]}, "tools[1].function.name"),
    (CHAT, {"messages": USER, "tools": [function("f", [])]}, "tools[0].function.parameters"),
    (CHAT, {"messages": USER, "tools": [function("f", {"type": "array"})]}, "tools[0].function.parameters"),
    (CHAT, {"messages": USER, "tools": [function("f", BAD_SCHEMA)]}, "tools[0].function.parameters"),
    (CHAT, {"messages": USER, "tools": [function("f", UNMET, True)]}, "tools[0].function.parameters"),
    (CHAT, {"messages": USER, "tools": [function("f")], "tool_choice": "always"}, "tool_choice"),
    (CHAT, {"messages": USER, "tools": [function("f")], "tool_choice": named("g")}, "tool_choice"),
    (
        CHAT,
        {"messages": USER, "tools": [function("f")], "tool_choice": {"type": "function"}},
        "tool_choice.function",
    ),
    (CHAT, {"messages": USER, "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"messages": USER, "tools": [], "tool_choice": named("f")}, "tool_choice"),
    (CHAT, {"messages": USER, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    (
        CHAT,
        {"messages": [*USER, {"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}]},
        "messages[1].tool_calls[0].function.name",
    ),
    (CHAT, {"messages": USER, "best_of": 2, "stream": True}, "best_of"),
    (CHAT, {"messages": USER, "best_of": 2, "n": 3}, "best_of"),
    (CHAT, {"messages": USER, "best_of": 129}, "best_of"),
    (CHAT, {"messages": USER, "best_of": True}, "best_of"),
    (CHAT, {"messages": USER, "use_beam_search": True, "n": 17}, "n"),
    (CHAT, {"messages": USER, "use_beam_search": True, "best_of": 17}, "best_of"),
    (CHAT, {"messages": USER, "use_beam_search": True, "best_of": 2, "n": 3}, "n"),
    (CHAT, {"messages": USER, "use_beam_search": True, "best_of": 2, "beam_width": 3}, "best_of"),
    (CHAT, {"messages": USER, "use_beam_search": "yes"}, "use_beam_search"),
    (CHAT, {"messages": USER, "use_beam_search": False, "beam_width": 3}, "beam_width"),
    (CHAT, {"messages": USER, "beam_width": 0}, "beam_width"),
    (CHAT, {"messages": USER, "beam_width": 17}, "beam_width"),
    (CHAT, {"messages": USER, "beam_width": 2, "early_stopping": "sometimes"}, "early_stopping"),
    (CHAT, {"messages": USER, "beam_width": 2, "early_stopping": 1}, "early_stopping"),
    (CHAT, {"messages": USER, "beam_width": 2, "length_penalty": "long"}, "length_penalty"),
    (CHAT, {"messages": USER, "early_stopping": True}, "early_stopping"),
    (CHAT, {"messages": USER, "length_penalty": 0.5}, "length_penalty"),
    (
        CHAT,
        {"messages": USER, "beam_width": 2, "response_format": {"type": "json_object"}},
        "response_format",
    ),
    (
        CHAT,
        {"messages": USER, "beam_width": 2, "tools": [function("f")], "tool_choice": "required"},
        "tools",
    ),
    (
        TEXT,
        {"prompt": "x", "beam_width": 2, "structured_outputs": {"regex": "a"}},
        "structured_outputs.regex",
    ),
    (CHAT, {"messages": USER, "structured_outputs": {"regex": "a("}}, "structured_outputs.regex"),
    (CHAT, {"messages": USER, "structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    (CHAT, {"messages": USER, "structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json"),
    (CHAT, {"messages": USER, "structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    (CHAT, {"messages": USER, "structured_outputs": {"choice": [5]}}, "structured_outputs.choice[0]"),
    (CHAT, {"messages": USER, "structured_outputs": {}}, "structured_outputs"),
    (CHAT, {"messages": USER, "structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    (
        CHAT,
        {"messages": USER, "structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
    ),
    (TEXT, {"prompt": "x", "structured_outputs": {"grammar": "start: y"}}, "structured_outputs.grammar"),
    (TEXT, {"prompt": "x", "structured_outputs": {"grammar": "start: <|y|>"}}, "structured_outputs.grammar"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 9000}]}, "messages"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": [[]]}, "prompt"),
    (TEXT, {"prompt": ["fine", ""]}, "prompt"),
    (TEXT, {}, "prompt"),
    (TEXT, {"prompt": None}, "prompt"),
    (TEXT, {"prompt": 5}, "prompt"),
    (TEXT, {"prompt": {"text": "x"}}, "prompt"),
    (TEXT, {"prompt": [1, "two"]}, "prompt[1]"),
    (TEXT, {"prompt": [1, -1]}, "prompt[1]"),
    (TEXT, {"prompt": [49152]}, "prompt"),
    (TEXT, {"prompt": [[5], [2**33]]}, "prompt[1][0]"),
    (TEXT, {"prompt": [5] * 8192}, "prompt"),
    (TEXT, {"prompt": "word " * 9000}, "prompt"),
    (TEXT, {"prompt": ["a"] * 100, "n": 100}, "prompt"),
    (TEXT, {"prompt": ["a"] * 9, "best_of": 128}, "prompt"),
    (TEXT, {"prompt": ["a"] * 65, "beam_width": 16}, "prompt"),
    (TEXT, {"prompt": "x", "best_of": 3, "stream": True}, "best_of"),
    (TEXT, {"prompt": "x", "suffix": "end"}, "suffix"),
    (TEXT, {"prompt": "x", "logprobs": 30}, "logprobs"),
    (TEXT, {"prompt": "x", "logprobs": True}, "logprobs"),
    (TEXT, {"prompt": "x", "prompt_logprobs": 21}, "prompt_logprobs"),
    (TEXT, {"prompt": "x", "prompt_logprobs": -1}, "prompt_logprobs"),
    (CHAT, {"messages": USER, "prompt_logprobs": True}, "prompt_logprobs"),
    (TEXT, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": 0, "prompt_logprobs": 1}, "max_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": 0, "min_tokens": 1, "echo": True}, "min_tokens"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "x", "messages": USER}, "prompt"),
    ("/detokenize", {"tokens": [99999]}, "tokens"),
    ("/detokenize", {"tokens": ["x"]}, "tokens[0]"),
]


async def test_a_400_names_the_field_and_nothing_is_left_behind(
    http: httpx.AsyncClient, server: GatewayServer, fake: FakeScheduler
) -> None:
    wrong = []
    for route, body, param in BAD:
        response = await http.post(route, json=body)
        error = response.json().get("error", {})
        told = param.split("[")[0] in error.get("message", "")
        if (response.status_code, error.get("param"), told) != (400, param, True):
            wrong.append((str(body)[:200], param, response.status_code, error))
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
    assert not wrong
    assert not fake.submitted and server.gateway.link.num_open == 0
    assert (await http.post(TEXT, json={"prompt": "x"})).status_code == 200
    assert len(fake.submitted) == 1


async def test_the_harmless_forms_pass(http: httpx.AsyncClient) -> None:
    """What clients send out of habit: LiteLLM, LangChain, Open WebUI."""
    body = {
        "model": MODEL,
        "messages": USER,
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "stream_options": None,
        "stop": None,
        "max_tokens": None,
        "logprobs": None,
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "reasoning_effort": "low",
    }
    assert (await http.post(CHAT, json=body)).status_code == 200
    functions = [{"type": "function", "function": {"name": "f"}}]
    response = await http.post(CHAT, json=body | {"tools": functions, "tool_choice": "none"})
    assert response.status_code == 200
    response = await http.post(TEXT, json={"prompt": "x", "best_of": 2, "n": 2, "suffix": None})
    assert response.status_code == 200
    vllm = {"best_of": 1, "use_beam_search": False, "length_penalty": 1.0, "early_stopping": False}
    response = await http.post(TEXT, json={"prompt": "x", "stream": True, **vllm})
    assert response.status_code == 200


async def test_templates_of_requests_where_they_are_trusted(start: Running, fake: FakeScheduler) -> None:
    server = await start(trust_request_chat_template=True)
    body = {
        "messages": USER,
        "chat_template": "{{ word }} {{ messages[0].content }}",
        "chat_template_kwargs": {"word": "Oh"},
    }
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http.port}") as http:
        assert (await http.post(CHAT, json=body)).status_code == 200
        assert list(fake.submitted[0].prompt_token_ids) == ids_of("Oh hi")
        response = await http.post(CHAT, json=body | {"chat_template": "{% for %}"})
        assert response.status_code == 400


async def test_a_fault_of_ours_is_a_500_and_counts_as_such(
    http: httpx.AsyncClient, server: GatewayServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway_svc.openai.completions.CompletionRenderer.whole", None)
    response = await http.post(TEXT, json={"prompt": "x"})
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
    assert b'requests_failed_total{code="internal"' in server.gateway.metrics.expose()
    assert server.gateway.link.num_open == 0


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800 alone"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x"',
        b"not json",
        b"[1, 2]",
        b"",
        b"[" * 100_000,
    ],
)
async def test_what_is_not_json(http: httpx.AsyncClient, content: bytes) -> None:
    response = await http.post(TEXT, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


async def test_over_long_prompts_say_the_numbers(http: httpx.AsyncClient) -> None:
    error = (await http.post(TEXT, json={"prompt": [5] * 9000})).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "9000" in error["message"] and "8192" in error["message"]


async def test_a_hopeless_prompt_is_refused_without_tokenizing(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway_svc.text.tokenizer.ModelTokenizer._encode", None)
    error = (await http.post(TEXT, json={"prompt": "x" * 7_000_000})).json()["error"]
    assert error["code"] == "context_length_exceeded" and "at least" in error["message"]


async def test_bodies_that_are_too_large(http: httpx.AsyncClient) -> None:
    body = json.dumps({"prompt": "x" * 10_000_000}).encode()
    headers = {"content-type": "application/json"}
    response = await http.post(TEXT, content=body, headers=headers)
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"

    async def pieces() -> Any:
        for start in range(0, len(body), 1 << 20):
            yield body[start : start + (1 << 20)]

    response = await http.post(TEXT, content=pieces(), headers=headers)
    assert response.status_code == 413, "also where the length is not declared"
    assert (await http.post(TEXT, json={"prompt": "fine"})).status_code == 200


async def test_unknown_models_and_routes(http: httpx.AsyncClient) -> None:
    for route, body in ((CHAT, {"messages": USER}), (TEXT, {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
        response = await http.post(route, json=body | {"model": "another"})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert response.json()["error"]["param"] == "model"
    assert (await http.get("/v1/nothing")).json()["error"]["message"] == "Not Found"
    assert (await http.get(CHAT)).status_code == 405


@pytest.mark.parametrize(
    ("failure", "status", "param", "retry"),
    [
        (pb.RequestFailure(code=3, message="is 9", field="sampling.top_k"), 400, "top_k", None),
        (pb.RequestFailure(code=3, message="large", field="sampling.logit_bias"), 400, "logit_bias", None),
        (pb.RequestFailure(code=6, message="runs", field="request_id"), 409, "request_id", None),
        (pb.RequestFailure(code=8, message="full", retry_after_ms=2500), 429, None, "3"),
        (pb.RequestFailure(code=14, message="no worker"), 503, None, "1"),
        (pb.RequestFailure(code=13, message="poison"), 500, None, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_scheduler_refuses(
    http: httpx.AsyncClient,
    fake: FakeScheduler,
    failure: pb.RequestFailure,
    status: int,
    param: str | None,
    retry: str | None,
    stream: bool,
) -> None:
    """A refusal is a status, in streams too: nothing is sent before the first token."""
    fake.refuse = lambda request: failure
    response = await http.post(TEXT, json={"prompt": "x", "stream": stream})
    assert response.status_code == status
    assert response.json()["error"]["param"] == param
    assert response.headers.get("retry-after") == retry


async def test_bounds_of_the_gateway(start: Running, fake: FakeScheduler) -> None:
    """More prompts than may be in flight: 429, and those of the same call are stopped again."""
    server = await start(max_requests=2)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http.port}") as http:
        response = await http.post(TEXT, json={"prompt": ["a", "b", "c"]})
        assert response.status_code == 429 and response.headers["retry-after"] == "1"
        assert server.gateway.link.num_open == 0
        assert (await http.post(TEXT, json={"prompt": ["a", "b"]})).status_code == 200
    await until(lambda: fake.num_live_rows == 0)
