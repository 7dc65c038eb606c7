"""Structured output through the real services and the real model: what comes is what was asked for.

Whatever happens to a request on its way (a worker's death, preemption, more or fewer steps ahead), its
grammar's state is rebuilt from its tokens, so the output is the same.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any

import grpc
import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

import pagoda
from benchmarks.schemas import schema
from benchmarks.structured import ask_all, problem_of
from gateway_svc.text.grammars import ModelGrammars, json_schema_grammar
from gateway_svc.text.tokenizer import load_tokenizer
from pagoda.models import EMBEDDED_MODEL as MODEL
from pagoda.v1 import scheduler_pb2 as pb
from pagoda.v1 import scheduler_pb2_grpc as rpc
from tests.support.cluster import Cluster, cluster
from tests.support.cluster_sched import wait_until
from tests.support.data import model_folder
from tests.support.grammars import Judge

pytestmark = pytest.mark.timeout(600)

QUESTION: list[Any] = [{"role": "user", "content": "Tell me about Paris."}]
NUM_SCHEMAS, LEAST_FINISHED = 40, 0.5
NUMBERS = range(100, 108)  # of the schemas whose outputs are compared
LONG = {  # whatever the model writes, it is not done after 60 tokens
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "minItems": 20,
}


COMPACT_CITY = r'\{"name":"[^\n]{0,30}","is_capital":(true|false),"population":-?\d+\}'


class City(BaseModel):
    """What a user of pydantic asks for."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=30)
    is_capital: bool
    population: int


@pytest.fixture(scope="module")
def judge() -> Judge:
    """Judges by the model's vocabulary."""
    model = pb.ModelInfo(vocab_size=49152, eos_token_ids=[2])
    grammars = ModelGrammars(load_tokenizer(model_folder()))
    return Judge(grammars.compile(lambda: json_schema_grammar({}), "", model)[1])


def format_of(wanted: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "wanted", "schema": wanted}}


