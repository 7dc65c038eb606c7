"""vLLM on the rows of the GPU table: in process through its offline API, and its own server for `openai`.

    . .peers/vllm/env.sh
    python3 -m benchmarks.gpu_vllm --preset qwen2.5-7b --out vllm.json
    python3 -m benchmarks.gpu_vllm --rows openai --tokenizer FOLDER --append vllm.json --out vllm.json

vLLM's defaults, but for the context of 4,096 tokens, 0.9 of the memory and the prefix cache, which is off.
Rows, requests and repeats are those of Pagoda (`gpu_rows.py`). With `--append FILE` an earlier run's rows
come first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_facts import facts
from benchmarks.gpu_models import PRESETS, config_folder
from benchmarks.gpu_openai import Route, openai_rows
from benchmarks.gpu_rows import ROWS, Load, Outcome, Row, warm
from benchmarks.workload import Request, fixed

PACKAGES = ("vllm", "torch", "triton", "transformers", "numpy", "flashinfer-python", "nvidia-nccl-cu13")
ROOT = Path(__file__).resolve().parents[1]
TAIL_CHARS = 3000
STOP_S = 10.0  # for a server to end by itself, when all its requests are done
MEMORY_SHARE = 0.9  # of the device, as Pagoda's worker takes by default


def seconds_since_start() -> float:
    """Since this process was started, by the kernel's account (in steps of 10 ms)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / os.sysconf("SC_CLK_TCK")


class Offline:
    """vLLM's `LLM`, as `gpu_rows.Engine` wants it."""

    def __init__(self, folder: Path, vocab_size: int, context: int, extra: dict[str, Any]) -> None:
        # Our folder `kernels` must not be taken for the package of that name, which transformers looks for.
        sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
        os.chdir(folder)
        from vllm import LLM, SamplingParams

        self._params = SamplingParams
        self.vocab_size = vocab_size
        self.llm = LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=context,
            gpu_memory_utilization=MEMORY_SHARE,
            enable_prefix_caching=False,
            seed=0,
            **extra,
        )

    def run(self, requests: Sequence[Request], temperature: float, stops: Sequence[int] = ()) -> Outcome:
        """See `gpu_rows.Engine.run`."""
        prompts: Any = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        common: dict[str, Any] = {"temperature": temperature, "ignore_eos": True, "detokenize": False}
        if stops:
            common["stop_token_ids"] = list(stops)
        params = [self._params(max_tokens=n, **common) for _, n in requests]
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        if not stops:
            assert lengths == [n for _, n in requests], "an answer has a wrong length"
        return Outcome(seconds, sum(lengths))

    def config(self) -> dict[str, str]:
        """What its defaults came to."""
        c = self.llm.llm_engine.vllm_config
        return {
            "max_num_seqs": str(c.scheduler_config.max_num_seqs),
            "max_num_batched_tokens": str(c.scheduler_config.max_num_batched_tokens),
            "async_scheduling": str(c.scheduler_config.async_scheduling),
            "cudagraph_mode": str(c.compilation_config.cudagraph_mode),
            "num_gpu_blocks": str(c.cache_config.num_gpu_blocks),
        }


