"""The SDK against a scripted server, each case with both clients."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import pytest

import pagoda
from pagoda import TokenLogprob, calls, progress
from pagoda.v1 import inference_pb2 as pb
from pagoda.v1 import scheduler_pb2 as spb
from tests.unit.client.scripted import failure, last, play, resumed, serving, token

UNAVAILABLE = failure(grpc.StatusCode.UNAVAILABLE, "going away")


def run_sync(target: str, body: Callable[[Any], Any], **options: Any) -> Any:
    with pagoda.Client(target, backoff_s=0.01, **options) as client:
        return body(client)


def run_async(target: str, body: Callable[[Any], Any], **options: Any) -> Any:
    async def main() -> Any:
        async with pagoda.AsyncClient(target, backoff_s=0.01, **options) as client:
            result = body(client)
            return await result if inspect.isawaitable(result) else result

    return asyncio.run(main())


@pytest.fixture(params=[run_sync, run_async], ids=["sync", "async"])
def run(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_generate_gathers_text_ids_logprobs_and_usage(run: Any) -> None:
    first = token(0, 1)
    first.logprobs.add(logprob=-0.5, rank=1, top_ids=[0, 7], top_logprobs=[-0.5, -2.0])
    first.logprobs.add(logprob=-1.5, rank=2)
    with serving(play(first, last(2))) as server:
        done = run(server.target, lambda c: c.generate("hi", temperature=0.5, logprobs=2))
    assert (done.text, done.token_ids, done.finish_reason) == ("abc", (0, 1, 2), "stop")
    assert done.samples[0].logprobs[0].top == ((0, -0.5), (7, -2.0))
    assert done.samples[0].logprobs[1].rank == 2
    assert done.usage == pagoda.Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=1)
    assert server.requests[0].text == "hi"
    assert done.request_id == server.requests[0].request_id != ""


def test_options_land_in_their_fields(run: Any) -> None:
    options: dict[str, Any] = {
        "model": "m", "temperature": 0.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "presence_penalty": 1.0,
        "frequency_penalty": -1.0, "repetition_penalty": 1.2, "logit_bias": {3: -100.0}, "seed": 2**63,
        "n": 2, "max_tokens": 9, "min_tokens": 1, "stop_token_ids": [4, 5], "ignore_eos": True, "logprobs": 0,
        "stop": "END", "include_stop_str_in_output": True, "skip_special_tokens": False, "request_id": "mine",
        "priority": -3, "cache_salt": "s",
    }  # fmt: skip
    with serving(play(token(0), last(1, index=1))) as server:
        run(server.target, lambda c: c.generate([1, 2, 3], **options))
    request = server.requests[0]
    assert list(request.token_ids.ids) == [1, 2, 3]
    assert (request.model, list(request.stop), request.request_id) == ("m", ["END"], "mine")
    assert (request.priority, request.cache_salt, request.include_stop_str_in_output) == (-3, "s", True)
    assert request.HasField("skip_special_tokens") and not request.skip_special_tokens
    sampling = request.sampling
    assert sampling.HasField("temperature") and sampling.temperature == 0
    assert (sampling.top_k, sampling.seed, sampling.n, sampling.max_tokens) == (5, 2**63, 2, 9)
    assert (dict(sampling.logit_bias), list(sampling.stop_token_ids)) == ({3: -100.0}, [4, 5])
    assert sampling.HasField("logprobs") and sampling.ignore_eos


@pytest.mark.parametrize(
    ("asked", "form"),
    [
        ({"json_object": True}, {"json_object": True}),
        ({"json_schema": {"enum": ["é"]}}, {"json_schema": '{"enum": ["é"]}'}),
        ({"json_schema": '{"type": "null"}'}, {"json_schema": '{"type": "null"}'}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"choice": ["a", "b"]}, {"choice": {"texts": ["a", "b"]}}),
        ({"choice": "a"}, {"choice": {"texts": ["a"]}}),
        ({"grammar": "start: /a/"}, {"grammar": "start: /a/"}),
    ],
)
def test_structured_output_lands_in_its_form(run: Any, asked: Any, form: Any) -> None:
    with serving(play(last(0))) as server:
        run(server.target, lambda c: c.generate("hi", structured_output=asked))
    assert server.requests[0].structured_output == pb.StructuredOutput(**form)


def test_every_option_is_known_to_the_builder() -> None:
    known = calls._ON_REQUEST | calls._ON_SAMPLING | calls._ELSEWHERE
    assert set(pagoda.types.Options.__annotations__) == known


def test_chat_and_its_samples(run: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好 🌍"}]
    with serving(play(token(0, index=1), token(1), last(2), last(3, index=1))) as server:
        done = run(server.target, lambda c: c.chat(messages, n=2, continue_final_message=True))
    assert [m.content for m in server.requests[0].chat.messages] == ["Be brief.", "你好 🌍"]
    assert server.requests[0].chat.continue_final_message
    assert [s.text for s in done.samples] == ["bc", "ad"]


def test_an_interrupted_stream_goes_on_where_it_was(run: Any) -> None:
    with serving(
        play(token(0), token(1), UNAVAILABLE),
        play(token(2), UNAVAILABLE),
        play(failure(grpc.StatusCode.ALREADY_EXISTS, "still running")),
        play(last(3)),
    ) as server:
        done = run(server.target, lambda c: c.generate("hi", max_tokens=4))
    assert (done.text, done.token_ids) == ("abcd", (0, 1, 2, 3))
    assert [resumed(r) for r in server.requests] == [
        [],
        [([0, 1], False)],
        [([0, 1, 2], False)],
        [([0, 1, 2], False)],
    ]
    assert len({r.request_id for r in server.requests}) == 1
    assert len({r.sampling.seed for r in server.requests}) == 1
    assert server.requests[0].sampling.HasField("seed")


def test_a_server_that_takes_up_no_request_again(run: Any) -> None:
    refusal = failure(grpc.StatusCode.INVALID_ARGUMENT, "resume: no", field="resume")
    acts = play(token(0), UNAVAILABLE), play(refusal)
    with serving(*acts) as server, pytest.raises(pagoda.Unavailable, match="going away"):
        run(server.target, lambda c: c.generate("hi"))


def test_a_resumed_request_names_the_samples_that_had_ended(run: Any) -> None:
    with serving(
        play(last(0, index=1), token(1, index=2), UNAVAILABLE),
        play(last(5, index=2), last(6)),
    ) as server:
        done = run(server.target, lambda c: c.generate("hi", n=3))
    assert resumed(server.requests[1]) == [([], False), ([0], True), ([1], False)]
    assert [s.token_ids for s in done.samples] == [(6,), (0,), (1, 5)]


@pytest.mark.parametrize("options", [{"best_of": 3}, {"beam_width": 3, "early_stopping": "never"}])
def test_results_that_come_whole_are_made_again_and_told_once(run: Any, options: Any) -> None:
    first, second = last(0), last(1, 2, index=1)
    first.score, second.score = -0.5, -1.5
    first.ClearField("usage")
    chunks: list[pagoda.Chunk] = []

    async def follow(client: pagoda.AsyncClient) -> pagoda.Completion:
        async with client.stream("hi", n=2, **options) as stream:
            chunks.extend([chunk async for chunk in stream])
            return stream.completion

    async def both(target: str) -> pagoda.Completion:
        async with pagoda.AsyncClient(target, backoff_s=0.01) as client:
            return await follow(client)

    with serving(play(first, UNAVAILABLE), play(first, second)) as server:
        done = run(server.target, lambda c: c.generate("hi", n=2, **options))
        server.acts = [play(first, UNAVAILABLE), play(first, second)]
        asyncio.run(both(server.target))
    assert [(s.token_ids, s.text, s.score) for s in done.samples] == [((0,), "a", -0.5), ((1, 2), "bc", -1.5)]
    assert done.usage is not None
    assert not any(request.resume for request in server.requests)
    assert len({r.sampling.seed for r in server.requests[:2]}) == 1
    assert "".join(chunk.text for chunk in chunks) == "abc", "what came before the loss is not repeated"
    if "beam_width" in options:
        assert server.requests[0].sampling.early_stopping == spb.EARLY_STOPPING_NEVER


@pytest.mark.parametrize("value", ["sometimes", 1, 0.0, [True]])
def test_early_stopping_is_one_of_three(run: Any, value: Any) -> None:
    with serving(play(last(0))) as server, pytest.raises(pagoda.InvalidRequest) as wrong:
        run(server.target, lambda c: c.generate("hi", beam_width=2, early_stopping=value))
    assert wrong.value.field == "sampling.early_stopping"


def test_losing_only_the_end_of_the_stream_is_no_loss(run: Any) -> None:
    with serving(play(last(0), UNAVAILABLE)) as server:
        assert run(server.target, lambda c: c.generate("hi")).text == "a"
    assert len(server.requests) == 1


def told(*tokens: int, ids: Sequence[int] = ()) -> pb.GenerateResponse:
    """A response with the logprobs of some of a prompt's tokens, and the ids of all of them."""
    entries = [spb.TokenLogprob(logprob=-t, rank=t, top_ids=[t, 0], top_logprobs=[-t, -9]) for t in tokens]
    return pb.GenerateResponse(prompt_logprobs=entries, prompt_token_ids=ids)


