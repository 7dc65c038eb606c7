"""Prompts' own logprobs: echoed in OpenAI's shape, in vLLM's, and over gRPC."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel

from gateway_svc.generation import Generation, GenerationSpec, Job
from gateway_svc.metrics import Metrics
from gateway_svc.openai.logprobs import CompletionLogprobsBuilder
from gateway_svc.rpc import service
from gateway_svc.text.detokenize import TokenBytes
from pagoda.v1 import inference_pb2 as pb
from pagoda.v1 import scheduler_pb2
from tests.unit.gateway.conftest import MODEL, ids_of, model_tokenizer
from tests.unit.gateway.fake_scheduler import FakeScheduler, prompt_logprob

TEXT = "Hello 世界 👋🏽!"
CHAT = [{"role": "user", "content": "Say hello"}]
PROMPT = "Grüße, 世界! A cat"
Shape = list[dict[str, dict[str, Any]] | None]


def vllm_shape(ids: list[int], num_top: int) -> Shape:
    """What `prompt_logprobs` must be."""
    table = model_tokenizer().verbatim

    def entry(token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": logprob, "rank": rank, "decoded_token": table[token].decode("utf-8", "replace")}

    shape: Shape = [None]
    for token in ids[1:]:
        said = prompt_logprob(token, num_top)
        best = zip(said.top_ids, said.top_logprobs, strict=True)
        shape.append(
            {str(token): entry(token, said.logprob, said.rank)}
            | {str(i): entry(i, value, rank) for rank, (i, value) in enumerate(best, start=1)}
        )
    return shape


async def completion(sdk: Any, stream: bool, **options: Any) -> list[dict[str, Any]]:
    """The choices, those of a stream put together."""
    if not stream:
        answer = await sdk.completions.create(model=MODEL, **options)
        return [choice.model_dump() for choice in answer.choices]
    whole: dict[int, dict[str, Any]] = {}
    async for chunk in await sdk.completions.create(model=MODEL, stream=True, **options):
        for choice in chunk.choices:
            piece = choice.model_dump()
            into = whole.setdefault(choice.index, piece)
            if into is piece:
                continue
            assert "prompt_logprobs" not in piece, "the first chunk has them"
            into["text"] += piece["text"]
            into["finish_reason"] = piece["finish_reason"]
            for name, values in (piece["logprobs"] or {}).items():
                into["logprobs"][name] += values
    return [whole[index] for index in sorted(whole)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_a_step", [1, 4])
async def test_echo_with_logprobs(sdk: Any, fake: FakeScheduler, stream: bool, tokens_a_step: int) -> None:
    """Each choice of several prompts and samples begins with its prompt: text, tokens, offsets, logprobs."""
    fake.tokens_a_step = tokens_a_step
    prompts = [PROMPT, "One", "two three"]
    choices = await completion(sdk, stream, prompt=prompts, n=2, echo=True, logprobs=2)
    assert all(request.sampling.prompt_logprobs == 2 for request in fake.submitted)
    assert len(choices) == 6
    for i, choice in enumerate(choices):
        prompt, got = prompts[i // 2], choice["logprobs"]
        ids = ids_of(prompt)
        assert choice["text"] == prompt + TEXT
        count = len(ids) + len(ids_of(TEXT)) + 1  # and EOS
        assert [len(got[name]) for name in sorted(got)] == [count] * 4
        assert got["token_logprobs"][: len(ids)] == [None, *(-token / 8 for token in ids[1:])]
        assert got["top_logprobs"][0] is None
        for token, top in zip(ids[1:], got["top_logprobs"][1:], strict=False):
            values = dict.fromkeys([-0.25, -0.5, -token / 8])
            assert list(top.values()) == list(values)
        text, offsets, tokens = choice["text"], got["text_offset"], got["tokens"]
        for token, start in zip(tokens[:-1], offsets, strict=False):
            assert token.startswith("bytes:") or text.startswith(token, start)
        assert offsets[0] == 0 and offsets[len(ids)] == len(prompt) and offsets[-1] == len(text)


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_alone(sdk: Any, fake: FakeScheduler, stream: bool) -> None:
    """max_tokens 0: the prompt and nothing else. One token is drawn, and is nobody's."""
    for draws in ([*ids_of(TEXT), 2], [2]):
        fake.script = lambda request, index, draws=draws: draws  # type: ignore[misc]
        (choice,) = await completion(sdk, stream, prompt=PROMPT, echo=True, logprobs=0, max_tokens=0)
        assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
        ids = ids_of(PROMPT)
        assert choice["logprobs"]["token_logprobs"] == [None, *(-token / 8 for token in ids[1:])]
        assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"][1:])
    assert [request.sampling.max_tokens for request in fake.submitted] == [1, 1]
    answer = await sdk.completions.create(model=MODEL, prompt=PROMPT, echo=True, max_tokens=0)
    assert answer.choices[0].text == PROMPT and answer.choices[0].logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids_of(PROMPT)), 0)
    assert not fake.submitted[-1].sampling.HasField("prompt_logprobs")


async def test_echo_of_tokens(sdk: Any) -> None:
    """Tokens that are no text of their own: the first is half of a character, and special ones count."""
    half = ids_of("👋")[1:]
    ids = [*half, 1, *ids_of("hi")]
    (choice,) = await completion(sdk, False, prompt=ids, echo=True, logprobs=1)
    text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    assert text == await model_tokenizer().decode(ids) + TEXT
    place = text.index("<|im_start|>")
    assert offsets[len(half) : len(half) + 2] == [place, place + len("<|im_start|>")]
    assert offsets[len(ids)] == len(text) - len(TEXT)


