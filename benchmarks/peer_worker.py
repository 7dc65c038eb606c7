"""One peer engine in a process of its own, which `peers_cpu.py` starts in the peer's environment.

Reads one JSON object a line, `{"prompts": [[id, ...], ...], "max_tokens": n, "shared": k}` (the prompts
have their first k ids in common), and answers each with `{"start": s, "first": s, "end": s, "num_tokens":
n}`, times in seconds on one clock.  The first answer, before any request, is `{"version": ...}`: the engine
is loaded and warm.  Ends with its input.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUM_THREADS = 2
Run = Callable[[list[list[int]], int, int], dict[str, Any]]


def vllm_engine(model: str, dtype: str) -> Run:
    """vLLM's engine at its defaults, but for the context length and number of sequences of the load."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="2",
        OMP_NUM_THREADS=str(NUM_THREADS),
        VLLM_CPU_OMP_THREADS_BIND="0-1",
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_DO_NOT_TRACK="1",
        VLLM_LOGGING_LEVEL="WARNING",
    )
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = LLM(model, dtype=dtype, max_model_len=1024, max_num_seqs=32, disable_log_stats=True).llm_engine
    number = 0

    def run(prompts: list[list[int]], max_tokens: int, shared: int) -> dict[str, Any]:
        nonlocal number
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        start, first, num_tokens = time.perf_counter(), 0.0, 0
        for ids in prompts:
            number += 1
            engine.add_request(str(number), {"prompt_token_ids": ids}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                num_tokens += len(output.outputs[0].token_ids)
                first = first or time.perf_counter()
        return {"start": start, "first": first, "end": time.perf_counter(), "num_tokens": num_tokens}

    return run


def ctranslate2_engine(model: str, dtype: str) -> Run:
    """CTranslate2, one static batch a run; a shared beginning goes through its cache of static prompts."""
    import ctranslate2

    generator = ctranslate2.Generator(
        model, device="cpu", compute_type=dtype, inter_threads=1, intra_threads=NUM_THREADS
    )
    names = json.loads((Path(model) / "vocabulary.json").read_text(encoding="utf-8"))

    def run(prompts: list[list[int]], max_tokens: int, shared: int) -> dict[str, Any]:
        tokens = [[names[i] for i in ids] for ids in prompts]
        first = 0.0

        def note_first(step: Any) -> bool:
            nonlocal first
            first = first or time.perf_counter()
            return False  # go on

        start = time.perf_counter()
        results = generator.generate_batch(
            [ids[shared:] for ids in tokens],
            static_prompt=tokens[0][:shared] or None,
            beam_size=1,
            sampling_topk=1,
            min_length=max_tokens,  # no end of text before it
            max_length=max_tokens,
            include_prompt_in_result=False,
            callback=note_first if len(prompts) == 1 else None,
        )
        end = time.perf_counter()
        num_tokens = sum(len(result.sequences_ids[0]) for result in results)
        return {"start": start, "first": first, "end": end, "num_tokens": num_tokens}

    return run


ENGINES: dict[str, tuple[str, Callable[[str, str], Run]]] = {
    "vllm": ("vllm-cpu", vllm_engine),
    "ctranslate2": ("ctranslate2", ctranslate2_engine),
}


def main() -> None:
    """Load the engine, warm it up, then serve requests until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    options = parser.parse_args()
    # Engines print as they please: answers keep the real standard output, prints go to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    distribution, make = ENGINES[options.engine]
    run = make(options.model, options.dtype)
    drawn = random.Random("warm-up")
    run([[drawn.randrange(1000, 40000) for _ in range(128)] for _ in range(32)], 4, 0)
    run([[drawn.randrange(1000, 40000) for _ in range(128)]], 4, 0)
    print(json.dumps({"version": importlib.metadata.version(distribution)}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        result = run(request["prompts"], request["max_tokens"], request["shared"])
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
