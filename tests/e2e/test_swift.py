"""The source document's programs and commands, run for real: only what they import is another.

A program's answers are compared with those of a second run of the same program whose calls go through the
OpenAI routes. The seed, which the programs leave to chance, is pinned for both.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pexpect
import pytest
import torch

import pagoda
from pagoda import calls, swift
from pagoda.cli.cluster import ClusterError
from pagoda.models import cache_dir
from pagoda.swift.generation import VllmGenerationConfig
from tests.support.cluster import free_port
from tests.support.leftovers import processes_in, wait_gone
from tests.support.tiny_model import tiny_model

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
LISTING = Path(os.environ.get("PAGODA_SHARED", ROOT.parent / "shared"), "reference/source_listing_one_gpu.py")
QWEN, EMBEDDED = "qwen-7b-chat", "smollm2-135m-instruct"
SEED = 77
CURL = """\
curl http://localhost:8000/v1/chat/completions \\
  -H "Content-Type: application/json" \\
  -d '{
    "model": "qwen-7b-chat",
    "messages": [{"role": "user", "content": "晚上睡不着觉怎么办？"}],
    "max_tokens": 256,
    "temperature": 0
  }'
"""
PAGODA = [sys.executable, "-m", "pagoda.cli.main"]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Pagoda cache with the embedded model and a tiny random one named qwen-7b-chat, as an environment."""
    from tests.support.data import model_folder

    cache = tmp_path_factory.mktemp("cache")
    (cache / "models").mkdir()
    (cache / "models" / EMBEDDED).symlink_to(model_folder())
    tiny_model(cache / "models" / QWEN)
    # Exact arithmetic, so that answers can be compared; the CPU kernels that are built already are used.
    if (kernels := cache_dir() / "kernels").is_dir():
        (cache / "kernels").symlink_to(kernels)
    yield {"PAGODA_CACHE": str(cache), "PAGODA_WORKER_DTYPE": "float32", "PAGODA_WORKER_NUM_BLOCKS": "1024"}


@pytest.fixture
def environment(caches: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The caches, for this process and those it starts."""
    monkeypatch.delenv("PAGODA_URL", raising=False)
    for name in ("CUDA_VISIBLE_DEVICES", "MODELSCOPE_CACHE"):  # what programs set is undone
        monkeypatch.setenv(name, "")
    for name, value in caches.items():
        monkeypatch.setenv(name, value)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])}


# ------------------------------------------------------------------------------------ programs, both ways


def through_openai(engine: swift.Engine) -> dict[str, Any]:
    """The same calls as `pagoda.swift`, through the OpenAI route of `engine`'s cluster."""
    client = openai.OpenAI(base_url=f"{engine.http_url}/v1", api_key="none", max_retries=0, timeout=300)

    def ask(config: VllmGenerationConfig, request: dict[str, Any], stream: bool) -> Any:
        history = [list(pair) for pair in request.get("history") or []]
        turns = [("system", request["system"])] if "system" in request else []
        for query, answer in history:
            turns += [("user", query), ("assistant", answer)]
        messages: Any = [{"role": r, "content": c} for r, c in [*turns, ("user", request["query"])]]
        return client.chat.completions.create(
            model=engine.served_name,
            messages=messages,
            max_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=SEED,
            stream=stream,
            extra_body={"top_k": config.top_k, "repetition_penalty": config.repetition_penalty},
            **({"stream_options": {"include_usage": True}} if stream else {}),
        )

    def fill(info: dict[str, Any], usages: list[Any]) -> None:
        info.clear()
        info["num_prompt_tokens"] = sum(usage.prompt_tokens for usage in usages)
        info["num_generated_tokens"] = sum(usage.completion_tokens for usage in usages)
        info["num_samples"] = len(usages)

    def response(request: dict[str, Any], text: str) -> dict[str, Any]:
        return {"response": text, "history": [*(request.get("history") or []), [request["query"], text]]}

    def whole(made: Any, _: Any, requests: list[Any], *, generation_info: Any = None) -> list[Any]:
        answers = [ask(made.generation_config, request, stream=False) for request in requests]
        fill({} if generation_info is None else generation_info, [answer.usage for answer in answers])
        texts = [answer.choices[0].message.content for answer in answers]
        return [response(*pair) for pair in zip(requests, texts, strict=True)]

    def streamed(
        made: Any, _: Any, requests: list[Any], *, generation_info: Any = None
    ) -> Iterator[list[Any]]:
        texts, usages = ["" for _ in requests], []
        for place, request in enumerate(requests):
            for chunk in ask(made.generation_config, request, stream=True):
                texts[place] += (chunk.choices[0].delta.content or "") if chunk.choices else ""
                usages += [chunk.usage] if chunk.usage else []
                yield [response(*pair) for pair in zip(requests, texts, strict=True)]
        fill({} if generation_info is None else generation_info, usages)

    made = SimpleNamespace(generation_config=VllmGenerationConfig(), hf_tokenizer=None)
    names = {name: getattr(swift, name) for name in swift.__all__}
    return {
        **names,
        "get_vllm_engine": lambda *_, **__: made,
        "inference_vllm": whole,
        "inference_stream_vllm": streamed,
    }


def run(source: str, names: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """Run a program; what it printed and its variables. `names` stand in for what it imports of ours."""
    if names is not None:
        source = re.sub(r"from pagoda\.swift import (\([^)]*\)|.*)", "", source)
    variables: dict[str, Any] = {"__name__": "__main__", **(names or {})}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, "program", "exec"), variables)
    return printed.getvalue(), variables