@pytest.mark.parametrize("stream", [False, True])
async def test_vllms_shape_of_completions(sdk: Any, fake: FakeScheduler, stream: bool) -> None:
    choices = await completion(sdk, stream, prompt=[PROMPT, "x"], n=2, extra_body={"prompt_logprobs": 3})
    assert [choice["text"] for choice in choices] == [TEXT] * 4, "no echo"
    assert all(choice["logprobs"] is None for choice in choices)
    for choice, prompt in zip(choices, (PROMPT, PROMPT, "x", "x"), strict=True):
        assert choice["prompt_logprobs"] == vllm_shape(ids_of(prompt), 3)
    # Beside an echo that wants fewer, and one that wants more.
    for echoed, asked in ((1, 3), (3, 1)):
        extra = {"prompt_logprobs": asked}
        (choice,) = await completion(sdk, stream, prompt=PROMPT, echo=True, logprobs=echoed, extra_body=extra)
        assert fake.submitted[-1].sampling.prompt_logprobs == 3
        assert {len(entry) for entry in choice["prompt_logprobs"][1:]} == {asked + 1}
        assert all(
            len(top) <= echoed + 1 for top in choice["logprobs"]["top_logprobs"][1 : len(ids_of(PROMPT))]
        )


async def test_vllms_shape_of_chats(sdk: Any, fake: FakeScheduler) -> None:
    options = {"model": MODEL, "messages": CHAT, "n": 2, "extra_body": {"prompt_logprobs": 2}}
    answer = await sdk.chat.completions.create(**options)
    ids = list(fake.submitted[0].prompt_token_ids)
    assert answer.model_extra["prompt_logprobs"] == vllm_shape(ids, 2)
    chunks = [chunk async for chunk in await sdk.chat.completions.create(stream=True, **options)]
    told = [
        chunk.model_extra["prompt_logprobs"] for chunk in chunks if "prompt_logprobs" in chunk.model_extra
    ]
    assert told == [vllm_shape(ids, 2)] and "prompt_logprobs" in chunks[0].model_extra
    for index in range(2):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == TEXT
    silent = await sdk.chat.completions.create(model=MODEL, messages=CHAT)
    assert "prompt_logprobs" not in silent.model_extra


@pytest.mark.parametrize("tokens_a_step", [1, 50])
async def test_grpc(
    stub: Any, fake: FakeScheduler, tokens_a_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything of a sample, in messages of a bounded size, and with the ids that they are of."""
    monkeypatch.setattr(service, "MOST_LOGPROBS", 3)
    fake.tokens_a_step = tokens_a_step
    sampling = scheduler_pb2.SamplingParams(prompt_logprobs=2, n=2)
    call = stub.Generate(pb.GenerateRequest(text=PROMPT, sampling=sampling))
    responses = [response async for response in call]
    ids = ids_of(PROMPT)
    told = [i for i, response in enumerate(responses) if response.prompt_logprobs]
    assert told == list(range(-(-(len(ids) - 1) // 3)))
    assert [entry for r in responses for entry in r.prompt_logprobs] == [
        prompt_logprob(i, 2) for i in ids[1:]
    ]
    assert [list(r.prompt_token_ids) for r in responses if r.prompt_token_ids] == [ids]
    assert not any(responses[i].token_ids or responses[i].text for i in told)
    assert responses[0].request_id and responses[-1].HasField("usage")
    assert "".join(r.text for r in responses if r.index == 1) == TEXT


# ---------------------------------------------------------------------------------------------- offsets


def word_table(skip_special: bool) -> TokenBytes:
    """A vocabulary that marks spaces, with a special token that a tokenizer may put first."""
    words = ["<s>", "▁Once", "▁upon", "▁a", "time"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>"])
    return TokenBytes(tokenizer, skip_special)


@pytest.mark.parametrize(
    ("text", "ids", "offsets"),
    [
        ("Once upon a", [0, 1, 2, 3], [0, 0, 4, 9]),  # <s> is not in the text, nor is the first space
        (" Once upon", [0, 1, 2], [0, 0, 5]),
        ("<s> Once a", [0, 1, 3], [0, 3, 8]),  # here somebody wrote it
        ("Once", [0, 0, 1, 4, 4], [0, 0, 0, 4, 4]),  # an altered text: never beyond its end
    ],
)
def test_offsets_of_what_the_tokenizer_adds(text: str, ids: list[int], offsets: list[int]) -> None:
    job = Job(Metrics("m", CollectorRegistry()), 0.0, False)
    spec = GenerationSpec("id", ids, scheduler_pb2.SamplingParams(n=1))
    generation = Generation(spec, word_table(True), job)
    generation.prompt_logprobs = [prompt_logprob(i, 0) for i in ids[1:]]
    builder = CompletionLogprobsBuilder(word_table(False), 0)
    assert builder.prompt(generation, text, word_table(True)).text_offset == offsets
    assert builder.piece([2], [prompt_logprob(2, 0)]).text_offset == [len(text)]


def test_a_resubmission_brings_all_of_them_again_or_none() -> None:
    """Until something was drawn the scheduler starts over; from then on it has told them."""
    job = Job(Metrics("m", CollectorRegistry()), 0.0, True)
    spec = GenerationSpec("id", [5, 6, 7], scheduler_pb2.SamplingParams(n=1, prompt_logprobs=0))
    generation = Generation(spec, model_tokenizer().visible, job)
    generation.prompt_logprobs.append(prompt_logprob(6, 0))
    assert not generation.request().resume and generation.prompt_logprobs == []
    generation.prompt_logprobs += [prompt_logprob(6, 0), prompt_logprob(7, 0)]
    generation.on_row(0, [9], [], 0, 1.0)
    assert generation.request().resume and len(generation.prompt_logprobs) == 2
