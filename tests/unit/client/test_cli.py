"""The commands that talk to a server, against a scripted one; and replay."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from pagoda.cli.main import app
from pagoda.v1 import inference_pb2
from pagoda.v1 import scheduler_pb2 as spb
from tests.unit.client.scripted import ScriptedServer, failure, last, play, serving, token

COMMANDS = [
    *("serve", "down", "chat", "generate", "batch", "bench", "top", "replay", "models", "infer", "deploy")
]


def cli(*args: str, text: str | None = None) -> Any:
    return CliRunner().invoke(app, list(args), input=text)


def process(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pagoda.cli.main", *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_help_lists_every_command() -> None:
    text = cli("--help").stdout
    assert all(command in text for command in COMMANDS)
    assert all(cli(command, "--help").exit_code == 0 for command in COMMANDS)


def test_generate_prints_what_comes_and_figures() -> None:
    with serving(play(token(0, text="Par"), token(1, text="is 🌍"), last(2, text="."))) as server:
        options = ("--temperature", "0", "--max-tokens", "3", "--seed", "7", "--stop", "A", "--stop", "B")
        done = cli("generate", "The capital", "--stats", "--url", server.target, *options)
    assert done.exit_code == 0
    assert done.stdout == "Paris 🌍.\n"
    assert "3 tokens, first after" in done.stderr
    request = server.requests[0]
    assert (request.text, request.sampling.max_tokens, request.sampling.seed) == ("The capital", 3, 7)
    assert list(request.stop) == ["A", "B"]
    assert request.sampling.HasField("temperature") and not request.sampling.HasField("top_p")


def test_generate_prints_several_answers_one_below_the_other() -> None:
    with serving(
        play(token(0, text="x", index=1), token(1, text="a"), last(2, text="y", index=1), last(3, text="b"))
    ) as server:
        done = cli("generate", "hi", "--n", "2", "--stats", "--url", server.target)
    assert done.stdout == "[0]\nab\n[1]\nxy\n"
    assert done.stderr.startswith("4 tokens") and "(stop, stop)" in done.stderr
    assert server.requests[0].sampling.n == 2
    best, second = last(1, text="best"), last(2, text="next", index=1)
    best.score, second.score = -0.25, -0.5
    searched = ("--n", "2", "--beam-width", "4", "--length-penalty", "0.5", "--early-stopping", "true")
    with serving(play(best, second)) as server:
        done = cli("generate", "hi", *searched, "--url", server.target)
        assert done.stdout == "[0] score -0.2500\nbest\n[1] score -0.5000\nnext\n"
        assert cli("generate", "hi", "--n", "2", "--best-of", "5", "--url", server.target).exit_code == 0
        assert cli("generate", "hi", "--early-stopping", "maybe", "--url", server.target).exit_code == 2
    sampling = server.requests[0].sampling
    assert (sampling.beam_width, sampling.length_penalty) == (4, 0.5)
    assert sampling.early_stopping == spb.EARLY_STOPPING_FIRST
    assert server.requests[1].best_of == 5


def test_generate_reads_standard_input_and_asks_as_a_chat() -> None:
    with serving(play(last(0))) as server:
        assert cli("generate", "-", "--chat", "--url", server.target, text="two\nlines").exit_code == 0
    assert server.requests[0].chat.messages[0].content == "two\nlines"


def test_the_url_and_the_token_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(play(last(0))) as server:
        monkeypatch.setenv("PAGODA_URL", server.target)
        monkeypatch.setenv("PAGODA_TOKEN", "secret")
        assert cli("generate", "hi").exit_code == 0
    assert server.metadata[0]["authorization"] == "Bearer secret"


@pytest.mark.parametrize("command", [["generate", "hi"], ["models"], ["bench"], ["chat"], ["top", "--once"]])
def test_nobody_there_is_one_line(command: list[str]) -> None:
    with serving(play(last(0))) as server:
        target = server.target
    where = "--scheduler" if command[0] == "top" else "--url"
    done = cli(*command, where, target)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_an_invalid_request_is_one_line() -> None:
    with serving(play(failure(grpc.StatusCode.INVALID_ARGUMENT, "sampling.temperature: below 0"))) as server:
        done = cli("generate", "hi", "--temperature=-1", "--url", server.target)
    assert done.exit_code == 1
    assert "sampling.temperature: below 0" in done.stderr


def test_models() -> None:
    with serving(play(last(0))) as server:
        assert cli("models", "--url", server.target).stdout.startswith("m  context 100  vocabulary 50")


def test_chat_remembers_forgets_and_ends() -> None:
    with serving(play(last(0, text="one")), play(last(0, text="two")), play(last(0, text="three"))) as server:
        lines = "hello\nagain\n/reset\n\n/what\nfresh\n/exit\nnever\n"
        done = cli("chat", "--system", "Be brief.", "--url", server.target, text=lines)
    assert done.exit_code == 0
    assert [line for line in done.stdout.splitlines() if line] == ["one", "two", "three"]
    said = [[m.content for m in r.chat.messages] for r in server.requests]
    assert said == [
        ["Be brief.", "hello"],
        ["Be brief.", "hello", "one", "again"],
        ["Be brief.", "fresh"],
    ]


def test_chat_goes_on_after_an_error() -> None:
    bad = failure(grpc.StatusCode.INVALID_ARGUMENT, "too long")
    with serving(play(bad), play(last(0, text="fine"))) as server:
        done = cli("chat", "--url", server.target, text="long\nshort\n")
    assert "error: too long" in done.stderr
    assert [m.content for m in server.requests[1].chat.messages] == ["short"]


def test_ctrl_c_stops_the_answer_and_not_the_chat() -> None:
    with serving(play(token(0, text="begin"), "hang"), play(last(0, text="after"))) as server:
        chat = process("chat", "--url", server.target)
        assert chat.stdin and chat.stdout
        chat.stdin.write("hello\n")
        chat.stdin.flush()
        assert chat.stdout.read(5) == "begin"
        chat.send_signal(signal.SIGINT)
        assert server.cancelled.wait(30)
        out, err = chat.communicate("again\n/exit\n", timeout=30)
    assert chat.returncode == 0, err
    assert "(stopped)" in err
    assert "after" in out
    assert [m.content for m in server.requests[1].chat.messages] == ["hello", "begin", "again"]


def numbered() -> Any:
    """Answers `a`, `b`, ... to prompts 0, 1, ...; refuses the prompt "bad"."""

    async def act(request: Any, context: Any) -> Any:
        text = request.text or request.chat.messages[-1].content
        if text == "bad":
            await context.abort_with_status(failure(grpc.StatusCode.INVALID_ARGUMENT, "no", field="text"))
        await asyncio.sleep(0.05 * (4 - int(text) % 5))
        yield last(int(text))

    return act


def batch_file(folder: Path) -> Path:
    path = folder / "in.jsonl"
    openai_chat = {
        "custom_id": "x-1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "m",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "1"}]}],
            "max_completion_tokens": 5,
            "logprobs": True,
            "top_logprobs": 2,
            "user": "ignored",
        },
    }
    lines: list[bytes] = [
        json.dumps({"prompt": "0", "max_tokens": 4, "logit_bias": {"5": -1}}).encode(),
        json.dumps(openai_chat).encode(),
        b"",
        b"{not json",
        json.dumps({"messages": [{"role": "user", "content": "2"}], "custom_id": 7}).encode(),
        json.dumps({"prompt": "bad"}).encode(),
        json.dumps({"prompt": "3", "temprature": 1}).encode(),
        b"\xff\xfe",
        b"[1]",
        json.dumps({"prompt": "4", "messages": []}).encode(),
        json.dumps({"prompt": "3"}, ensure_ascii=False).encode(),
    ]
    path.write_bytes(b"\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("body", "form"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "null"}},
                }
            },
            {"json_schema": '{"type": "null"}'},
        ),
        ({"structured_outputs": {"json": {"type": "null"}}}, {"json_schema": '{"type": "null"}'}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": {"texts": ["a", "b"]}}),
        ({"response_format": {"type": "text"}}, {}),
    ],
)
def test_batch_takes_openais_words_for_structured_output(tmp_path: Path, body: Any, form: Any) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"custom_id": "x", "body": {"prompt": "0", **body}}))
    with serving(numbered()) as server:
        done = cli("batch", str(file), "--url", server.target)
    assert done.exit_code == 0, done.stderr
    assert server.requests[0].structured_output == inference_pb2.StructuredOutput(**form)


@pytest.mark.parametrize(
    ("body", "sampling", "best_of"),
    [
        ({"n": 2, "best_of": 4, "length_penalty": 1.0, "early_stopping": False}, {"n": 2}, 4),
        ({"n": 2, "best_of": 4, "use_beam_search": True}, {"n": 2, "beam_width": 4}, 0),
        (
            {"n": 2, "use_beam_search": True, "length_penalty": 0.5},
            {"n": 2, "beam_width": 2, "length_penalty": 0.5},
            0,
        ),
        ({"use_beam_search": True, "early_stopping": False}, {"beam_width": 1, "early_stopping": 1}, 0),
        ({"beam_width": 3, "early_stopping": "never"}, {"beam_width": 3, "early_stopping": 3}, 0),
    ],
)
def test_batch_takes_vllms_words_for_groups(tmp_path: Path, body: Any, sampling: Any, best_of: int) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"custom_id": "x", "body": {"prompt": "0", **body}}))
    answers = [last(i, index=i) for i in range(sampling.get("n", 1))]
    for answer in answers:
        answer.score = -0.5
    with serving(play(*answers)) as server:
        done = cli("batch", str(file), "--url", server.target)
    assert done.exit_code == 0, done.stderr
    asked = server.requests[0].sampling
    asked.ClearField("seed")
    assert asked == spb.SamplingParams(**sampling)
    assert server.requests[0].best_of == best_of
    (record,) = results(tmp_path / "in.out.jsonl")
    assert [choice["score"] for choice in record["response"]["body"]["choices"]] == [-0.5] * len(answers)


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_batch_answers_in_order_and_loses_no_line(tmp_path: Path) -> None:
    file = batch_file(tmp_path)
    with serving(numbered()) as server:
        done = cli("batch", str(file), "--url", server.target, "--concurrency", "4")
    assert done.exit_code == 1, done.stderr
    records = results(tmp_path / "in.out.jsonl")
    assert [r["line"] for r in records] == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert [r["line"] for r in records if r["error"]] == [4, 6, 7, 8, 9, 10]
    by_line = {r["line"]: r for r in records}
    assert by_line[1]["response"]["body"]["choices"][0]["text"] == "a"
    assert by_line[2]["custom_id"] == "x-1" and by_line[5]["custom_id"] == "7"
    message = by_line[2]["response"]["body"]["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "b"}
    assert by_line[2]["response"]["body"]["usage"]["prompt_tokens"] == 3
    assert by_line[6]["error"] == {"code": "INVALID_ARGUMENT", "message": "no", "field": "text"}
    assert by_line[7]["error"]["field"] == "temprature"
    asked = {r.text or r.chat.messages[-1].content: r for r in server.requests}
    assert (asked["1"].sampling.max_tokens, asked["1"].sampling.logprobs) == (5, 2)
    assert dict(asked["0"].sampling.logit_bias) == {5: -1.0}


def test_batch_options_of_the_command_are_above_the_lines(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "0", "max_tokens": 4, "model": "other"}\n')
    with serving(numbered()) as server:
        done = cli("batch", str(file), "--url", server.target, "--max-tokens", "9", "--model", "mine")
    assert done.exit_code == 0
    assert (server.requests[0].sampling.max_tokens, server.requests[0].model) == (9, "mine")


def test_batch_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"prompt": str(i)}) + "\n" for i in range(5)))
    output = tmp_path / "out.jsonl"

    async def stuck(request: Any, _: Any) -> Any:
        if int(request.text) >= 2:
            await asyncio.sleep(60)
        yield last(int(request.text))

    with serving(stuck) as server:
        job = process("batch", str(file), "--output", str(output), "--url", server.target)
        server.wait_running(3)
        while len(output.read_bytes().splitlines()) < 2:
            assert job.poll() is None
        job.send_signal(signal.SIGINT)
        _, err = job.communicate(timeout=30)
        assert job.returncode == 130
        assert "the same command goes on" in err
    with open(output, "ab") as torn:  # as a kill in the middle of a write leaves it
        torn.write(b'{"line": 3, "dig')
    with serving(numbered()) as server:
        done = cli("batch", str(file), "--output", str(output), "--url", server.target)
        assert done.exit_code == 0
        assert "2 of 5 lines are done already" in done.stderr
        assert sorted(r.text for r in server.requests) == ["2", "3", "4"]
        texts = [r["response"]["body"]["choices"][0]["text"] for r in results(output)]
        assert texts == ["a", "b", "c", "d", "e"]
        file.write_text(file.read_text().replace('"1"', '"6"'))
        assert cli("batch", str(file), "--output", str(output), "--url", server.target).exit_code == 0
    assert [r.text for r in server.requests][3:] == ["6"]
    assert [r["response"]["body"]["choices"][0]["text"] for r in results(output)] == ["a", "g", "c", "d", "e"]


def test_batch_does_not_blame_the_lines_when_the_server_is_away(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "0"}\n')
    with serving(numbered()) as server:
        server.unary_failures = [failure(grpc.StatusCode.UNAUTHENTICATED, "a token is needed")]
        done = cli("batch", str(file), "--url", server.target)
    assert done.exit_code == 1
    assert "a token is needed" in done.stderr
    assert (tmp_path / "in.out.jsonl").read_bytes() == b""


def test_batch_never_overwrites_its_input(tmp_path: Path) -> None:
    file = batch_file(tmp_path)
    before = file.read_bytes()
    assert cli("batch", str(file), "--output", str(file)).exit_code == 1
    assert cli("batch", str(tmp_path / "none.jsonl")).exit_code == 1
    assert file.read_bytes() == before


def test_bench_measures_and_writes_json(tmp_path: Path) -> None:
    async def slowly(request: Any, _: Any) -> Any:
        for _ in range(request.sampling.max_tokens - 1):
            yield token(0)
            await asyncio.sleep(0.005)
        yield last(1)

    figures = tmp_path / "figures.json"
    load = ("--concurrency", "2", "--requests", "5", "--prompt-tokens", "6", "--output-tokens", "4")
    with serving(slowly) as server:
        done = cli("bench", "--url", server.target, *load, "--shared-prefix", "3", "--json", str(figures))
    assert done.exit_code == 0, done.stderr
    assert "output tokens/s" in done.stdout
    written = json.loads(figures.read_text())
    assert written["load"]["requests"] == 5 and written["errors"] == 0
    assert 0 < written["tpot_ms"]["p50"] <= written["latency_ms"]["p99"]
    prompts = [list(r.token_ids.ids) for r in server.requests[1:]]
    assert len(prompts) == 5 and all(len(p) == 6 and max(p) < 50 for p in prompts)
    assert len({tuple(p[:3]) for p in prompts}) == 1 and server.most_running == 2


def test_bench_without_a_success_says_why() -> None:
    with serving(play(last(0)), play(failure(grpc.StatusCode.INTERNAL, "broken"))) as server:
        done = cli("bench", "--url", server.target, "--requests", "2")
    assert done.exit_code == 1
    assert "broken" in done.stderr


def snapshot(server: ScriptedServer, unix_us: int, generated: int) -> None:
    shot = spb.Snapshot(unix_us=unix_us, num_waiting=1, num_running=2, generation_tokens=generated)
    shot.model.name = "m"
    blocks = dict(num_blocks=10, num_free_blocks=5, num_cached_blocks=2, num_host_blocks=7)
    shot.workers.add(name="worker-0", device="cpu", num_ranks=1, num_host_blocks_used=4, **blocks)
    shot.workers.add(name="worker-1", device="gpu", num_ranks=2, **blocks)
    shot.requests.add(request_id="[red]r-1", state=spb.REQUEST_STATE_DECODE, worker="worker-0")
    shot.requests.add(request_id="r-3", state=spb.REQUEST_STATE_SWAPPED, worker="worker-0")
    shot.swapped_tokens, shot.recomputed_tokens = 1234, 56
    shot.requests.add(request_id="r-2", state=spb.REQUEST_STATE_WAITING, why_not_running="no free blocks")
    server.control.snapshots.append(shot)


def test_top_once_shows_workers_requests_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    with serving(play(last(0))) as server:
        snapshot(server, 1_000_000, 10)
        done = cli("top", "--once", "--scheduler", server.target)
    assert done.exit_code == 0, done.stderr
    for part in ("waiting 1", "running 2", "worker-0", "3/10", "[red]r-1", "decode", "no free"):
        assert part in done.stdout
    for part in ("4/7", "swapped 1,234", "recomputed 56"):
        assert part in done.stdout
    assert re.search(r"  cpu *$", done.stdout, re.MULTILINE)
    assert re.search(r" 2 x gpu *$", done.stdout, re.MULTILINE), "a model over two devices"
    assert re.search(r"^ *r-3 +swapped ", done.stdout, re.MULTILINE)


def test_top_computes_rates_between_two_looks() -> None:
    with serving(play(last(0))) as server:
        snapshot(server, 1_000_000, 10)
        snapshot(server, 3_000_000, 110)
        done = cli("top", "--interval", "0.5", "--scheduler", server.target)
    assert done.exit_code == 0, done.stderr
    assert "50.0 tokens/s out" in done.stdout
    assert server.control.asked[0].interval_ms == 500


def test_replay_reports_and_explains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Divergence(Exception):
        """As the server package has it."""

    class BadRecord(Exception):
        """As the server package has it."""

    def replay(path: Path) -> Any:
        if path.name == "same":
            return types.SimpleNamespace(num_plans=3, num_events=5, num_requests=2, truncated=True)
        raise Divergence("frame 4: the plan differs") if path.name == "other" else BadRecord("not a record")

    package, module = types.ModuleType("scheduler_svc"), types.ModuleType("scheduler_svc.record")
    vars(module).update(replay=replay, Divergence=Divergence, BadRecord=BadRecord)
    vars(package)["record"] = module
    monkeypatch.setitem(sys.modules, "scheduler_svc", package)
    monkeypatch.setitem(sys.modules, "scheduler_svc.record", module)
    done = cli("replay", str(tmp_path / "same"))
    assert done.exit_code == 0
    assert "identical: 3 plans, 5 events, 2 requests; the last frame was cut off" in done.stdout
    assert "frame 4: the plan differs" in cli("replay", str(tmp_path / "other")).stderr
    assert cli("replay", str(tmp_path / "broken")).exit_code == 1


def test_replay_without_the_server_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scheduler_svc", None)
    done = cli("replay", "x")
    assert done.exit_code == 1
    assert "pagoda-server" in done.stderr
