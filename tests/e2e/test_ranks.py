"""One model over two ranks: every token of one rank's, and of transformers'.

fp32, two processes that sum over gloo, through the scheduler by token ids: greedy, seeded, groups of samples
and beam searches, on the embedded model, whose 9 heads on 3 do not divide, and on a tiny Qwen2. The deaths
of ranks: test_rank_death. On 50 prompts and on GPUs: `python -m benchmarks.ranks`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support import beams, figures
from tests.support.cluster import Cluster, cluster
from tests.support.data import model_folder, prompts
from tests.support.runs import check, complete, greedy, run, sampled, shorter_than
from tests.support.scale import scaled
from tests.support.session_client import Received, SessionClient, request
from tests.support.tiny_model import tiny_model

pytestmark = pytest.mark.timeout(scaled(300, 3600))

TWO = ("--tensor-parallel", "2", "--num-blocks", "2048")
TIGHT = ("--tensor-parallel", "2", "--num-blocks", "28")  # of which the longest request needs 17
NUM_TOKENS = 24


def test_real_prompts_go_on_as_transformers_says() -> None:
    chosen = prompts(50) if scaled(False, True) else shorter_than(300, 6)
    groups = [replace(case, n=4) for case in sampled(chosen[:2])]
    cases = [*greedy(chosen), *sampled(chosen), *groups]
    searches = beams.matrix(chosen[:1], 8, widths=(4,))[::4]
    wanted = list(beams.wanted(searches))
    with cluster(model=str(model_folder()), worker_args=TWO) as running:
        got = run(running.scheduler.address, cases, 6)
        found = beams.run(running.scheduler.address, searches, 4)
        (line,) = [
            text for text in running.workers["w0"].text if "divide evenly" in text and '"rank": 0' in text
        ]
        assert "zero_kv_heads" in line, "what is padded is said at the start"
    singles = [single for case in cases for single in case.singles()]
    differences = check(singles, got.tokens)
    excused = beams.check(searches, found, wanted)
    figures.record(
        "ranks", model="embedded", prompts=len(chosen), searches=len(searches), excused_searches=len(excused),
        **differences.figures(),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_preempted_requests_go_on_as_transformers_says(mode: str) -> None:
    cases = greedy(shorter_than(300, 6))
    with cluster(
        model=str(model_folder()), scheduler_args=("--preemption-mode", mode), worker_args=TIGHT
    ) as running:
        got = run(running.scheduler.address, cases, 6)
        now = running.snapshot()
    assert [worker.num_ranks for worker in now.workers] == [2]
    assert now.num_preemptions and bool(now.swapped_tokens) == (mode == "swap")
    check(cases, got.tokens)


@torch.inference_mode()
def continuation(model: torch.nn.Module, ids: list[int]) -> list[int]:
    """What transformers takes as the best tokens."""
    given = torch.tensor([ids])
    mask = torch.ones_like(given)
    out = model.generate(given, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False)
    return out[0, len(ids) :].tolist()


async def answers(running: Cluster, asked: list[list[int]]) -> list[Received]:
    options = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    async with SessionClient(running.scheduler.address) as client:
        requests = [request(ids, logprobs=2, prompt_logprobs=1, **options) for ids in asked]
        return list(map(complete, await client.results(await client.submit(*requests))))


@torch.inference_mode()
def logprobs(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """What transformers says of each token behind the first."""
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:]).unsqueeze(1))[:, 0]


def test_a_qwen2_of_random_weights(tmp_path: Path) -> None:
    import transformers

    folder = tiny_model(tmp_path / "tiny")
    asked = [list(prompt.ids)[:200] for prompt in shorter_than(300, 8)]
    with cluster(model=str(folder), worker_args=TWO) as running:
        got = asyncio.run(answers(running, asked))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    for ids, answer in zip(asked, got, strict=True):
        assert answer.tokens[0] == continuation(model, ids)
        told = [entry.logprob for entry in (*answer.prompt_logprobs, *answer.logprobs[0])]
        wanted = logprobs(model, [*ids, *answer.tokens[0]])
        torch.testing.assert_close(torch.tensor(told), wanted, rtol=0, atol=1e-3)