def test_a_prompts_logprobs_come_once(run: Any) -> None:
    """A try that drew nothing is begun anew, and what it said of the prompt is not said again."""
    prompt, broken = [9, 1, 2, 3, 4, 5], failure(grpc.StatusCode.UNAVAILABLE)
    expected = tuple(TokenLogprob(t, -t, t, ((t, -t), (0, -9))) for t in prompt[1:])
    first = play(told(1, 2, 3, ids=prompt), broken)
    second = play(told(1, 2, ids=prompt), told(3, 4), broken)
    third = play(told(1, 2, 3, 4, 5, ids=prompt), token(0), broken)
    with serving(first, second, third, play(last(1))) as server:
        done = run(server.target, lambda c: c.generate("hi", prompt_logprobs=2))
    assert done.prompt_logprobs == expected and done.text == "ab"
    assert server.requests[0].sampling.prompt_logprobs == 2
    assert [resumed(r) for r in server.requests] == [[], [], [], [([0], False)]]


def test_progress_resets_the_count_of_retries(run: Any) -> None:
    acts = [play(token(i), UNAVAILABLE) for i in range(6)]
    with serving(*acts, play(last(6))) as server:
        assert run(server.target, lambda c: c.generate("hi"), max_retries=1).text == "abcdefg"


def test_retries_end(run: Any) -> None:
    with serving(play(UNAVAILABLE)) as server, pytest.raises(pagoda.Unavailable, match="going away"):
        run(server.target, lambda c: c.generate("hi"), max_retries=2)
    assert len(server.requests) == 3


