"""Tools over HTTP, through the openai SDK: what the model is told, what is read out of what it says."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest

from gateway_svc.openai.schema import MAX_LOGPROBS
from tests.unit.gateway.conftest import MODEL, Running, ids_of, model_tokenizer
from tests.unit.gateway.fake_scheduler import FakeScheduler

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, CLOCK]
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
ARGUMENTS = '{"city": "Saint-Étienne 👋🏽 \\"x\\" {}"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
SAID = f'Let me see.\n{CALL}\n<tool_call>\n{{"name": "now"}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "now"}}
ID = re.compile(r"call_[a-zA-Z0-9]{24}")


def says(fake: FakeScheduler, *texts: str) -> None:
    """Let sample i of every request be this text."""
    fake.script = lambda request, index: [*ids_of(texts[index]), 2]


def prompt_of(fake: FakeScheduler) -> str:
    """The prompt of the last request, as text."""
    table = model_tokenizer().verbatim
    return b"".join(table[i] for i in fake.submitted[-1].prompt_token_ids).decode()


def body(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": ASK, "tools": TOOLS, **more}


async def test_calls(sdk: Any, fake: FakeScheduler) -> None:
    says(fake, SAID)
    answer = await sdk.chat.completions.create(**body())
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    calls = choice.message.tool_calls
    assert [(call.type, call.function.name, call.function.arguments) for call in calls] == [
        ("function", "get_weather", ARGUMENTS),
        ("function", "now", "{}"),
    ]
    assert all(ID.fullmatch(call.id) for call in calls) and calls[0].id != calls[1].id
    assert answer.usage.completion_tokens == len(ids_of(SAID)) + 1
    assert not fake.submitted[-1].sampling.grammar, "nothing is forced"


@pytest.mark.parametrize("tokens_a_step", [1, 5, 1000])
async def test_streamed_calls(sdk: Any, fake: FakeScheduler, tokens_a_step: int) -> None:
    says(fake, SAID)
    fake.tokens_a_step = tokens_a_step
    chunks = [c async for c in await sdk.chat.completions.create(**body(stream=True))]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "Let me see."
    parts = [call for delta in deltas for call in delta.tool_calls or ()]
    firsts = [part for part in parts if part.id]
    assert [(p.index, p.type, p.function.name) for p in firsts] == [
        (0, "function", "get_weather"),
        (1, "function", "now"),
    ]
    assert all(part.type is part.function.name is None for part in parts if not part.id)
    arguments = ["".join(p.function.arguments for p in parts if p.index == i) for i in (0, 1)]
    assert arguments == [ARGUMENTS, "{}"]
    if tokens_a_step == 1:
        assert len(parts) > 6, "arguments come as they are made"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(reasons) - 1) + ["tool_calls"]


@pytest.mark.parametrize("tokens_a_step", [1, 1000])
async def test_the_stream_helper(sdk: Any, fake: FakeScheduler, tokens_a_step: int) -> None:
    says(fake, SAID)
    fake.tokens_a_step = tokens_a_step
    async with sdk.chat.completions.stream(**body()) as stream:
        kinds = [event.type async for event in stream]
        message = (await stream.get_final_completion()).choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds
    assert message.content == "Let me see."
    assert [(call.function.name, call.function.arguments) for call in message.tool_calls] == [
        ("get_weather", ARGUMENTS),
        ("now", "{}"),
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_samples_of_their_own(sdk: Any, fake: FakeScheduler, stream: bool) -> None:
    says(fake, CALL, "It is sunny.")
    if stream:
        names: dict[int, list[str]] = {0: [], 1: []}
        texts, reasons = ["", ""], ["", ""]
        async for chunk in await sdk.chat.completions.create(**body(n=2, stream=True)):
            (choice,) = chunk.choices
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            calls = choice.delta.tool_calls or ()
            names[choice.index] += [call.function.name for call in calls if call.id]
        assert (names, texts) == ({0: ["get_weather"], 1: []}, ["", "It is sunny."])
        assert reasons == ["tool_calls", "stop"]
        return
    first, second = (await sdk.chat.completions.create(**body(n=2))).choices
    assert first.message.content is None and len(first.message.tool_calls) == 1
    assert second.message.content == "It is sunny." and second.message.tool_calls is None
    assert (first.finish_reason, second.finish_reason) == ("tool_calls", "stop")


@pytest.mark.parametrize("stream", [False, True])
async def test_no_tool_calls_where_there_are_none(
    http: httpx.AsyncClient, fake: FakeScheduler, stream: bool
) -> None:
    """Text passes unchanged, also one that looks like a call; the field is absent."""
    text = '  <tool_call>{"name": "nobody"}</tool_call>\n{"name": "Paris"}\n\n'
    says(fake, text)
    response = await http.post("/v1/chat/completions", json=body(stream=stream))
    assert "tool_calls" not in response.text
    if stream:
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        said = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    else:
        said = response.json()["choices"][0]["message"]["content"]
    assert said == text


async def test_without_tools_nothing_is_read(sdk: Any, fake: FakeScheduler) -> None:
    says(fake, SAID)
    for more in ({"tool_choice": "none"}, {"tools": openai.NOT_GIVEN}, {"tools": []}):
        choice = (await sdk.chat.completions.create(**body(**more))).choices[0]
        assert (choice.message.content, choice.finish_reason) == (SAID, "stop")
        assert "get_weather" not in prompt_of(fake)


@pytest.mark.parametrize("stream", [False, True])
async def test_one_call_at_a_time(sdk: Any, fake: FakeScheduler, stream: bool) -> None:
    says(fake, SAID)
    options = body(parallel_tool_calls=False)
    if stream:
        chunks = [c async for c in await sdk.chat.completions.create(stream=True, **options)]
        parts = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
        assert {part.index for part in parts} == {0}
        assert "".join(part.function.arguments for part in parts) == ARGUMENTS
        return
    (call,) = (await sdk.chat.completions.create(**options)).choices[0].message.tool_calls
    assert call.function.name == "get_weather"


async def test_a_call_that_max_tokens_cuts(sdk: Any, fake: FakeScheduler) -> None:
    """What there is of its arguments comes, and why it ended, as OpenAI does it."""
    says(fake, CALL)
    most = len(ids_of(CALL)) - 12
    choice = (await sdk.chat.completions.create(**body(max_tokens=most))).choices[0]
    (call,) = choice.message.tool_calls
    assert (
        choice.finish_reason == "length"
        and ARGUMENTS.startswith(call.function.arguments)
        and call.function.arguments
    )
    chunks = [c async for c in await sdk.chat.completions.create(**body(max_tokens=most, stream=True))]
    parts = [part for c in chunks for part in c.choices[0].delta.tool_calls or ()]
    assert "".join(part.function.arguments for part in parts) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_broken_arguments_are_content(sdk: Any, fake: FakeScheduler) -> None:
    text = 'See.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": Paris}}\n</tool_call>'
    says(fake, text)
    choice = (await sdk.chat.completions.create(**body())).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")
    chunks = [c async for c in await sdk.chat.completions.create(**body(stream=True))]
    told = "".join(part.function.arguments for c in chunks for part in c.choices[0].delta.tool_calls or ())
    said = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert told == '{"city": ' and said == "See.Paris}}\n</tool_call>", "what was sent is not sent again"
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_of_calls(sdk: Any, fake: FakeScheduler, stream: bool) -> None:
    says(fake, CALL)
    options = body(logprobs=True, top_logprobs=MAX_LOGPROBS)
    if stream:
        chunks = [c async for c in await sdk.chat.completions.create(stream=True, **options)]
        entries = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    else:
        entries = (await sdk.chat.completions.create(**options)).choices[0].logprobs.content
    assert len(entries) == len(ids_of(CALL)) + 1


# ------------------------------------------------------------------------------------------ what is asked for


async def test_a_template_without_tools_gets_a_system_message(sdk: Any, fake: FakeScheduler) -> None:
    says(fake, "ok")
    await sdk.chat.completions.create(**body())
    prompt = prompt_of(fake)
    assert prompt.startswith("<|im_start|>system\n# Tools") and prompt.count("<|im_start|>system") == 1
    assert json.dumps(WEATHER["function"]) in prompt and "<tool_call>" in prompt
    await sdk.chat.completions.create(**body(messages=[{"role": "system", "content": "Be brief."}, *ASK]))
    assert prompt_of(fake).startswith("<|im_start|>system\nBe brief.\n\n# Tools")


async def test_results_go_back(sdk: Any, fake: FakeScheduler) -> None:
    """A second turn, with what the SDK made of the first."""
    says(fake, SAID)
    message = (await sdk.chat.completions.create(**body())).choices[0].message
    turns = [*ASK, message.model_dump(exclude_none=True)]
    turns += [
        {"role": "tool", "tool_call_id": call.id, "content": f"r{i}"}
        for i, call in enumerate(message.tool_calls)
    ]
    says(fake, "It is sunny.")
    answer = await sdk.chat.completions.create(**body(messages=turns))
    assert answer.choices[0].message.content == "It is sunny."
    end = prompt_of(fake).partition("Paris?<|im_end|>\n")[2]
    results = "The result of get_weather is:\nr0\n\nThe result of now is:\nr1"
    said = SAID.replace('"now"}', '"now", "arguments": {}}')
    assert end == (
        f"<|im_start|>assistant\n{said}<|im_end|>\n<|im_start|>user\n{results}<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_tokenize_counts_tools_too(http: httpx.AsyncClient, sdk: Any, fake: FakeScheduler) -> None:
    says(fake, "ok")
    await sdk.chat.completions.create(**body())
    reply = await http.post("/tokenize", json={"messages": ASK, "tools": TOOLS})
    assert reply.json()["tokens"] == list(fake.submitted[-1].prompt_token_ids)


async def test_choices_that_force_a_call(sdk: Any, fake: FakeScheduler) -> None:
    says(fake, CALL)

    async def grammar(**more: Any) -> str:
        await sdk.chat.completions.create(**body(**more))
        return fake.submitted[-1].sampling.grammar

    required = await grammar(tool_choice="required")
    assert "get_weather" in required and "now" in required
    named = await grammar(tool_choice=NAMED)
    assert "get_weather" not in named and "now" in named
    assert await grammar(tool_choice="required", parallel_tool_calls=False) != required
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    assert "get_weather" in await grammar(tools=[strict])
    assert '"strict"' not in prompt_of(fake), "that is not for the model"
    form = {"type": "json_object"}
    assert "get_weather" in await grammar(response_format=form), "either a call or such text"
    assert "get_weather" not in await grammar(response_format=form, tool_choice="none")
    assert await grammar(tool_choice="auto") == ""


@pytest.mark.parametrize(
    ("parser", "text", "id_pattern"),
    [
        ("llama3", '{"name": "now", "parameters": {}}', ID),
        ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}}]', re.compile("[a-zA-Z0-9]{9}")),
        ("mistral", "[TOOL_CALLS]now[ARGS]{}", re.compile("[a-zA-Z0-9]{9}")),
        ("json", '{"name": "now", "arguments": {}}', ID),
    ],
)
async def test_the_format_can_be_chosen(
    start: Running, fake: FakeScheduler, parser: str, text: str, id_pattern: re.Pattern[str]
) -> None:
    server = await start(tool_call_parser=parser)
    says(fake, text)
    url = f"http://127.0.0.1:{server.http.port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as sdk:
        (call,) = (await sdk.chat.completions.create(**body())).choices[0].message.tool_calls
    assert call.function.name == "now" and id_pattern.fullmatch(call.id)


async def test_special_tokens_of_calls_are_seen(fake: FakeScheduler) -> None:
    """Though special tokens are skipped. `<file_sep>` is one of the embedded model's."""
    tokenizer = model_tokenizer()
    ids = [tokenizer.special_id(text) for text in ("<file_sep>", "<filename>")]
    assert [tokenizer.table(True)[i] for i in ids if i is not None] == [b"", b""]
    seen = tokenizer.table(True, ("<file_sep>", "no token"))
    assert [seen[i] for i in ids if i is not None] == [b"<file_sep>", b""]
    assert tokenizer.table(True, ("<file_sep>",)) is seen, "made once"
    assert tokenizer.table(False, ("<file_sep>",)) is tokenizer.verbatim