class Bench:
    """One run of the program and its rows so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.load = Load(
            num_sharegpt=options.num_requests,
            num_fixed=options.num_fixed,
            num_stop_ids=options.num_stop_ids,
            repeat=options.repeat,
            batches=options.batches,
            temperatures=options.temperatures,
            say=self.say,
        )
        self.result: dict[str, Any] = {
            "engine": "vllm",
            "preset": options.preset,
            "facts": facts(PACKAGES, options.commit),
            "flags": {k: str(v) for k, v in vars(options).items()},
            "results": [],
        }
        if options.append and options.append.exists():
            self.result["results"] = json.loads(options.append.read_text())["results"]

    def say(self, text: str) -> None:
        """Print a line with the time since the process started."""
        print(f"[{seconds_since_start():6.1f} s] {text}", flush=True)

    def keep(self, row: Row) -> None:
        """Note a row and write what there is."""
        self.result["results"].append(row)
        self.options.out.write_text(json.dumps(self.result, indent=1))

    def measure_offline(self, rows: list[str]) -> None:
        """Start the engine, which is a row of its own, and run the others."""
        o = self.options
        folder = config_folder(o.preset, Path(o.base)).resolve()
        extra = {"tensor_parallel_size": o.tensor_parallel} | json.loads(o.extra)
        engine = Offline(folder, PRESETS[o.preset]["vocab_size"], o.context, extra)
        engine.run(fixed(1, 512, 1, self.load.unseen()), 0.0)
        seconds = seconds_since_start()
        self.say("first token")
        self.result["config"] = engine.config()
        self.keep({"workload": "start", "kind": "random weights, first start", "seconds": seconds})
        warm(engine, self.load)
        for name in [name for name in ROWS if name in rows]:
            for row in ROWS[name](engine, self.load):
                self.keep(row)

    def measure_openai(self) -> None:
        """Start the server, wait for it, and load it."""
        o = self.options
        folder = config_folder(o.preset, Path(o.base), o.tokenizer).resolve()
        port, log = str(o.port), Path(o.base) / "vllm-server.log"
        command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        command += ["--served-model-name", folder.name, "--load-format", "dummy", "--dtype", "bfloat16"]
        command += ["--max-model-len", str(o.context), "--no-enable-prefix-caching"]
        command += ["--gpu-memory-utilization", str(MEMORY_SHARE)]
        command += ["--tensor-parallel-size", str(o.tensor_parallel)]
        command += ["--host", "127.0.0.1", "--port", port]
        began = time.perf_counter()
        with log.open("wb") as file:
            # In a group of its own: its engine is a process too, which must not outlive it with the device.
            server = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=folder, process_group=0
            )
        try:
            url = f"http://127.0.0.1:{port}"
            self._wait(server, f"{url}/health", log)
            self.say(f"server ready after {time.perf_counter() - began:.1f} s")
            route = Route(url, folder.name, o.peers.resolve(), num_requests=o.num_fixed, limit_s=o.limit_s)
            for row in openai_rows(route, self.load, Path(o.base)):
                self.keep(row)
        except BaseException:
            print(log.read_text(errors="replace")[-TAIL_CHARS:], flush=True)
            raise
        finally:
            server.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(STOP_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()

    def _wait(self, server: subprocess.Popen[bytes], url: str, log: Path) -> None:
        import urllib.error
        import urllib.request

        deadline = time.monotonic() + self.options.ready_s
        while time.monotonic() < deadline:
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with {server.returncode}, see {log}")
            try:
                with urllib.request.urlopen(url, timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError(f"the server is not ready after {self.options.ready_s:.0f} s")


def main() -> None:
    """Measure and write."""
    p = argparse.ArgumentParser(description="vLLM on the rows of the GPU table")
    p.add_argument("--preset", choices=PRESETS, default="qwen2.5-7b")
    p.add_argument("--rows", default=",".join(ROWS), help=f"{','.join(ROWS)},openai")
    p.add_argument("--out", type=Path, default=Path("vllm.json"))
    p.add_argument("--append", type=Path, help="JSON whose rows come first")
    p.add_argument("--base", default="/tmp/models", help="where model folders are made")
    p.add_argument("--tokenizer", type=Path, help="folder with tokenizer*.json, which openai needs")
    p.add_argument("--peers", type=Path, default=Path(".peers/bench"), help="folder of bench_serve.py")
    p.add_argument("--context", type=int, default=4096)
    p.add_argument("--tensor-parallel", type=int, default=1, help="devices that share the model")
    p.add_argument("--num-requests", type=int, default=1000)
    p.add_argument("--num-fixed", type=int, default=512)
    p.add_argument("--num-stop-ids", type=int, default=760)
    numbers = lambda of: lambda text: [of(x) for x in text.split(",")]  # noqa: E731
    p.add_argument("--batches", type=numbers(int), default=[1, 8, 64])
    p.add_argument("--temperatures", type=numbers(float), default=[0.0, 1.0])
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--ready-s", type=float, default=300)
    p.add_argument("--limit-s", type=float, default=240)
    p.add_argument("--commit", default="", help="of the benchmark, where git cannot say")
    p.add_argument("--extra", default="{}", help="JSON of further LLM(...) arguments")
    options = p.parse_args()
    options.out, rows = options.out.resolve(), options.rows.split(",")
    if options.tokenizer:
        options.tokenizer = options.tokenizer.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    bench = Bench(options)
    bench.say(json.dumps(bench.result["facts"]))
    if "openai" in rows:
        bench.measure_openai()
        rows.remove("openai")
    if rows:
        bench.measure_offline(rows)


if __name__ == "__main__":
    main()