def test_nobody_there(run: Any) -> None:
    with serving(play(last(0))) as server:
        target = server.target
    with pytest.raises(pagoda.Unavailable):
        run(target, lambda c: c.generate("hi"), max_retries=1)


def test_overload_waits_as_long_as_the_server_asks(run: Any) -> None:
    full = failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full", retry_ms=300)
    with serving(play(full), play(last(0))) as server:
        begin = time.monotonic()
        assert run(server.target, lambda c: c.generate("hi")).text == "a"
    assert time.monotonic() - begin >= 0.3


def test_overload_that_outlasts_the_retries_or_the_timeout(run: Any) -> None:
    full = failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full", retry_ms=30_000)
    with serving(play(full)) as server:
        for options in ({"max_retries": 0}, {"timeout": 5.0}):
            with pytest.raises(pagoda.Overloaded) as refused:
                run(server.target, lambda c: c.generate("hi"), **options)
            assert refused.value.retry_after == 30.0


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (failure(grpc.StatusCode.INVALID_ARGUMENT, "n", field="sampling.n"), pagoda.InvalidRequest),
        (failure(grpc.StatusCode.NOT_FOUND), pagoda.NotFound),
        (failure(grpc.StatusCode.UNAUTHENTICATED), pagoda.Unauthenticated),
        (failure(grpc.StatusCode.PERMISSION_DENIED), pagoda.Unauthenticated),
        (failure(grpc.StatusCode.ALREADY_EXISTS), pagoda.AlreadyExists),
        (failure(grpc.StatusCode.CANCELLED), pagoda.Cancelled),
        (failure(grpc.StatusCode.DEADLINE_EXCEEDED), pagoda.DeadlineExceeded),
        (failure(grpc.StatusCode.INTERNAL), pagoda.ServerError),
        (failure(grpc.StatusCode.UNIMPLEMENTED), pagoda.ServerError),
    ],
)
def test_errors_are_typed_and_not_tried_again(run: Any, status: grpc.Status, kind: Any) -> None:
    with serving(play(status)) as server, pytest.raises(kind) as refused:
        run(server.target, lambda c: c.generate("hi"))
    assert len(server.requests) == 1
    assert refused.value.request_id == server.requests[0].request_id
    if kind is pagoda.InvalidRequest:
        assert refused.value.field == "sampling.n"
    if kind is pagoda.ServerError:
        assert refused.value.code in ("INTERNAL", "UNIMPLEMENTED")


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("hi", {"n": -1}, "sampling.n"),
        ("hi", {"temperature": "hot"}, "sampling.temperature"),
        ("hi", {"logit_bias": {-1: 0.0}}, "sampling.logit_bias"),
        ("hi", {"stop": [1]}, "stop"),
        ("hi", {"structured_output": {}}, "structured_output"),
        ("hi", {"structured_output": {"regex": "a", "choice": ["b"]}}, "structured_output"),
        ("hi", {"structured_output": {"xml": "a"}}, "structured_output"),
        ("hi", {"structured_output": {"regex": 5}}, "structured_output.regex"),
        ("hi", {"structured_output": {"choice": [5]}}, "structured_output.choice"),
        ("hi", {"structured_output": {"json_schema": {1j: 2}}}, "structured_output.json_schema"),
        ("\ud800", {}, "text"),
        ([1, -2], {}, "token_ids"),
        ([1, 2**32], {}, "token_ids"),
        (["a"], {}, "token_ids"),
    ],
)
def test_values_that_fit_no_field_never_leave(run: Any, prompt: Any, options: Any, field: str) -> None:
    with serving(play(last(0))) as server, pytest.raises(pagoda.InvalidRequest) as refused:
        run(server.target, lambda c: c.generate(prompt, **options))
    assert refused.value.field == field
    assert not server.requests


