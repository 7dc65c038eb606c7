"""Bad input to the live services: an error that names the field or file, nothing left, and they go on.

What the gateway checks by itself is tested one by one beside it; here is one of each kind, through every door
and every tier, each followed by a good request.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gguf
import grpc
import httpx
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from pagoda.internal.v1 import worker_pb2 as wire
from pagoda.models import EMBEDDED_MODEL
from pagoda.v1 import inference_pb2 as ipb
from pagoda.v1 import scheduler_pb2 as pb
from tests.support.cluster import Cluster, cluster
from tests.support.data import model_folder

pytestmark = pytest.mark.timeout(600)

EXIT_UNUSABLE = 78
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
CONTEXT = 1024
VOCABULARY = 49152
Status = grpc.StatusCode


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    """All three services; at the end nothing may be left of what they were sent."""
    with cluster(
        dtype="bfloat16",
        worker_args=("--num-blocks", "160", "--max-model-len", str(CONTEXT), "--max-slots", "8"),
        gateway_args=(),
    ) as services:
        yield services


@pytest.fixture(autouse=True)
def goes_on(running: Cluster) -> Iterator[None]:
    """After every test a good request is answered, and nothing waits or runs."""
    yield
    answer = httpx.post(f"{running.url}{TEXT}", json={"prompt": "Hello", "max_tokens": 1}, timeout=120)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 1
    running.assert_idle()
    assert not running.snapshot().num_waiting
    assert all(child.popen.poll() is None for child in (running.scheduler, running.gateway) if child)


# ------------------------------------------------------------------------------------------------ HTTP


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("route", "body", "status", "param"),
    [
        (TEXT, {"prompt": [5] * 2000}, 400, "prompt"),
        (TEXT, {"prompt": "word " * 2000}, 400, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 2000}]}, 400, "messages"),
        (TEXT, {"prompt": ""}, 400, "prompt"),
        (TEXT, {"prompt": []}, 400, "prompt"),
        (CHAT, {"messages": []}, 400, "messages"),
        (TEXT, {"prompt": "x", "model": "another"}, 404, "model"),
        (CHAT, {"messages": MESSAGES, "model": "another"}, 404, "model"),
        (TEXT, {"prompt": "x", "temperature": -1}, 400, "temperature"),
        (CHAT, {"messages": MESSAGES, "n": 0}, 400, "n"),
        (TEXT, {"prompt": [VOCABULARY]}, 400, "prompt"),
        (TEXT, {"prompt": [-1]}, 400, "prompt[0]"),
        (TEXT, {"prompt": "x", "temperature": "warm"}, 400, "temperature"),
        (TEXT, {"prompt": {"text": "x"}}, 400, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
        # What only the scheduler knows: how many slots there are, what fits the cache, what ids there are.
        (TEXT, {"prompt": "x", "n": 9}, 400, "n"),
        (TEXT, {"prompt": "x", "n": 8, "max_tokens": 900}, 400, "n"),
        (TEXT, {"prompt": "x", "logit_bias": {str(VOCABULARY): 1}}, 400, "logit_bias"),
        (TEXT, {"prompt": "x", "stop_token_ids": [VOCABULARY]}, 400, "stop_token_ids"),
        (TEXT, {"prompt": "x", "stop_token_ids": list(range(1025))}, 400, "stop_token_ids"),
        (CHAT, {"messages": MESSAGES, "min_tokens": CONTEXT}, 400, "min_tokens"),
    ],
)
def test_http_says_what_is_wrong(
    running: Cluster, route: str, body: dict[str, Any], status: int, param: str, stream: bool
) -> None:
    """Also for a stream it is a status, because nothing has been sent yet."""
    answer = httpx.post(running.url + route, json={**body, "stream": stream}, timeout=120)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(param.split("[")[0]), error


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'{"prompt": "\xff\xfe", "max_tokens": 1}', 400),
        (b'{"prompt": "x", "max_tokens": 1', 400),
        (b"prompt=x", 400),
        (json.dumps({"prompt": "x" * 10_000_000}).encode(), 413),
    ],
    ids=["invalid UTF-8", "cut off", "a form", "10 MB"],
)
def test_http_bodies_that_are_no_request(running: Cluster, content: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(running.url + TEXT, content=content, headers=headers, timeout=120)
    error = answer.json()["error"]
    assert answer.status_code == status and "body" in error["message"], error


def test_one_bad_prompt_of_many_leaves_nothing_of_the_others(running: Cluster) -> None:
    """The scheduler takes the first prompts and refuses the last: the others are stopped again."""
    # Eight samples of a short prompt fit the cache, eight of a long one do not.
    body = {"prompt": [[5, 6]] * 3 + [[5] * 500], "n": 8, "max_tokens": 300, "ignore_eos": True}
    answer = httpx.post(running.url + TEXT, json=body, timeout=120)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n"), answer.text


def test_half_a_body_and_then_nothing(running: Cluster) -> None:
    """A client that promises more than it sends, and goes."""
    where = urlsplit(running.url)
    with socket.create_connection((where.hostname, where.port), timeout=60) as connection:
        connection.sendall(
            f"POST {TEXT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            'content-length: 5000\r\n\r\n{"prompt": "x'.encode()
        )


# ------------------------------------------------------------------------------------------------ gRPC


def chat(text: str = "hi", role: str = "user") -> ipb.Chat:
    return ipb.Chat(messages=[ipb.ChatMessage(role=role, content=text)])


def text(prompt: str = "x", **sampling: Any) -> ipb.GenerateRequest:
    return ipb.GenerateRequest(text=prompt, sampling=pb.SamplingParams(**sampling))


def ids(*tokens: int) -> ipb.GenerateRequest:
    return ipb.GenerateRequest(token_ids=ipb.TokenIds(ids=tokens))


def tokens(count: int = 2, **sampling: Any) -> pb.GenerateTokensRequest:
    params = pb.SamplingParams(**sampling)
    return pb.GenerateTokensRequest(prompt_token_ids=[5] * count, sampling=params)


def refusal(address: str, method: str, message: bytes, stream: bool = False) -> tuple[Status, str, list[str]]:
    """How a call ends: its code, its text, and the fields or subjects that its details name."""
    with grpc.insecure_channel(address) as channel:
        call: Any = (
            channel.stream_stream(method)(iter([message]), timeout=120)
            if stream
            else channel.unary_stream(method)(message, timeout=120)
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    error: Any = caught.value
    status = rpc_status.from_call(error)
    named = []
    for detail in status.details if status is not None else []:
        request, precondition = error_details_pb2.BadRequest(), error_details_pb2.PreconditionFailure()
        if detail.Unpack(request):
            named += [violation.field for violation in request.field_violations]
        elif detail.Unpack(precondition):
            named += [violation.subject for violation in precondition.violations]
    return error.code(), error.details(), named


GENERATE = "/pagoda.v1.InferenceService/Generate"
GENERATE_TOKENS = "/pagoda.v1.SchedulerService/GenerateTokens"
SESSION = "/pagoda.v1.SchedulerService/Session"
ATTACH = "/pagoda.internal.v1.WorkerService/Attach"


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        (ids(*[5] * 2000), Status.INVALID_ARGUMENT, "token_ids.ids"),
        (text("word " * 2000), Status.INVALID_ARGUMENT, "text"),
        (ipb.GenerateRequest(chat=chat("word " * 2000)), Status.INVALID_ARGUMENT, "chat.messages"),
        (text(""), Status.INVALID_ARGUMENT, "text"),
        (ids(), Status.INVALID_ARGUMENT, "token_ids.ids"),
        (ipb.GenerateRequest(), Status.INVALID_ARGUMENT, "prompt"),
        (ipb.GenerateRequest(text="x", model="another"), Status.NOT_FOUND, "model"),
        (text(temperature=-1), Status.INVALID_ARGUMENT, "sampling.temperature"),
        (text(temperature=float("nan")), Status.INVALID_ARGUMENT, "sampling.temperature"),
        (text(n=0), Status.INVALID_ARGUMENT, "sampling.n"),
        (text(n=9), Status.INVALID_ARGUMENT, "sampling.n"),
        (text(max_tokens=0), Status.INVALID_ARGUMENT, "sampling.max_tokens"),
        (text(top_k=0), Status.INVALID_ARGUMENT, "sampling.top_k"),
        (text(top_p=0), Status.INVALID_ARGUMENT, "sampling.top_p"),
        (text(logprobs=21), Status.INVALID_ARGUMENT, "sampling.logprobs"),
        (ids(VOCABULARY), Status.INVALID_ARGUMENT, "token_ids.ids"),
        (ipb.GenerateRequest(chat=chat(role="wizard")), Status.INVALID_ARGUMENT, "chat.messages[0].role"),
    ],
)
def test_grpc_says_what_is_wrong(
    running: Cluster, request_: ipb.GenerateRequest, code: Status, field: str
) -> None:
    assert refusal(running.grpc, GENERATE, request_.SerializeToString())[::2] == (code, [field])


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (tokens(0), "prompt_token_ids"),
        (tokens(2000), "prompt_token_ids"),
        (pb.GenerateTokensRequest(prompt_token_ids=[VOCABULARY]), "prompt_token_ids"),
        (tokens(temperature=-1), "sampling.temperature"),
        (tokens(n=0), "sampling.n"),
        (tokens(repetition_penalty=0), "sampling.repetition_penalty"),
    ],
)
def test_the_scheduler_checks_for_itself(
    running: Cluster, request_: pb.GenerateTokensRequest, field: str
) -> None:
    code, said, fields = refusal(running.scheduler.address, GENERATE_TOKENS, request_.SerializeToString())
    assert (code, fields) == (Status.INVALID_ARGUMENT, [field])
    assert said.startswith(field)


@pytest.mark.parametrize(
    ("service", "method", "message", "field"),
    [
        ("gateway", GENERATE, b"\xff\xff\xff", "message"),
        ("gateway", GENERATE, b"\x12\x02\xff\xfe", "text"),
        ("gateway", GENERATE, b"\x1a\x08\x0a\x06\x0a\x01u\x12\x01\xff", "chat.messages[0].content"),
        ("scheduler", GENERATE_TOKENS, b"\x0a\x01\xff", "request_id"),
        ("scheduler", "/pagoda.v1.ControlService/Watch", b"\xff\xff", "message"),
        ("scheduler", SESSION, b"\x0a\x03\x0a\x01\xff", "hello.client_name"),
        ("scheduler", SESSION, b"\xff\xff\xff", "message"),
        ("scheduler", ATTACH, b"\xff\xff\xff", "message"),
    ],
)
def test_bytes_that_are_no_message(
    running: Cluster, service: str, method: str, message: bytes, field: str
) -> None:
    address = running.grpc if service == "gateway" else running.scheduler.address
    code, _, fields = refusal(address, method, message, stream=method in (SESSION, ATTACH))
    assert (code, fields) == (Status.INVALID_ARGUMENT, [field])


def test_a_message_of_10_mb(running: Cluster) -> None:
    code, said, _ = refusal(running.grpc, GENERATE, text("x" * 10_000_000).SerializeToString())
    assert code is Status.RESOURCE_EXHAUSTED and "larger than max" in said


# --------------------------------------------------------------------------------- workers that do not fit


def hello(**changes: Any) -> wire.Hello:
    """What a worker of this cluster could say, but for `changes`."""
    fields: dict[str, Any] = {
        "protocol_min": 1,
        "protocol_max": 1,
        "model_name": EMBEDDED_MODEL,
        "group_name": "stranger",
        "incarnation": "i",
        "world_size": 1,
        "vocab_size": VOCABULARY,
        "max_model_len": CONTEXT,
        "block_size": 16,
        "num_device_blocks": 16,
        "max_slots": 1,
        "max_batched_tokens": 64,
        "max_horizon": 1,
        "eos_token_ids": [2],
        "max_stop_ids": 1024,
    }
    return wire.Hello(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "subjects"),
    [
        ({"model_digest": "sha256:another"}, ["digest"]),
        ({"protocol_min": 2, "protocol_max": 3}, ["protocol", "digest"]),
        ({"block_size": 0, "group_name": ""}, ["block_size", "group_name", "digest"]),
        ({"vocab_size": 5, "model_name": "other"}, ["name", "digest", "vocab_size"]),
    ],
)
def test_a_hello_that_does_not_fit(running: Cluster, changes: dict[str, Any], subjects: list[str]) -> None:
    message = wire.AttachRequest(hello=hello(**changes)).SerializeToString()
    code, said, named = refusal(running.scheduler.address, ATTACH, message, stream=True)
    assert (code, named) == (Status.FAILED_PRECONDITION, subjects)
    assert all(subject in said for subject in subjects)
    assert [worker.name for worker in running.snapshot().workers] == ["w0"], "the one that serves still does"


def test_a_result_before_any_hello(running: Cluster) -> None:
    message = wire.AttachRequest(result=wire.StepResult(epoch=1)).SerializeToString()
    code, _, named = refusal(running.scheduler.address, ATTACH, message, stream=True)
    assert (code, named) == (Status.FAILED_PRECONDITION, ["hello"])


def worker_end(running: Cluster, model: Path | str, *flags: str) -> tuple[int, str]:
    """Start a worker beside the one that serves; its exit code and what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "gpu_worker", "--scheduler", running.scheduler.address]
        + [
            "--model",
            str(model),
            "--group-name",
            "beside",
            "--metrics-port",
            "0",
            "--num-blocks",
            "64",
            *flags,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    return done.returncode, done.stderr


def test_a_worker_with_other_weights_is_refused_for_good(running: Cluster) -> None:
    flags = ("--load-format", "dummy", "--max-model-len", str(CONTEXT))
    code, said = worker_end(running, EMBEDDED_MODEL, *flags)
    assert code == EXIT_UNUSABLE
    assert "the scheduler refuses this worker" in said and "digest: the cluster has" in said


def folder_with(target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The embedded model whose list of tensors is changed; the values are a hole in the file."""
    source = model_folder()
    target.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (target / name).symlink_to(source / name)
    with (source / WEIGHTS).open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        listed = json.loads(file.read(length))
    end = max(entry["data_offsets"][1] for name, entry in listed.items() if name != "__metadata__")
    change(listed)
    header = json.dumps(listed).encode()
    with (target / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return target


WEIGHTS = "model.safetensors"
TENSOR = "model.layers.7.mlp.up_proj.weight"


def rename(listed: dict[str, Any]) -> None:
    """As a checkpoint of another layout has it."""
    listed["model.layers.7.mlp.up.weight"] = listed.pop(TENSOR)


def transpose(listed: dict[str, Any]) -> None:
    """As many values, in another shape."""
    listed[TENSOR]["shape"].reverse()


@pytest.mark.parametrize(
    ("change", "words"),
    [(rename, [f"{TENSOR} is missing"]), (transpose, [TENSOR, "[576, 1536]", "[1536, 576]"])],
)
def test_a_checkpoint_with_missing_and_misshapen_tensors(
    running: Cluster, tmp_path: Path, change: Callable[[dict[str, Any]], None], words: list[str]
) -> None:
    folder = folder_with(tmp_path / "model", change)
    code, said = worker_end(running, folder, "--dtype", "bfloat16")
    assert code == EXIT_UNUSABLE and "Traceback" not in said
    assert all(word in said for word in [str(folder), *words]), said


def tiny_gguf(path: Path) -> Path:
    """A GGUF file of a Llama with one small layer."""
    width, vocab = 32, 50
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(vocab)])
    writer.add_eos_token_id(2)
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocab, width), "output_norm": (width,)}
    shapes |= {f"blk.0.{name}": (width, width) for name in matrices}
    shapes |= {f"blk.0.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_truncated_gguf(running: Cluster, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    # Whole, it is a model, only not the one that is served here.
    code, said = worker_end(running, path)
    assert code == EXIT_UNUSABLE and "digest: the cluster has" in said
    path.write_bytes(path.read_bytes()[:-500])
    code, said = worker_end(running, path)
    assert code == EXIT_UNUSABLE and "Traceback" not in said
    assert str(path) in said and "truncated" in said