def comparable(printed: str) -> list[Any]:
    """What was printed, without times and without what a terminal was told while it waited."""
    lines: list[Any] = []
    for line in printed.splitlines():
        if line.startswith("{'num_prompt_tokens'"):
            info = ast.literal_eval(line)
            lines.append({name: info[name] for name in sorted(info) if name.startswith("num_")})
        elif not line.startswith("characters so far"):
            lines.append(line)
    return lines


def both_ways(source: str, model_type: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a program with Pagoda's calls and with OpenAI's; they print the same, which is returned."""
    monkeypatch.setattr(calls.secrets, "randbits", lambda _: SEED)
    monkeypatch.setattr(sys, "argv", ["program", model_type])
    printed, variables = run(source)
    engine = next(value for value in variables.values() if isinstance(value, swift.Engine))
    try:
        assert engine.model_type == model_type
        again, _ = run(source, through_openai(engine))
    finally:
        engine.close()
    assert comparable(printed) == comparable(again)
    return printed


EXAMPLES = ROOT / "examples"
PROGRAMS = [
    (EXAMPLES / "swift_batch.py", EMBEDDED),
    (EXAMPLES / "swift_history.py", EMBEDDED),
    (EXAMPLES / "swift_stream.py", EMBEDDED),
    (EXAMPLES / "swift_stream.py", QWEN),
    # The document's own listing is beside the checkout where Pagoda is built, and is not copied into it.
    *((LISTING, model_type) for model_type in (EMBEDDED, QWEN) if LISTING.is_file()),
]


@pytest.mark.parametrize(
    ("program", "model_type"), PROGRAMS, ids=lambda value: value.stem if isinstance(value, Path) else value
)
def test_programs_answer_as_the_openai_route_does(
    program: Path, model_type: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = program.read_text(encoding="utf-8")
    if program == LISTING:
        changed = source.replace("from swift.llm import", "from pagoda.swift import")
        changed = changed.replace("ModelType.qwen_7b_chat", f"ModelType.{model_type.replace('-', '_')}")
        lines = zip(source.splitlines(), changed.splitlines(), strict=True)
        assert sum(a != b for a, b in lines) == 1 + (model_type != QWEN), "the import and the model type"
        source = changed
    printed = both_ways(source, model_type, monkeypatch)
    assert printed.count("response: ") >= 3
    if program.stem == "swift_batch" and model_type == EMBEDDED:
        assert "response: The capital of France is Paris.\n" in printed
    if program.stem in ("swift_batch", "swift_stream", LISTING.stem):
        info = ast.literal_eval(next(line for line in printed.splitlines() if line.startswith("{'num_")))
        assert info["tokens/s"] == pytest.approx(info["num_generated_tokens"] / info["runtime"])


def test_two_cards_answer_as_one(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The document's second case: both cards are named in Python, and the engine is told how many."""
    source = (EXAMPLES / "swift_two_cards.py").read_text()
    two = "tensor_parallel_size=2"
    assert source.count(two) == 1
    monkeypatch.setattr(sys, "argv", ["program"])
    answers = {}
    for size in (2, 1):
        printed, variables = run(source.replace(two, f"tensor_parallel_size={size}"))
        engine = variables["engine"]
        try:
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
            log = next(engine._cluster._folder.glob("logs/worker-0.log")).read_text()
            answers[size] = printed, log.count('"event": "attached"')
        finally:
            engine.close()
    assert answers[2][0] == answers[1][0] and "response: The capital of France is Paris.\n" in answers[2][0]
    assert [answers[size][1] for size in (1, 2)] == [1, 2], "each rank attaches"


def test_an_example_runs_as_its_users_run_it_and_leaves_nothing(
    environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, str(EXAMPLES / "swift_batch.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    wait_gone(tmp_path)


# ------------------------------------------------------------------------------- event loops and the end

IN_A_LOOP = """
import asyncio, sys, threading
from pagoda.swift import get_default_template_type, get_template, get_vllm_engine
from pagoda.swift import inference_stream_vllm, inference_vllm

async def main():
    made = []
    thread = threading.Thread(target=lambda: made.append(get_vllm_engine("qwen-7b-chat")))
    thread.start()
    thread.join()  # the cluster goes on without the thread that asked for it
    engine = made[0] if sys.argv[1] == "thread" else get_vllm_engine("qwen-7b-chat")
    template = get_template(get_default_template_type("qwen-7b-chat"), engine.hf_tokenizer)
    engine.generation_config.max_new_tokens = 5
    (whole,) = inference_vllm(engine, template, [{"query": "hi"}])
    *_, (last,) = inference_stream_vllm(engine, template, [{"query": "hi"}])
    assert len(last["history"]) == 1 and engine.hf_tokenizer.encode("hi")
    print("answered", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_in_a_running_loop_and_ended_by_a_signal(
    number: signal.Signals, environment: dict[str, str], tmp_path: Path
) -> None:
    """An engine is made and asked inside a running loop, in a thread that has ended; a signal ends it all."""
    with subprocess.Popen(
        [sys.executable, "-c", IN_A_LOOP, "thread"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "answered\n"
        assert len(processes_in(tmp_path)) == 5  # itself, the supervisor and three services
        process.send_signal(number)
        process.wait(60)
    wait_gone(tmp_path)


def test_closing_dropping_and_failing_engines_leave_nothing(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")  # as a program sets it before it makes the engine
    engine = swift.get_vllm_engine(QWEN, torch.bfloat16)
    assert engine.client.models()[0].dtype == "bfloat16"
    assert (engine.served_name, engine.max_model_len) == (QWEN, 2048)
    others = [pid for pid in processes_in(tmp_path) if pid != os.getpid()]
    assert len(others) == 4
    for pid in others:
        assert b"CUDA_VISIBLE_DEVICES=5" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    del engine
    for pid in others:
        assert not Path(f"/proc/{pid}").exists(), "it ends when nothing refers to it any more"
    with pytest.raises(ClusterError, match=r"worker-0 cannot run \(exit status 2\)"):
        swift.get_vllm_engine(QWEN, engine_kwargs={"block_size": 7})
    assert [pid for pid in processes_in(tmp_path) if pid != os.getpid()] == []


# -------------------------------------------------------------------------------------------- commands


def start(*arguments: str, folder: Path, environment: dict[str, str]) -> pexpect.spawn:
    """A `pagoda` command on a terminal of its own, in `folder`."""
    command = ["-m", "pagoda.cli.main", *arguments]
    terminal = {**environment, "TERM": "dumb", "COLUMNS": "200"}
    return pexpect.spawn(
        sys.executable, command, cwd=str(folder), env=terminal, timeout=120, encoding="utf-8"
    )


def test_deploy_serves_the_documents_curl_and_everyone_else(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curl = shutil.which("curl")
    assert curl, "curl is needed: apt-get install curl"
    port, grpc_port = free_port(), free_port()
    ports = [f"--port={port}", f"--grpc_port={grpc_port}", "--scheduler-port=0", "--metrics_port=0"]
    served = start("deploy", "--model_type", QWEN, *ports, folder=tmp_path, environment=environment)
    served.expect("ready at")
    done = subprocess.run(CURL.replace(":8000", f":{port}"), shell=True, capture_output=True, text=True)
    reply = json.loads(done.stdout)
    assert (reply["model"], reply["object"]) == (QWEN, "chat.completion")
    text = reply["choices"][0]["message"]["content"]
    assert text and reply["usage"]["completion_tokens"] > 0
    listed = subprocess.run(
        [curl, "-s", f"http://localhost:{port}/v1/models"], capture_output=True, text=True
    )
    assert [model["id"] for model in json.loads(listed.stdout)["data"]] == [QWEN]

    question = json.loads(CURL[CURL.index("{") : CURL.rindex("}") + 1])["messages"][0]["content"]
    monkeypatch.setenv("PAGODA_URL", f"127.0.0.1:{grpc_port}")
    engine = swift.get_vllm_engine(swift.ModelType.qwen_7b_chat)
    assert engine.http_url is None
    engine.generation_config.max_new_tokens, engine.generation_config.do_sample = 256, False
    template = swift.get_template("qwen", engine.hf_tokenizer)
    (response,) = swift.inference_vllm(engine, template, [{"query": question}])
    assert response["response"] == text, "over gRPC, rendered here: the same"
    engine.close()
    with pagoda.Client(f"127.0.0.1:{grpc_port}") as client:
        chat = [{"role": "user", "content": question}]
        assert client.chat(chat, model=QWEN, temperature=0.0, max_tokens=256).text == text
        with pytest.raises(pagoda.NotFound):
            client.chat(chat, model="qwen-14b-chat")

    served.sendintr()
    served.expect("stopped")
    served.expect(pexpect.EOF)
    served.close()
    assert served.exitstatus == 0
    wait_gone(tmp_path)


def test_infer_is_a_conversation(environment: dict[str, str], tmp_path: Path) -> None:
    options = ("--model_type", EMBEDDED, "--infer_backend", "vllm", "--do_sample", "false")
    talk = start("infer", *options, folder=tmp_path, environment=environment)
    talk.expect("infer_backend vllm: accepted; the engine is Pagoda")
    talk.expect("<<< ")
    talk.sendline("What is the capital of France?")
    talk.expect(r"The capital of France is Paris\.")
    talk.expect("<<< ")
    talk.sendline("And Spain?")
    talk.expect(r"The capital of Spain is Madrid\.")
    talk.expect("<<< ")
    talk.sendline("clear")
    talk.expect("<<< ")
    talk.sendline("Write a very long story about a dragon.")
    talk.expect("dragon.*dragon")
    talk.sendintr()
    talk.expect(r"\(stopped\)")
    talk.expect("<<< ")
    talk.sendintr()  # at the prompt it ends
    talk.expect(pexpect.EOF)
    talk.close()
    assert talk.exitstatus == 0
    wait_gone(tmp_path)


def test_infer_is_ended_while_it_starts_and_by_sigterm(environment: dict[str, str], tmp_path: Path) -> None:
    logs = Path(tempfile.mkdtemp())  # a socket's path must be short
    environment["TMPDIR"] = str(logs)
    talk = start("infer", "--model-type", QWEN, folder=tmp_path, environment=environment)
    talk.expect("loading weights")
    talk.sendintr()
    talk.expect(pexpect.EOF)
    talk.close()
    assert talk.exitstatus == 130
    wait_gone(tmp_path)
    talk = start("infer", "--model-type", QWEN, folder=tmp_path, environment=environment)
    talk.expect("<<< ")
    talk.kill(signal.SIGTERM)
    talk.expect(pexpect.EOF)
    wait_gone(tmp_path)
    logs.rmdir()  # nothing is in it


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["infer", "--model_type", QWEN, "--tensor_parallel_size", "0"], "tensor_parallel_size=0"),
        (["deploy", "--model_type", QWEN, "--tensor-parallel-size=0"], "tensor_parallel_size=0"),
        (["infer", "--model_type", QWEN, "--template_type", "no-such"], "'no-such' is not known; there are"),
        (["infer", "--model_type", "no-such"], "model_type 'no-such' is not known; there are"),
        (["deploy", "--model_type", QWEN, "--dtype", "fp16"], "torch_dtype=float16"),
        (["deploy", "--model_type", QWEN, "--quantization_bit", "4"], "--quantization-bit"),
    ],
)
def test_what_the_commands_do_not_do_is_named(
    command: list[str], said: str, environment: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [*PAGODA, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode in (1, 2) and said in done.stderr
    assert "Traceback" not in done.stderr
