"""`pagoda.swift` against a scripted server: arguments, templates, history, what streams hand out."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

import pagoda
from pagoda import swift
from pagoda.cli.cluster import ClusterError, programs_of
from pagoda.errors import InvalidRequest
from pagoda.swift import private
from pagoda.swift.engine import Engine, get_vllm_engine
from pagoda.swift.generation import VllmGenerationConfig
from pagoda.swift.inference import inference_stream_vllm, inference_vllm
from pagoda.swift.table import MODELS, ModelType
from pagoda.swift.templates import (
    QWEN_JINJA,
    TEMPLATES,
    get_default_template_type,
    get_template,
)
from pagoda.v1 import inference_pb2 as pb
from pagoda.v1 import scheduler_pb2 as spb
from tests.unit.client.scripted import ScriptedServer, failure, last, play, serving, token

TURNS = [["q1", "r1"], ["q2", "r2"]]


@pytest.fixture
def engine_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an engine that has joined a server."""
    engines: list[Engine] = []

    def make(server: ScriptedServer) -> Engine:
        monkeypatch.setenv("PAGODA_URL", server.target)
        engines.append(get_vllm_engine("m"))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


# ------------------------------------------------------------------------------------- names, templates


def test_importing_it_loads_next_to_nothing() -> None:
    heavy = "{'grpc', 'torch', 'transformers', 'rich'}"
    code = f"import sys, pagoda.swift; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    for name in swift.__all__:
        assert getattr(swift, name)


def test_model_types_are_plain_names() -> None:
    assert ModelType.qwen_7b_chat == "qwen-7b-chat"
    assert ModelType.qwen1half_0_5b_chat == "qwen1half-0_5b-chat"
    assert all(getattr(ModelType, name) in MODELS for name in dir(ModelType))
    with pytest.raises(AttributeError, match="qwen_7b_chat"):
        ModelType.qwen7b_chat  # noqa: B018
    assert MODELS["qwen-7b-chat"].modelscope == "qwen/Qwen-7B-Chat"


def test_every_types_template_is_known() -> None:
    assert all(get_template(get_default_template_type(name)) for name in MODELS)
    assert get_default_template_type(ModelType.qwen_7b_chat) == "qwen"
    assert get_default_template_type("my-own") == "default"
    with pytest.raises(InvalidRequest, match=r"no-such.*default, llama3, mistral, qwen, qwen2_5") as wrong:
        get_template("no-such")
    assert wrong.value.field == "template_type"
    with pytest.raises(InvalidRequest, match="max_length"):
        get_template("qwen", None, max_length=100)


def test_qwen_renders_as_it_is_written() -> None:
    template = get_template("qwen")
    assert template.prompt({"query": "Q"})["prompt"] == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.prompt({"query": "Q", "system": "S", "history": [("q", "r")]})["prompt"] == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nr<|im_end|>\n"
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.prompt({"query": "Q", "system": ""})["prompt"].startswith("<|im_start|>user\nQ")
    mine = get_template("qwen", default_system="mine")
    assert mine.prompt({"query": "Q"})["prompt"].startswith("<|im_start|>system\nmine<|im_end|>")


@pytest.mark.parametrize("request_", [{"query": "Q"}, {"query": "Q", "system": "S", "history": TURNS}])
def test_the_servers_form_of_qwen_says_the_same(request_: dict[str, Any]) -> None:
    import jinja2

    template = get_template("qwen")
    messages = template.messages(request_)
    asked = messages if "system" in request_ else messages[1:]  # a server adds the default itself
    rendered = jinja2.Template(QWEN_JINJA, keep_trailing_newline=True).render(
        messages=asked, add_generation_prompt=True
    )
    assert rendered == template.prompt(request_)["prompt"]


