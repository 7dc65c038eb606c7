"""The openai SDK against the gateway: chat, streams, completions, logprobs, n."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.unit.gateway.conftest import MODEL, ids_of, model_tokenizer
from tests.unit.gateway.fake_scheduler import FakeScheduler

TEXT = "Hello 世界 👋🏽!"
CHAT = [{"role": "user", "content": "Say hello"}]


async def test_models(sdk: Any) -> None:
    models = await sdk.models.list()
    assert [m.id for m in models.data] == [MODEL]
    assert (await sdk.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError):
        await sdk.models.retrieve("another")


async def test_chat(sdk: Any, fake: FakeScheduler) -> None:
    fake.cached_tokens = 16
    answer = await sdk.chat.completions.create(model=MODEL, messages=CHAT, temperature=0)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    request = fake.submitted[0]
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
    assert answer.usage.completion_tokens == len(ids_of(TEXT)) + 1, "EOS counts"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 16
    assert request.sampling.temperature == 0 and request.sampling.HasField("temperature")
    assert not request.sampling.HasField("max_tokens"), "a chat may be as long as fits"


@pytest.mark.parametrize("tokens_a_step", [1, 4])
async def test_chat_stream(sdk: Any, fake: FakeScheduler, tokens_a_step: int) -> None:
    fake.tokens_a_step = tokens_a_step
    stream = await sdk.chat.completions.create(
        model=MODEL, messages=CHAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(texts) == TEXT
    assert all("\ufffd" not in text for text in texts)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(ids_of(TEXT)) + 1
    assert len({chunk.id for chunk in chunks}) == 1


async def test_no_usage_unless_asked_for(sdk: Any) -> None:
    stream = await sdk.chat.completions.create(model=MODEL, messages=CHAT, stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


async def test_n_samples(sdk: Any, fake: FakeScheduler) -> None:
    fake.script = lambda request, index: [*ids_of(f"sample {index}"), 2]
    answer = await sdk.chat.completions.create(model=MODEL, messages=CHAT, n=3, seed=7)
    assert [c.message.content for c in answer.choices] == ["sample 0", "sample 1", "sample 2"]
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert fake.submitted[0].sampling.seed == 7 and fake.submitted[0].sampling.n == 3
    texts = ["", "", ""]
    async for chunk in await sdk.chat.completions.create(model=MODEL, messages=CHAT, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["sample 0", "sample 1", "sample 2"]


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(sdk: Any, fake: FakeScheduler, stream: bool) -> None:
    options = {"model": MODEL, "messages": CHAT, "logprobs": True, "top_logprobs": 2}
    if stream:
        chunks = [c async for c in await sdk.chat.completions.create(stream=True, **options)]
        entries = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    else:
        entries = (await sdk.chat.completions.create(**options)).choices[0].logprobs.content
    assert len(entries) == len(ids_of(TEXT)) + 1, "one entry for each token that counts"
    assert b"".join(bytes(e.bytes) for e in entries).decode() == TEXT + "<|im_end|>"
    assert all(e.logprob == -0.25 and len(e.top_logprobs) == 2 for e in entries)
    assert entries[0].token == "Hello"


async def test_completion(sdk: Any, fake: FakeScheduler) -> None:
    answer = await sdk.completions.create(model=MODEL, prompt="Once", echo=True)
    assert answer.choices[0].text == "Once" + TEXT
    assert list(fake.submitted[0].prompt_token_ids) == ids_of("Once")
    assert fake.submitted[0].sampling.max_tokens == 16


async def test_completion_stream(sdk: Any) -> None:
    stream = await sdk.completions.create(model=MODEL, prompt="Once", stream=True, echo=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks) == "Once" + TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("one", [ids_of("one")]),
        (["one", "two three"], [ids_of("one"), ids_of("two three")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
async def test_forms_of_prompts(
    sdk: Any, fake: FakeScheduler, prompt: object, expected: list[list[int]]
) -> None:
    fake.script = lambda request, index: [*ids_of(f"{len(request.prompt_token_ids)}/{index}"), 2]
    answer = await sdk.completions.create(model=MODEL, prompt=prompt, n=2)  # type: ignore[call-overload]
    assert [list(r.prompt_token_ids) for r in fake.submitted] == expected
    assert [c.text for c in answer.choices] == [f"{len(ids)}/{i}" for ids in expected for i in (0, 1)]
    assert [c.index for c in answer.choices] == list(range(2 * len(expected)))
    assert answer.usage.prompt_tokens == sum(map(len, expected))
    assert len({r.request_id for r in fake.submitted}) == len(expected)


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs_with_echo(sdk: Any, stream: bool) -> None:
    options = {"model": MODEL, "prompt": "A cat", "echo": True, "logprobs": 2}
    if stream:
        chunks = [c async for c in await sdk.completions.create(stream=True, **options)]
        pieces = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
        tokens = [t for p in pieces for t in p.tokens]
        values = [v for p in pieces for v in p.token_logprobs]
        offsets = [o for p in pieces for o in p.text_offset]
        tops = [t for p in pieces for t in p.top_logprobs]
    else:
        logprobs = (await sdk.completions.create(**options)).choices[0].logprobs
        tokens, values = logprobs.tokens, logprobs.token_logprobs
        offsets, tops = logprobs.text_offset, logprobs.top_logprobs
    count = len(ids_of("A cat"))
    assert tokens[: count + 1] == ["A", " cat", "Hello"]
    own = [-token / 8 for token in ids_of("A cat")]
    assert values[:count] == [None, *own[1:]] and tops[0] is None
    assert set(values[count:]) == {-0.25}
    assert all(tops[i][tokens[i]] == values[i] for i in range(1, len(tokens)))
    text = "A cat" + TEXT + "<|im_end|>"
    assert text[offsets[count] :].startswith("Hello") and offsets == sorted(offsets)
    # A token that is part of a character is spelt in bytes.
    assert any(token.startswith("bytes:\\x") for token in tokens)


async def test_stop_strings(sdk: Any, fake: FakeScheduler) -> None:
    ids = ids_of("one two three four five")
    fake.script = lambda request, index: [*ids, *ids_of(" six" * 400), 2]
    answer = await sdk.chat.completions.create(model=MODEL, messages=CHAT, stop=["ee fo", "zzz"])
    choice = answer.choices[0]
    assert choice.message.content == "one two thr"
    assert choice.finish_reason == "stop" and choice.model_extra["stop_reason"] == "ee fo"
    assert answer.usage.completion_tokens == 4, "the token that completes it counts, no later one"
    assert fake.stopped == [(fake.submitted[0].request_id, 0, 1)], "FINISHED, for that sample"
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=CHAT, stop="ee fo", extra_body={"include_stop_str_in_output": True}
    )
    assert answer.choices[0].message.content == "one two three fo"


async def test_one_of_several_samples_stops(sdk: Any, fake: FakeScheduler) -> None:
    fake.script = lambda request, index: [*ids_of(["stop here please", "go on and on"][index]), 2]
    answer = await sdk.completions.create(model=MODEL, prompt="x", n=2, stop=" here", max_tokens=50)
    assert [c.text for c in answer.choices] == ["stop", "go on and on"]
    assert [index for _, index, _ in fake.stopped] == [0]


async def test_parameters_reach_the_scheduler(sdk: Any, fake: FakeScheduler) -> None:
    await sdk.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": [{"type": "text", "text": t} for t in ("Hi", "you")]}],
        temperature=0.5,
        top_p=0.75,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": 2.0},
        max_completion_tokens=9,
        seed=-1,
        user="someone",
        extra_body={
            "top_k": 3,
            "min_p": 0.25,
            "repetition_penalty": 1.5,
            "stop_token_ids": [7],
            "min_tokens": 2,
            "ignore_eos": True,
            "priority": -3,
            "cache_salt": "salt",
            "request_id": "mine",
            "what_is_this": {"unknown": True},
        },
    )
    request = fake.submitted[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.75, 3, 0.25)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.repetition_penalty, sampling.min_tokens, sampling.max_tokens) == (1.5, 2, 9)
    assert dict(sampling.logit_bias) == {5: 2.0} and list(sampling.stop_token_ids) == [7]
    assert sampling.ignore_eos and sampling.seed == 2**64 - 1
    assert (request.priority, request.cache_salt, request.request_id) == (-3, "salt", "mine")
    assert "Hi\nyou" in await model_tokenizer().decode(request.prompt_token_ids)


async def test_a_seed_is_minted(sdk: Any, fake: FakeScheduler) -> None:
    for _ in range(3):
        await sdk.completions.create(model=MODEL, prompt="x")
    seeds = {request.sampling.seed for request in fake.submitted}
    assert len(seeds) == 3 and max(seeds) >= 2**32, "64 bits each"


async def test_return_token_ids(sdk: Any, fake: FakeScheduler) -> None:
    extra = {"return_token_ids": True}
    answer = await sdk.chat.completions.create(model=MODEL, messages=CHAT, extra_body=extra)
    assert answer.choices[0].model_extra["token_ids"] == [*ids_of(TEXT), 2]
    assert answer.model_extra["prompt_token_ids"] == list(fake.submitted[0].prompt_token_ids)
    stream = await sdk.chat.completions.create(model=MODEL, messages=CHAT, stream=True, extra_body=extra)
    ids = [i async for c in stream for i in c.choices[0].model_extra.get("token_ids", [])]
    assert ids == [*ids_of(TEXT), 2]


async def test_special_tokens(sdk: Any, fake: FakeScheduler) -> None:
    """They are left out unless asked for; the token that ended the sample is never text."""
    fake.script = lambda request, index: [1, *ids_of("hi"), 2]
    options = {"model": MODEL, "prompt": "x"}
    assert (await sdk.completions.create(**options)).choices[0].text == "hi"
    shown = await sdk.completions.create(**options, extra_body={"skip_special_tokens": False})
    assert shown.choices[0].text == "<|im_start|>hi"


async def test_errors_of_the_sdk(sdk: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.chat.completions.create(model=MODEL, messages=CHAT, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        await sdk.chat.completions.create(model="gpt-4", messages=CHAT)
    assert missing.value.code == "model_not_found"