async def ask(url: str, wanted: Sequence[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """One chat for each schema, all at once; the answers."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        common = {"messages": QUESTION, "return_token_ids": True, "max_tokens": 60}
        bodies = [{**common, "response_format": format_of(w)} for w in wanted]
        replies = await asyncio.gather(
            *(client.post("/v1/chat/completions", json=body | options) for body in bodies)
        )
    return [reply.raise_for_status().json() for reply in replies]


def texts(answers: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(c["message"]["content"], c["finish_reason"]) for a in answers for c in a["choices"]]


@pytest.fixture(scope="module")
def undisturbed(running: Cluster) -> list[tuple[str, str]]:
    """What comes when nothing happens."""
    wanted = [*map(schema, NUMBERS), LONG, LONG]
    return texts(asyncio.run(ask(running.url, wanted, temperature=0)))


# ------------------------------------------------------------------------------------------- what comes


def test_random_schemas_hold(running: Cluster) -> None:
    report = asyncio.run(ask_all(running.url, range(NUM_SCHEMAS), max_tokens=80, concurrency=16))
    assert not report.wrong(LEAST_FINISHED), report


def test_each_token_is_allowed_for_each_of_three_samples(running: Cluster, judge: Judge) -> None:
    options = {"temperature": 1, "seed": 7, "max_tokens": 40}
    (three,) = asyncio.run(ask(running.url, [LONG], n=3, **options))
    outputs = [choice["token_ids"] for choice in three["choices"]]
    for output in outputs:
        judge.assert_follows(json_schema_grammar(LONG), output, ended=False)
    assert len({tuple(output) for output in outputs}) == 3
    (one,) = asyncio.run(ask(running.url, [LONG], **options | {"seed": 8}))
    assert one["choices"][0]["token_ids"] == outputs[1], "sample i draws with seed + i"


def test_openai_parse(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.parse(
        model=MODEL, messages=QUESTION, response_format=City, temperature=0, max_tokens=120
    )
    assert isinstance(answer.choices[0].message.parsed, City)
    with sdk.chat.completions.stream(
        model=MODEL, messages=QUESTION, response_format=City, temperature=0, max_tokens=120
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed


def test_openai_formats(sdk: openai.OpenAI) -> None:
    made = sdk.chat.completions.create(
        model=MODEL, messages=QUESTION, response_format={"type": "json_object"}, seed=3, max_tokens=200
    )
    assert isinstance(json.loads(made.choices[0].message.content or ""), dict)
    asked: Any = format_of(City.model_json_schema())
    made = sdk.chat.completions.create(
        model=MODEL, messages=QUESTION, response_format=asked, temperature=0, max_tokens=120
    )
    City.model_validate_json(made.choices[0].message.content or "")


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"json": City.model_json_schema(), "disable_any_whitespace": True}, COMPACT_CITY),
        ({"json": json.dumps({"type": "boolean"})}, "true|false"),
        ({"regex": r"[A-Z][a-z]{2,9} \d{4}"}, r"[A-Z][a-z]{2,9} \d{4}"),
        ({"choice": ["Lyon", "Nice, by the sea", "Übersee"]}, "Lyon|Nice, by the sea|Übersee"),
        ({"grammar": 'start: "a" NUMBER\nNUMBER: /[0-9]{2}/'}, "a[0-9]{2}"),
        ({"grammar": 'root ::= "b" [0-9] [0-9]'}, "b[0-9]{2}"),
        ({"json_object": True}, r"\{.*\}"),
    ],
)  # fmt: skip
def test_structured_outputs_by_chat_and_completion(
    sdk: openai.OpenAI, asked: dict[str, Any], pattern: str
) -> None:
    options: Any = {"model": MODEL, "seed": 4, "max_tokens": 200, "extra_body": {"structured_outputs": asked}}
    chat = sdk.chat.completions.create(messages=QUESTION, **options).choices[0]
    text = sdk.completions.create(prompt="Paris is", **options).choices[0]
    for output, reason in ((chat.message.content or "", chat.finish_reason), (text.text, text.finish_reason)):
        assert reason == "length" or re.fullmatch(pattern, output, re.DOTALL), output
    if "json_object" not in asked:
        assert chat.finish_reason == "stop"


def test_a_grammar_says_where_the_end_is(sdk: openai.OpenAI) -> None:
    """Neither ignore_eos nor min_tokens can make it go on, and max_tokens may cut it."""
    body = {"structured_outputs": {"choice": ["yes", "no"]}, "ignore_eos": True, "min_tokens": 20}
    choice = sdk.chat.completions.create(model=MODEL, messages=QUESTION, extra_body=body).choices[0]
    assert choice.message.content in ("yes", "no") and choice.finish_reason == "stop"
    cut = sdk.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=2,
        extra_body={"structured_outputs": {"regex": "[a-z]{90}"}},
    )  # fmt: skip
    assert cut.choices[0].finish_reason == "length"


def test_logprobs_are_the_models_own(sdk: openai.OpenAI) -> None:
    choice = sdk.chat.completions.create(
        model=MODEL, messages=QUESTION, logprobs=True, top_logprobs=2, temperature=0,
        extra_body={"structured_outputs": {"choice": ["zebra"]}},
    ).choices[0]  # fmt: skip
    assert choice.logprobs is not None and choice.logprobs.content is not None
    first = choice.logprobs.content[0]
    assert first.logprob < -2 and len(first.top_logprobs) == 2
    assert first.top_logprobs[0].logprob > first.logprob


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"json_schema": City.model_json_schema()}, r"\{.*\}"),
        ({"json_schema": json.dumps({"enum": ["Seine", "Rhône"]})}, '"Seine"|"Rhône"'),
        ({"json_object": True}, r"\{.*"),  # which a small model does not always end
        ({"regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"choice": ["left", "right"]}, "left|right"),
        ({"grammar": 'start: "x" | "y"'}, "x|y"),
    ],
)
def test_structured_output_by_grpc(running: Cluster, asked: dict[str, Any], pattern: str) -> None:
    with pagoda.Client(running.grpc) as client:
        answer = client.chat(QUESTION, structured_output=asked, temperature=0, max_tokens=150)
        assert re.fullmatch(pattern, answer.text, re.DOTALL), answer
        assert client.generate("Paris is", structured_output=asked, temperature=0, max_tokens=150).text


def test_errors_by_grpc(running: Cluster) -> None:
    with pagoda.Client(running.grpc) as client:
        for asked, field in (
            ({"regex": "["}, "structured_output.regex"),
            ({"json_schema": {"type": "foo"}}, "structured_output.json_schema"),
            ({"grammar": "start: nothing"}, "structured_output.grammar"),
            ({"grammar": "start: <|no_such_token|>"}, "structured_output.grammar"),
        ):
            with pytest.raises(pagoda.InvalidRequest) as refused:
                client.generate("x", structured_output=asked)
            assert refused.value.field == field


def test_a_grammar_of_a_direct_client(running: Cluster, judge: Judge) -> None:
    """llguidance's own form, with parts that it forces; the vocabulary is what the gateway has told."""
    grammar = 'start: "Antananarivo: " /[a-c]{3}/'
    sampling = pb.SamplingParams(grammar=grammar, temperature=0)
    request = pb.GenerateTokensRequest(prompt_token_ids=[5, 6, 7], sampling=sampling)
    with grpc.insecure_channel(running.scheduler.address) as channel:
        responses = list(rpc.SchedulerServiceStub(channel).GenerateTokens(request))
    output = [token for response in responses for token in response.token_ids]
    judge.assert_follows(grammar, output, ended=True)
    assert re.fullmatch("Antananarivo: [a-c]{3}", judge.text(output))


# --------------------------------------------------------------------------------------- what may happen


def test_a_worker_dies_in_the_middle(running: Cluster, undisturbed: list[tuple[str, str]]) -> None:
    async def disturbed() -> list[dict[str, Any]]:
        wanted = [*map(schema, NUMBERS), LONG, LONG]
        asking = asyncio.create_task(ask(running.url, wanted, temperature=0))
        await asyncio.to_thread(wait_until, lambda: _num_output(running) > 40, 60, "they are in the middle")
        worker = running.workers["w0"]
        worker.popen.kill()
        await asyncio.to_thread(worker.popen.wait)
        await asyncio.to_thread(running.start_worker, "w0")
        return await asking

    answers = asyncio.run(disturbed())
    assert texts(answers) == undisturbed
    for wanted, (text, reason) in zip(map(schema, NUMBERS), texts(answers), strict=False):
        assert reason == "length" or problem_of(wanted, text) is None


def _num_output(running: Cluster) -> int:
    snapshot = running.snapshot(requests=True)
    return sum(sample.output_tokens for request in snapshot.requests for sample in request.samples)


@pytest.mark.parametrize(("depth", "num_blocks", "ranks"), [(1, 40, 1), (3, 512, 1), (2, 512, 2)])
def test_depth_preemption_and_ranks_change_nothing(
    undisturbed: list[tuple[str, str]], depth: int, num_blocks: int, ranks: int
) -> None:
    with cluster(
        dtype="float32",
        scheduler_args=("--max-inflight", str(depth), "--no-prefix-cache"),
        worker_args=("--num-blocks", str(num_blocks), "--tensor-parallel", str(ranks)),
        gateway_args=(),
    ) as services:
        answers = asyncio.run(ask(services.url, [*map(schema, NUMBERS), LONG, LONG], temperature=0))
        assert texts(answers) == undisturbed
        assert (services.snapshot().num_preemptions > 0) == (num_blocks == 40)


def test_a_client_that_leaves(running: Cluster, sdk: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": QUESTION, "temperature": 0}
    options["response_format"] = format_of(LONG)
    with sdk.chat.completions.create(stream=True, max_tokens=400, **options) as stream:
        for _, _ in zip(range(6), stream, strict=False):
            pass
    running.assert_idle()
    after = sdk.chat.completions.create(max_tokens=30, **options).choices[0].message.content or ""
    assert after.startswith("[")