@pytest.mark.parametrize("template_type", [name for name in TEMPLATES if name != "qwen"])
def test_the_models_own_template_gets_the_chat(template_type: str) -> None:
    request = {"query": "Q", "history": [["q", "r"]], "system": "S"}
    assert get_template(template_type).prompt(request) == {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "r"},
            {"role": "user", "content": "Q"},
        ]
    }


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"query": 7}, "query"),
        ({"query": "Q", "history": ["q", "r"]}, "history"),
        ({"query": "Q", "history": [["q", None]]}, "history"),
        ({"query": "Q", "system": 1}, "system"),
        ({"query": "Q", "images": ["x.png"]}, "images"),
    ],
)
def test_what_is_not_a_request_is_named(request_: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        get_template("qwen").prompt(request_)
    assert wrong.value.field == field


# ------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "argument",
    [
        {"enable_lora": True},
        {"tensor_parallel_size": 0},
        {"use_async": True},
        {"limit_mm_per_prompt": {"image": 1}},
        {"pipeline_parallel_size": 2},
        {"torch_dtype": "float16"},
        {"engine_kwargs": {"swap_space": 4}},
        {"no_such_argument": None},
    ],
)
def test_an_argument_that_is_not_supported_is_named(
    argument: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PAGODA_URL", raising=False)
    name = next(iter(argument.get("engine_kwargs", argument)))
    with pytest.raises(InvalidRequest, match=name) as wrong:
        get_vllm_engine(ModelType.smollm2_135m_instruct, **argument)
    assert wrong.value.field == name


def test_arguments_reach_the_cluster() -> None:
    spec = private.spec_of(
        "qwen-7b-chat",
        Path("/m"),
        dtype="bf16",
        device="cuda",
        tensor_parallel_size=2,
        gpu_memory_utilization=0.5,
        max_model_len=100,
        engine_kwargs={"max_num_seqs": 8, "disable_log_stats": True, "block_size": None},
        http_port=0,
    )
    assert (spec.model, spec.device, spec.dtype, spec.http_port) == ("/m", "cuda", "bfloat16", 0)
    assert spec.tensor_parallel == 2
    assert " ".join(spec.worker_args) == (
        "--served-model-name qwen-7b-chat --max-slots 8 --gpu-memory-utilization 0.5 --max-model-len 100"
    )
    assert spec.gateway_args == ("--served-model-name", "qwen-7b-chat")


def test_two_gpus_that_the_program_names_hold_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks take the GPUs from the variable, which they inherit, and need it as it is now."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    spec = private.spec_of("qwen-7b-chat", Path("/m"), device="cuda", tensor_parallel_size=2)
    worker = programs_of(replace(spec, more_metrics_ports=(1, 2)))[1]
    assert worker.argv[worker.argv.index("--tensor-parallel") + 1] == "2" and not worker.environment
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ClusterError, match="1 can be seen"):
        programs_of(replace(spec, more_metrics_ports=(1, 2)))