def test_a_misspelt_option_is_an_error(run: Any) -> None:
    with pytest.raises(TypeError, match="temprature"):
        run("127.0.0.1:1", lambda c: c.generate("hi", temprature=1))


def test_timeout_covers_the_call(run: Any) -> None:
    with serving(play(token(0), "hang")) as server:
        with pytest.raises(pagoda.DeadlineExceeded):
            run(server.target, lambda c: c.generate("hi", timeout=0.5))
        assert server.cancelled.wait(20)


def test_the_token_is_presented(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGODA_TOKEN", "from-env")
    with serving(play(last(0))) as server:
        run(server.target, lambda c: c.generate("hi"), token="given")
        run(server.target, lambda c: c.generate("hi"))
        run(server.target, lambda c: c.generate("hi"), token="")
    assert [m.get("authorization") for m in server.metadata] == ["Bearer given", "Bearer from-env", None]


def test_tokenize_and_models_with_a_retry(run: Any) -> None:
    with serving(play(last(0))) as server:
        server.unary_failures = [UNAVAILABLE]
        assert run(server.target, lambda c: c.tokenize("ab")) == [97, 98]
        server.unary_failures = [UNAVAILABLE]
        assert run(server.target, lambda c: c.models())[0].eos_token_ids == (2,)
        assert len(run(server.target, lambda c: c.tokenize([{"role": "u", "content": "x"}]))) == 2
        server.unary_failures = [failure(grpc.StatusCode.INVALID_ARGUMENT, "bad", field="text")]
        with pytest.raises(pagoda.InvalidRequest):
            run(server.target, lambda c: c.tokenize("ab"))


def test_batch_keeps_the_order_and_the_bound(run: Any) -> None:
    async def slowly(request: Any, _: Any) -> Any:
        number = int(request.text or "9")
        await asyncio.sleep(0.02 * (9 - number))
        yield last(number)

    items: list[Any] = [{"prompt": str(i), "max_tokens": i + 1} for i in range(9)] + [
        [{"role": "u", "content": "x"}]
    ]
    with serving(slowly) as server:
        done = run(server.target, lambda c: c.batch(items, concurrency=4, temperature=0.0))
    assert [d.token_ids[0] for d in done] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert 1 < server.most_running <= 4
    assert {r.sampling.max_tokens for r in server.requests} == set(range(10))


def test_batch_reports_errors_in_place_or_raises_the_first(run: Any) -> None:
    async def picky(request: Any, context: Any) -> Any:
        if request.text == "bad":
            await context.abort_with_status(failure(grpc.StatusCode.INVALID_ARGUMENT, "bad", field="text"))
        yield last(0)

    items: list[Any] = ["ok", "bad", {"prompt": "ok", "messages": []}, "ok"]
    with serving(picky) as server:
        done = run(server.target, lambda c: c.batch(items, return_errors=True))
        assert [type(d).__name__ for d in done] == [
            "Completion",
            "InvalidRequest",
            "InvalidRequest",
            "Completion",
        ]
        with pytest.raises(pagoda.InvalidRequest):
            run(server.target, lambda c: c.batch(["ok", "bad"]))
        assert run(server.target, lambda c: c.batch([])) == []


def test_the_first_error_of_a_batch_cancels_the_rest(run: Any) -> None:
    async def picky(request: Any, context: Any) -> Any:
        yield token(0)
        if request.text == "bad":
            await asyncio.to_thread(server.wait_running, 3)
            await context.abort_with_status(failure(grpc.StatusCode.NOT_FOUND))
        await asyncio.sleep(60)

    with serving(picky) as server:
        begin = time.monotonic()
        with pytest.raises(pagoda.NotFound):
            run(server.target, lambda c: c.batch(["slow", "bad", "slow"], concurrency=3))
        assert server.cancelled.wait(20)
    assert time.monotonic() - begin < 30


def test_sync_stream_closes_at_the_end_of_its_block_and_from_another_thread() -> None:
    with serving(play(token(0), "hang")) as server, pagoda.Client(server.target) as client:
        with client.stream("hi") as stream:
            assert next(stream).text == "a"
        assert server.cancelled.wait(20)
        assert stream.completion.text == "a"
        server.cancelled.clear()
        stream = client.stream("hi")
        assert next(stream).token_ids == (0,)
        threading.Timer(0.2, stream.close).start()
        with pytest.raises(pagoda.Cancelled):
            next(stream)
        assert server.cancelled.wait(20)


def test_a_dropped_sync_stream_is_cancelled() -> None:
    with serving(play(token(0), "hang")) as server, pagoda.Client(server.target) as client:
        for _ in client.stream("hi"):
            break
        assert server.cancelled.wait(20)


def test_closing_ends_the_wait_between_tries() -> None:
    with serving(play(UNAVAILABLE)) as server, pagoda.Client(server.target, backoff_s=60) as client:
        stream = client.stream("hi")
        threading.Timer(0.3, stream.close).start()
        begin = time.monotonic()
        with pytest.raises(pagoda.Cancelled):
            next(stream)
        assert time.monotonic() - begin < 30


async def test_async_stream_closes_at_the_end_of_its_block_and_from_another_task() -> None:
    with serving(play(token(0), "hang")) as server:
        async with pagoda.AsyncClient(server.target) as client:
            async with client.stream("hi") as stream:
                assert (await anext(stream)).text == "a"
            assert await asyncio.to_thread(server.cancelled.wait, 20)
            server.cancelled.clear()
            stream = client.stream("hi")
            await anext(stream)
            asyncio.get_running_loop().call_later(0.2, lambda: asyncio.ensure_future(stream.aclose()))
            with pytest.raises(pagoda.Cancelled):
                await anext(stream)
            assert await asyncio.to_thread(server.cancelled.wait, 20)


async def test_a_dropped_async_stream_is_cancelled() -> None:
    with serving(play(token(0), "hang")) as server:
        async with pagoda.AsyncClient(server.target) as client:
            async for _ in client.stream("hi"):
                break
            assert await asyncio.to_thread(server.cancelled.wait, 20)


async def test_cancelling_the_task_cancels_the_request() -> None:
    with serving(play(token(0), "hang")) as server:
        async with pagoda.AsyncClient(server.target) as client:
            task = asyncio.create_task(client.generate("hi"))
            await asyncio.to_thread(server.wait_running, 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.cancelled.wait, 20)


async def test_async_closing_ends_the_wait_between_tries() -> None:
    with serving(play(UNAVAILABLE)) as server:
        async with pagoda.AsyncClient(server.target, backoff_s=60) as client:
            stream = client.stream("hi")
            asyncio.get_running_loop().call_later(0.3, lambda: asyncio.ensure_future(stream.aclose()))
            async with asyncio.timeout(30):
                with pytest.raises(pagoda.Cancelled):
                    await anext(stream)


def test_a_message_that_is_too_large_is_not_called_overload() -> None:
    with (
        serving(play(last(0))) as server,
        pagoda.Client(server.target) as client,
        pytest.raises(pagoda.InvalidRequest, match="larger than max"),
    ):
        client.generate("x" * (5 << 20))


def test_urls() -> None:
    assert calls.target_of("host:1") == ("host:1", False)
    assert calls.target_of("http://host:1/") == ("host:1", False)
    assert calls.target_of("grpcs://host:1") == ("host:1", True)
    assert calls.target_of("unix:///run/p.sock") == ("unix:///run/p.sock", False)
    with pytest.raises(pagoda.InvalidRequest):
        pagoda.AsyncClient("ftp://host:1")


def test_finish_reasons_cover_the_enum() -> None:
    assert set(progress._FINISH_REASONS) == set(spb.FinishReason.values())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import pagoda", {"grpc", "google", "pydantic", "typer", "rich", "structlog", "asyncio"}),
        (
            "import pagoda.v1.inference_pb2, pagoda.v1.scheduler_pb2",
            {"grpc", "pydantic", "asyncio", "google.rpc"},
        ),
        ("import pagoda.client, pagoda.aio", {"pydantic", "typer", "rich", "structlog", "numpy"}),
        ("import pagoda.cli.main", {"grpc", "pydantic", "structlog", "numpy", "supervisor", "asyncio"}),
    ],
)
def test_importing_pulls_in_no_more_than_it_must(statement: str, absent: set[str]) -> None:
    code = f"import sys; {statement}; print(sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_everything_promised_at_the_top_is_there() -> None:
    for name in pagoda.__all__:
        assert getattr(pagoda, name).__name__ == name
    assert set(pagoda.__all__) <= set(dir(pagoda))
    with pytest.raises(AttributeError):
        pagoda.Nothing  # noqa: B018
