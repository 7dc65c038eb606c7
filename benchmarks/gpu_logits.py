"""The worker's logits on real prompts, prefill and decode, beside transformers' in float32.

    python -m benchmarks.gpu_logits --model FOLDER --prompts prompts.json [--dtype bfloat16] [--out FILE]

The worker's own model, rows and runner are called in this process, without graphs or wire. For each
prompt its last position and those of a few greedy tokens after it are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_facts import facts
from gpu_worker.batch import Shape
from gpu_worker.kv_cache import KVCache
from gpu_worker.models.llama import Llama
from gpu_worker.models.loader import open_model
from gpu_worker.runner import Runner
from gpu_worker.slots import Rows
from gpu_worker.staging import Limits, Stager
from pagoda.internal.v1 import worker_pb2 as wire

NUM_DECODES = 8
MAX_ERROR = 2e-2  # of the largest absolute logit of the row
MAX_LEN = 2048
NUM_BUFFERS = 3
NUM_WORST = 5  # rows that are named
PACKAGES = ("torch", "triton", "transformers")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def _compiled_ahead(key: str, device: torch.device) -> Iterator[bool]:
    """Has kernels compiled side by side, as a worker does at its start; says whether to rehearse inside."""
    warmer = None
    if device.type == "cuda":
        from kernels.cuda import compile as ahead  # Triton is for CUDA alone
        from kernels.cuda.device import traits

        warmer = ahead.warmer(traits(device).capability, f"logits {key}", len(os.sched_getaffinity(0)))
    if warmer is None:
        yield False
        return
    with warmer.rehearsal(), torch.inference_mode():
        yield True
    for line in warmer.finish(timeout=60):
        print(f"not compiled ahead: {line}", flush=True)


class Model:
    """The worker's model on one device, one prompt at a time."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        files = open_model(folder, "auto", 0)
        limits = Limits(4, MAX_LEN, 16, MAX_LEN // 16 + 1, MAX_LEN, 1)
        with _compiled_ahead(repr((files.config, dtype, limits)), device) as rehearse:
            cache = KVCache(files.config, limits.num_blocks, limits.block_size, dtype, device)
            self.vocab_size = files.vocab_size
            self._model = Llama(
                files.config,
                files.weights(),
                cache,
                dtype=dtype,
                device=device,
                vocab_size=files.vocab_size,
                max_len=MAX_LEN,
            )
            self._rows = Rows(limits, device)
            self._runner = Runner(self._model, cache, self._rows, limits, NUM_BUFFERS)
            if rehearse:
                for shape in (Shape(1, 1, 1), Shape(1, 512, 1, True, 1, 1)):
                    self._runner.rehearse(shape)
                self._runner.rehearse_diff()
        self._stager = Stager(limits, device, NUM_BUFFERS)
        self._seen: list[torch.Tensor] = []
        self._number = 0
        plain = self._model.logits

        def noted(hidden: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
            logits = plain(hidden, delta)
            self._seen.append(logits.clone())
            return logits

        self._model.logits = noted  # type: ignore[method-assign]

    def run(self, prompt: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """Logits float32[1 + NUM_DECODES, vocab_size] after the prompt and after each greedy token; these."""
        self._seen.clear()
        total = len(prompt) + NUM_DECODES + 1
        row = wire.NewRow(
            slot=0,
            tokens=prompt,
            num_prompt_tokens=len(prompt),
            blocks=range(-(-total // 16)),
            last_position=total,
        )
        tokens = self._step(wire.Step(new_rows=[row], slots=[0], num_tokens=[len(prompt)]))
        for _ in range(NUM_DECODES):
            tokens += self._step(wire.Step(slots=[0]))
        self._stager.stage(self._numbered(wire.Step(released_slots=[0])))
        return torch.cat([logits[:1] for logits in self._seen]).float(), tokens[:-1]

    def _step(self, step: wire.Step) -> list[int]:
        outputs = self._runner.run(*self._stager.stage(self._numbered(step)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        assert outputs.drawn is not None, "a row did not sample"
        return [int(outputs.drawn[0, 0, 0])]

    def _numbered(self, step: wire.Step) -> wire.Step:
        step.step_id, step.num_iterations = self._number, 1
        self._number += 1
        return step


@dataclass
class Errors:
    """What was found over all rows; errors are shares of a row's largest absolute logit."""

    shares: list[float] = field(default_factory=list)
    """Of each row: prompt after prompt, `1 + NUM_DECODES` rows each, of which the first is the prefill's."""
    other_argmax: int = 0
    """Rows whose best token is another one though its margin exceeds the row's largest error."""
    near_ties: int = 0
    """Rows whose best token is another one within the error."""

    def add(self, got: torch.Tensor, want: torch.Tensor) -> None:
        """Compare [R, V] with [R, V]."""
        got, want = got.double(), want.double()
        error = (got - want).abs().amax(-1)
        shares = torch.where(got.isfinite().all(-1), error / want.abs().amax(-1), float("inf"))
        best = want.topk(2).values
        differs = got.argmax(-1) != want.argmax(-1)
        # Two logits move by the error each.
        clear = best[:, 0] - best[:, 1] > 2 * error
        self.shares += shares.tolist()
        self.other_argmax += int((differs & clear).sum())
        self.near_ties += int((differs & ~clear).sum())

    @property
    def passed(self) -> bool:
        """Whether every error is within its bound and no argmax differs without a near tie."""
        return max(self.shares) <= MAX_ERROR and not self.other_argmax

    def figures(self) -> dict[str, Any]:
        """How the errors are spread over the rows, and where the largest are."""
        rows = 1 + NUM_DECODES
        ordered = sorted(self.shares)
        worst = sorted(range(len(ordered)), key=lambda i: self.shares[i], reverse=True)[:NUM_WORST]
        return {
            "max": ordered[-1],
            "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
            "median": statistics.median(ordered),
            "mean": statistics.fmean(ordered),
            "max_of_prefill": max(self.shares[::rows]),
            "above_bound": sum(share > MAX_ERROR for share in ordered),
            "worst": [
                {"prompt": i // rows, "decodes": i % rows, "error": round(self.shares[i], 5)} for i in worst
            ],
            "other_argmax": self.other_argmax,
            "near_ties": self.near_ties,
        }


@torch.inference_mode()
def compare(
    folder: Path, prompts: Sequence[Sequence[int]], dtype: str, device: torch.device
) -> tuple[Errors, Errors]:
    """Errors of the worker's model and of transformers' in the same type, on the same rows."""
    from transformers import AutoModelForCausalLM

    ours = Model(folder, DTYPES[dtype], device)

    def theirs(of: torch.dtype) -> Any:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=of)
        return loaded.to(device).eval()

    reference, peer = theirs(torch.float32), theirs(DTYPES[dtype])
    errors, peer_errors = Errors(), Errors()
    for prompt in prompts:
        got, tokens = ours.run(prompt)
        ids = torch.tensor([[*prompt, *tokens]], device=device)
        want, same_type = (
            model(ids, logits_to_keep=1 + NUM_DECODES).logits[0, :, : ours.vocab_size]
            for model in (reference, peer)
        )
        errors.add(got, want)
        peer_errors.add(same_type, want)
    return errors, peer_errors


def main() -> int:
    """Compare and print; 1 when a bound is passed."""
    parser = argparse.ArgumentParser(description="the worker's logits beside transformers' in float32")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON: lists of token ids")
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="", help="what is measured, where git cannot say")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    began = time.perf_counter()
    prompts = json.loads(options.prompts.read_text())[: options.num_prompts]
    errors, peer = compare(options.model, prompts, options.dtype, torch.device(options.device))
    row = {
        "workload": "logits",
        "facts": facts(PACKAGES, options.commit),
        "dtype": options.dtype,
        "prompts": len(prompts),
        "rows": len(errors.shares),
        "bound": MAX_ERROR,
        "errors": errors.figures(),
        "transformers": peer.figures(),
        "passed": errors.passed,
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(row), flush=True)
    if options.out:
        options.out.write_text(json.dumps(row, indent=1))
    return 0 if errors.passed else 1


if __name__ == "__main__":
    sys.exit(main())