@pytest.mark.parametrize(("visible", "device"), [(None, "cuda"), ("1", "cuda"), ("", "cpu"), ("-1", "cpu")])
def test_the_device_is_what_is_visible_now(
    visible: str | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private.Path, "glob", lambda self, pattern: iter([Path("0000:01:00.0")]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert private.visible_device() == device
    monkeypatch.setattr(private.Path, "glob", lambda self, pattern: iter([]))
    assert private.visible_device() == "cpu"


def test_the_generations_defaults_and_other_names() -> None:
    config = VllmGenerationConfig()
    assert config.options() == {
        "max_tokens": 64,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "stop": [],
    }
    assert (config.num_beams, config.n) == (1, 1)
    config.max_tokens = 7
    config.do_sample, config.top_k, config.seed = False, -1, 5
    options = config.options()
    assert (config.max_new_tokens, options["temperature"], options["seed"]) == (7, 0.0, 5)
    assert "top_k" not in options
    config.n = 3
    assert config.options() == options | {"n": 3}
    config.num_beams, config.early_stopping = 4, "never"
    assert config.options() == {
        "max_tokens": 7,
        "repetition_penalty": 1.0,
        "stop": [],
        "n": 3,
        "beam_width": 4,
        "length_penalty": 1.0,
        "early_stopping": "never",
    }
    for name, value in (("n", 5), ("n", 0), ("num_beams", 0)):
        wrong = VllmGenerationConfig(**{"num_beams": 4, name: value})  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match=name) as error:
            wrong.options()
        assert error.value.field == name
    with pytest.raises(AttributeError):
        config.max_length = 5  # type: ignore[attr-defined]


# -------------------------------------------------------------------------------------------- inference


def test_a_batch_keeps_its_order_and_the_history(engine_of: Any) -> None:
    with serving(play(token(1, text="he"), last(2, text="llo"))) as server:
        engine = engine_of(server)
        engine.generation_config.max_new_tokens = 9
        requests = [{"query": "a"}, {"query": "b", "history": TURNS, "system": "S"}]
        info = {"left over": 1}
        responses = inference_vllm(engine, get_template("default"), requests, generation_info=info)
    assert [r["response"] for r in responses] == ["hello", "hello"]
    assert responses[0]["history"] == [["a", "hello"]]
    assert responses[1]["history"] == [*TURNS, ["b", "hello"]]
    assert requests[1]["history"] is TURNS and len(TURNS) == 2, "the caller's history is not touched"
    assert set(info) == {
        *("num_prompt_tokens", "num_generated_tokens", "num_samples", "runtime", "samples/s", "tokens/s")
    }
    assert (info["num_prompt_tokens"], info["num_generated_tokens"], info["num_samples"]) == (6, 4, 2)
    assert info["tokens/s"] == pytest.approx(4 / info["runtime"])
    assert info["samples/s"] == pytest.approx(2 / info["runtime"])
    asked = {len(r.chat.messages): r for r in server.requests}
    assert [m.content for m in asked[6].chat.messages] == ["S", "q1", "r1", "q2", "r2", "b"]
    assert (asked[1].sampling.max_tokens, asked[1].sampling.top_k, asked[1].model) == (9, 50, "m")


def test_several_answers_to_one_query(engine_of: Any) -> None:
    samples = play(token(1, text="he", index=1), token(2, text="no"), last(3, text="llo", index=1), last(4))
    requests = [{"query": "a"}]
    with serving(samples) as server:
        engine = engine_of(server)
        config = VllmGenerationConfig(n=2)
        (response,) = inference_vllm(engine, get_template("default"), requests, generation_config=config)
        assert response == {"response": "noe", "history": [["a", "noe"]], "responses": ["noe", "hello"]}
        stream = inference_stream_vllm(engine, get_template("default"), requests, generation_config=config)
        assert [r[0]["responses"] for r in stream][-1] == ["noe", "hello"]
    assert server.requests[0].sampling.n == 2
    with serving(play(last(1, text="best"), last(2, text="next", index=1))) as server:
        engine = engine_of(server)
        config = VllmGenerationConfig(num_beams=3, n=2)
        (response,) = inference_vllm(engine, get_template("default"), requests, generation_config=config)
    assert response["responses"] == ["best", "next"]
    assert (server.requests[0].sampling.beam_width, server.requests[0].sampling.HasField("top_k")) == (
        3,
        False,
    )


def test_the_templates_end_of_an_answer_is_told_to_the_server(engine_of: Any) -> None:
    with serving(play(last(1))) as server:
        engine = engine_of(server)
        config = VllmGenerationConfig(stop=["STOP"])
        inference_vllm(engine, get_template("qwen"), [{"query": "a"}], generation_config=config)
        engine._tokens["<|im_end|>"] = 77  # as where the tokenizer has it as one token
        inference_vllm(engine, get_template("qwen"), [{"query": "a"}], generation_config=config)
    assert list(server.requests[0].stop) == ["STOP", "<|im_end|>"]
    assert list(server.requests[1].sampling.stop_token_ids) == [77]
    assert server.requests[0].text.endswith("<|im_start|>assistant\n")


def test_a_stream_hands_out_texts_so_far_and_none_before_the_first(engine_of: Any) -> None:
    slow_may_go = asyncio.Event()  # of the server's loop
    loops: list[asyncio.AbstractEventLoop] = []
    seen: list[list[str | None]] = []

    async def act(request: pb.GenerateRequest, _: Any) -> AsyncIterator[pb.GenerateResponse]:
        slow = request.chat.messages[0].content == "slow"
        loops.append(asyncio.get_running_loop())
        if slow:
            await slow_may_go.wait()
        for response in (token(1, text="one "), token(2, text="two "), last(3, text="three")):
            yield response

    with serving(act) as server:
        engine, info = engine_of(server), {}
        requests = [{"query": "slow"}, {"query": "fast"}]
        for responses in inference_stream_vllm(
            engine, get_template("default"), requests, generation_info=info
        ):
            seen.append([r and r["response"] for r in responses])
            if seen[-1][1] == "one two three":
                loops[0].call_soon_threadsafe(slow_may_go.set)
            assert info["num_generated_tokens"] == sum(len((t or "").split()) for t in seen[-1])
        assert seen[0][0] is None and seen[-1] == ["one two three", "one two three"]
        for place in (0, 1):
            texts = [entry[place] or "" for entry in seen]
            assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
        assert responses[0]["history"] == [["slow", "one two three"]]
        assert (info["num_prompt_tokens"], info["num_generated_tokens"], info["num_samples"]) == (6, 6, 2)


def test_a_lone_requests_entry_is_never_none(engine_of: Any) -> None:
    with serving(play(pb.GenerateResponse(token_ids=[1]), last(2, text="x"))) as server:
        stream = inference_stream_vllm(engine_of(server), get_template("default"), [{"query": "q"}])
        texts = [responses[0]["response"] for responses in stream]
    assert texts[-1] == "x" and set(texts) <= {"", "x"}


def test_no_requests_are_answered_at_once(engine_of: Any) -> None:
    with serving(play(last(0))) as server:
        engine, info = engine_of(server), {}
        assert inference_vllm(engine, get_template("default"), [], generation_info=info) == []
        assert list(inference_stream_vllm(engine, get_template("default"), [])) == []
        assert info["num_samples"] == 0 and not server.requests


def test_closing_a_stream_cancels_the_requests(engine_of: Any) -> None:
    with serving(play(token(1), "hang")) as server:
        stream = inference_stream_vllm(engine_of(server), get_template("default"), [{"query": "q"}] * 3)
        next(stream)
        stream.close()
        assert server.cancelled.wait(20)


def test_an_error_is_raised_and_the_others_are_cancelled(engine_of: Any) -> None:
    with serving(play(failure(grpc.StatusCode.INVALID_ARGUMENT, "no", field="text")), play("hang")) as server:
        with pytest.raises(InvalidRequest) as wrong:
            inference_vllm(engine_of(server), get_template("default"), [{"query": "q"}] * 3)
        assert wrong.value.field == "text"


def test_a_request_that_the_engine_gave_up_is_an_error(engine_of: Any) -> None:
    given_up = play(token(1, finish=spb.FINISH_REASON_ERROR))
    with serving(given_up) as server, pytest.raises(pagoda.ServerError, match="place 0"):
        inference_vllm(engine_of(server), get_template("default"), [{"query": "q"}])


def test_more_requests_than_go_at_once(engine_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagoda.swift.inference.MAX_AT_ONCE", 4)
    with serving(play(last(1, text="x"))) as server:
        responses = inference_vllm(
            engine_of(server), get_template("default"), [{"query": str(i)} for i in range(30)], use_tqdm=True
        )
        assert [r["history"][0][0] for r in responses] == [str(i) for i in range(30)]
        assert server.most_running <= 4


@pytest.mark.parametrize(
    "argument", [{"lora_request": object()}, {"verbose": True}, {"what": 1}, {"generation_config": {}}]
)
def test_an_argument_of_inference_that_is_not_supported_is_named(
    engine_of: Any, argument: dict[str, Any]
) -> None:
    with serving(play(last(1))) as server:
        with pytest.raises(InvalidRequest, match=next(iter(argument))):
            inference_vllm(engine_of(server), get_template("default"), [{"query": "q"}], **argument)
        assert not server.requests


async def test_inside_a_running_event_loop(engine_of: Any) -> None:
    with serving(play(token(1, text="he"), last(2, text="y"))) as server:
        engine = engine_of(server)
        responses = inference_vllm(engine, get_template("default"), [{"query": "q"}] * 2)
        assert [r["response"] for r in responses] == ["hey", "hey"]
        *_, end = inference_stream_vllm(engine, get_template("default"), [{"query": "q"}])
        assert end[0]["response"] == "hey"


def test_the_tokenizer_is_looked_for_when_it_is_used_and_never_downloaded(
    engine_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("PAGODA_CACHE", "MODELSCOPE_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr("pagoda.hubs.HUBS", ())
    with serving(play(last(1))) as server:
        engine = engine_of(server)
        engine.model_type = "qwen-7b-chat"
        assert get_template("qwen", engine.hf_tokenizer).tokenizer
        with pytest.raises(FileNotFoundError, match="PAGODA_CACHE/models/qwen-7b-chat"):
            engine.hf_tokenizer.encode("hi")


def test_a_server_of_another_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(play(last(1))) as server:
        monkeypatch.setenv("PAGODA_URL", server.target)
        with pytest.raises(InvalidRequest, match=f"{server.target} serves m, not qwen-7b-chat"):
            get_vllm_engine(ModelType.qwen_7b_chat)
