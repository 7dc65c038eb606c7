"""The clients of clients/, as their users run them, against the live services and the embedded model.

`make test-clients` builds the programs and runs this; each test runs once for each language.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import pagoda
from tests.support import figures
from tests.support.cluster import Cluster, cluster
from tests.support.cluster_sched import wait_until
from tests.support.metrics import scrape, total
from tests.support.runs import read_record

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "clients"
PROGRAMS = {
    "typescript": ("node", CLIENTS / "typescript" / "build" / "src" / "main.js"),
    "go": (CLIENTS / "go" / "build" / "pagoda-client",),
    "cpp": (CLIENTS / "cpp" / "build" / "pagoda-client",),
    "java": ("java", "-jar", CLIENTS / "java" / "build" / "pagoda-client.jar"),
}
pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]

NUM_CHATS = 100
NUM_TOKENS = 24
QUESTION = "What is the capital of France?"
TURNS = ["What is the capital of France?", "Wie heißt «東京» auf Deutsch? 🗼", "Thank you."]
GREEDY = ("--temperature", "0", "--max-tokens", "32")
# Far more than anyone waits for: it does not end by itself.
ENDLESS = ("--ignore-eos", "--max-tokens", "2000")
ENDED = re.compile(
    r"^\[(?P<request_id>\S+): (?P<messages>\d+) messages, (?P<tokens>\d+) tokens, stop]$", re.M
)


class Program:
    """One language's client, pointed at a gateway."""

    def __init__(self, language: str, address: str, token: str = "") -> None:
        self.language = language
        self.command = [str(part) for part in PROGRAMS[language]]
        assert Path(self.command[-1]).exists(), f"{self.command[-1]} is not built: make clients"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PAGODA_")}
        self._environment = {**clean, "PAGODA_URL": address, "PAGODA_TOKEN": token}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start it, with pipes at all three ends."""
        return subprocess.Popen(
            [*self.command, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=self._environment,
        )

    def run(self, *arguments: str, said: str = "", status: int = 0) -> tuple[str, str]:
        """Run it to its end, which must be `status`; what it wrote to standard output and error."""
        with self.start(*arguments) as process:
            out, err = process.communicate(said)
        assert process.returncode == status, (process.returncode, out, err)
        return out, err


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    """All three services, exact enough for one answer in all languages."""
    with cluster(dtype="float32", worker_args=("--num-blocks", "512"), gateway_args=()) as services:
        yield services


@pytest.fixture(params=PROGRAMS)
def language(request: pytest.FixtureRequest) -> str:
    """Every language in turn."""
    return str(request.param)


@pytest.fixture
def program(running: Cluster, language: str) -> Program:
    """The client in that language, pointed at the running gateway."""
    return Program(language, running.grpc)


# ---------------------------------------------------------------------------------------------- chatting


def test_a_streamed_chat_is_what_the_sdk_says(running: Cluster, program: Program) -> None:
    with pagoda.Client(running.grpc) as sdk:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
        want = sdk.chat(messages, temperature=0.0, max_tokens=32)
    out, err = program.run("chat", "--system", "Be brief.", *GREEDY, QUESTION)
    assert out == f"{want.text}\n"
    ended = ENDED.search(err)
    assert ended is not None, err
    assert int(ended["tokens"]) == want.usage.completion_tokens
    assert int(ended["messages"]) > 1, "it came in one piece"


def test_a_conversation_is_what_the_sdk_says(running: Cluster, program: Program) -> None:
    messages, want = [], ""
    with pagoda.Client(running.grpc) as sdk:
        for turn in TURNS:
            messages.append({"role": "user", "content": turn})
            answer = sdk.chat(messages, temperature=0.0, max_tokens=32).text
            messages.append({"role": "assistant", "content": answer})
            want += f"{answer}\n"
    out, _ = program.run("chat", *GREEDY, said="".join(f"{turn}\n" for turn in TURNS))
    assert out == want


def test_the_help_teaches(program: Program) -> None:
    out, err = program.run("--help")
    assert not err
    for word in ("PAGODA_URL", "PAGODA_TOKEN", "DEADLINE_EXCEEDED", "cancelled", "--leave-after", "many"):
        assert word in out
    for wrong in (
        ["shout"],
        ["chat", "--max-tokens", "few", "x"],
        ["chat", "--shout", "x"],
        ["chat", "x", "y"],
    ):
        out, err = program.run(*wrong, status=2)
        assert not out and "--help" in err


# --------------------------------------------------------------------------------------- ends before the end


def test_leaving_an_answer_frees_it_at_the_server(running: Cluster, program: Program) -> None:
    """The program lives on and its connection, too: it is the call that was cancelled."""
    before = total(scrape(running.metrics), "pagoda:requests_cancelled_total")
    with program.start("chat", *ENDLESS, "--leave-after", "3") as process:
        assert process.stdin and process.stdout and process.stderr
        for number in (1, 2):
            process.stdin.write("Tell me a long story.\n")
            process.stdin.flush()
            said = process.stderr.readline()
            assert re.fullmatch(r"\[\S+: left after 3 messages]\n", said), said + process.stderr.read()
            running.assert_idle()
            cancelled = total(scrape(running.metrics), "pagoda:requests_cancelled_total")
            assert cancelled == before + number
            assert process.poll() is None
        out, err = process.communicate()
        assert (process.returncode, err) == (0, "") and len(out.splitlines()) >= 2


def test_a_killed_program_frees_its_request(running: Cluster, program: Program) -> None:
    with program.start("chat", *ENDLESS, "Tell me a long story.") as process:
        assert process.stdout
        assert process.stdout.read(1)
        assert running.snapshot().num_running == 1
        process.kill()
    running.assert_idle()


def test_a_deadline_ends_the_request(running: Cluster, program: Program) -> None:
    before = total(scrape(running.metrics), "pagoda:requests_cancelled_total")
    _, err = program.run("chat", *ENDLESS, "--deadline", "4", "Tell me a long story.", status=1)
    assert err.startswith("error: DEADLINE_EXCEEDED: ")
    running.assert_idle()
    assert total(scrape(running.metrics), "pagoda:requests_cancelled_total") == before + 1


# ------------------------------------------------------------------------------------------ error details


def test_a_bad_request_names_the_field(program: Program) -> None:
    _, err = program.run("chat", "--temperature=-1", "Hi", status=1)
    first, *details = err.splitlines()
    assert first.startswith("error: INVALID_ARGUMENT: sampling.temperature: is -1")
    assert details[0].startswith("  field sampling.temperature: ")
    _, err = program.run("chat", "--model", "nobody", "Hi", status=1)
    first, *details = err.splitlines()
    assert first.startswith("error: NOT_FOUND: ")
    assert details[0].startswith("  field model: ") and details[1:] == ["  reason MODEL_NOT_FOUND"]


def test_a_token_is_sent(running: Cluster, language: str) -> None:
    guarded = Cluster(running.scheduler, running.model, running.dtype)
    guarded.start_gateway("--token", "secret")
    assert guarded.gateway is not None
    try:
        _, err = Program(language, guarded.grpc).run("chat", QUESTION, status=1)
        assert err.startswith("error: UNAUTHENTICATED: ")
        out, _ = Program(language, guarded.grpc, token="secret").run("chat", *GREEDY, QUESTION)
        assert "Paris" in out
    finally:
        guarded.gateway.stop()


def test_a_server_that_is_away_is_unavailable(language: str) -> None:
    # Port 1 is nobody's.
    _, err = Program(language, "127.0.0.1:1").run("chat", "Hi", status=1)
    assert err.startswith("error: UNAVAILABLE: ") and "refused" in err.lower()
    out, err = Program(language, "127.0.0.1:1").run("many", "--chats", "2", status=1)
    assert out.startswith("0 of 2 chats finished") and err.count("UNAVAILABLE") == 2


# -------------------------------------------------------------------------------------------------- many


def test_many_chats_at_once(language: str, tmp_path: Path) -> None:
    """100 chats in flight at the same time, shown by the scheduler: all wait for the worker, then all run in
    one batch. One more is refused meanwhile, and told when to come back."""
    record = tmp_path / "record"
    with cluster(
        scheduler_args=("--record", str(record), "--max-waiting", str(NUM_CHATS)),
        worker_args=("--num-blocks", "1024", "--max-slots", str(NUM_CHATS)),
        gateway_args=(),
    ) as services:
        program = Program(language, services.grpc)
        services.workers.pop("w0").stop()
        options = ("--max-tokens", str(NUM_TOKENS), "--ignore-eos", "--seed", "7")
        with program.start("many", "--chats", str(NUM_CHATS), *options) as process:
            wait_until(
                lambda: services.snapshot().num_waiting == NUM_CHATS or process.poll() is not None,
                60,
                "all wait",
            )
            assert process.poll() is None, process.communicate()
            _, refused = program.run("chat", "Hi", status=1)
            services.start_worker("w1")
            out, err = process.communicate()
        assert (process.returncode, err) == (0, ""), (out, err)
        first, *details = refused.splitlines()
        assert first.startswith("error: RESOURCE_EXHAUSTED: ") and "  try again in 1 s" in details, refused
    num_tokens = NUM_CHATS * NUM_TOKENS
    assert out.startswith(f"{NUM_CHATS} of {NUM_CHATS} chats finished, {num_tokens} tokens in "), out
    assert read_record(record).most_rows == NUM_CHATS
    figures.record("languages", language=language, chats=NUM_CHATS, tokens=num_tokens)


# ------------------------------------------------------------------------------------------------- stubs


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What buf.gen.yaml makes: a folder for each language."""
    folder = tmp_path_factory.mktemp("stubs")
    buf = ROOT / "node_modules" / ".bin" / "buf"
    done = subprocess.run([buf, "generate", "--output", folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "build" / "stubs"


def test_stubs_for_more_languages_are_generated(stubs: Path) -> None:
    for path, word in {
        "cpp/pagoda/v1/inference.grpc.pb.h": "class InferenceService",
        "go/pagoda/v1/inference_grpc.pb.go": "type InferenceServiceClient interface",
        "java/pagoda/v1/InferenceServiceGrpc.java": "class InferenceServiceGrpc",
        "php/Pagoda/V1/InferenceServiceClient.php": "class InferenceServiceClient",
        "python/pagoda/v1/inference_pb2_grpc.py": "class InferenceServiceStub",
        "ruby/pagoda/v1/inference_services_pb.rb": "module InferenceService",
    }.items():
        assert word in (stubs / path).read_text()


def test_the_example_in_ruby_runs_as_it_is_documented(running: Cluster, stubs: Path, tmp_path: Path) -> None:
    (example,) = re.findall(r"```ruby\n(.*?)```", (ROOT / "docs" / "clients.md").read_text(), re.S)
    program = tmp_path / "chat.rb"
    program.write_text(example)
    environment = {**os.environ, "PAGODA_URL": running.grpc, "STUBS": str(stubs / "ruby")}
    done = subprocess.run(["ruby", program, QUESTION], env=environment, capture_output=True, text=True)
    with pagoda.Client(running.grpc) as sdk:
        want = sdk.chat([{"role": "user", "content": QUESTION}], temperature=0.0, max_tokens=32).text
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{want}\n", "")
