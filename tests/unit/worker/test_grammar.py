"""Rows that follow grammars, on a tiny model: what they draw is judged by a fresh matcher of its own."""

from __future__ import annotations

import json
import queue
import random
import re
from typing import Any

import numpy as np
import pytest
import torch

from gateway_svc.text.grammars import choice_grammar, json_schema_grammar, regex_grammar
from gpu_worker.executor import DeviceExecutor
from gpu_worker.metrics import WorkerMetrics
from gpu_worker.spans import RowSpans
from kernels.sample import allow
from pagoda.internal.v1 import worker_pb2
from tests.support.grammars import EOS, Judge, tiny_vocabulary
from tests.unit.worker.harness import VOCAB, prompt

SCHEMA = {
    "type": "object",
    "properties": {
        "ab": {"type": "integer", "minimum": 0, "maximum": 99},
        "xyz": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["ab", "xyz"],
    "additionalProperties": False,
}
JSON = json_schema_grammar(SCHEMA)
WORD = regex_grammar("[a-f]{2,6}(12)*!")
RANDOM = {"temperature": 1.0, "stop_token_ids": [EOS]}
WAIT_S = 60.0
STOP, NAN = worker_pb2.ROW_END_STOP, worker_pb2.ROW_END_NAN


@pytest.fixture(scope="module")
def judge():
    return Judge(tiny_vocabulary(VOCAB))


@pytest.fixture
def worker(device):
    device.runner.grammars.learn(tiny_vocabulary(VOCAB))
    return device


def outputs(device, slots, prompts):
    return [device.sequences[slot].tokens[len(p) :] for slot, p in zip(slots, prompts, strict=True)]


def run(device, m=1, num_steps=40, **by_slot):
    """Prefill a row a grammar ("" is none), decode all; outputs and how they ended."""
    prompts = {slot: prompt(7 + slot, slot) for slot in range(len(by_slot))}
    for slot, grammar in enumerate(by_slot.values()):
        device.add(slot, prompts[slot], grammar=grammar, seed=slot, **RANDOM)
    device.step({slot: len(p) for slot, p in prompts.items()})
    device.decode(list(prompts), num_steps, m)
    made = outputs(device, prompts, prompts.values())
    return made, [device.sequences[slot].ended for slot in prompts]


@pytest.mark.parametrize("m", [1, 3])
def test_every_token_is_allowed_and_the_end_is_the_grammars(worker, judge, m):
    choice = ["ab", "xyz", "12!"]
    made, ended = run(worker, m, 75 // m, a=JSON, b="", c=WORD, d=JSON, e=choice_grammar(choice))
    for output, how, grammar in zip(made, ended, (JSON, None, WORD, JSON, None), strict=True):
        if grammar is not None:
            judge.assert_follows(grammar, output, ended=how == STOP)
    assert ended[2] == ended[4] == STOP
    assert re.fullmatch("[a-f]{2,6}(12)*!", judge.text(made[2])) and judge.text(made[4]) in choice
    for output, how in ((made[0], ended[0]), (made[3], ended[3])):
        if how == STOP:
            value = json.loads(judge.text(output))
            assert 0 <= value["ab"] <= 99 and len(value["xyz"]) <= 3


def test_iterations_in_a_step_change_nothing(tiny, device):
    device.runner.grammars.learn(tiny_vocabulary(VOCAB))
    one, _ = run(device, 1, 24, a=JSON, b=WORD)
    for slot in (0, 1):
        device.release(slot)
    four, _ = run(device, 4, 6, a=JSON, b=WORD)
    assert one == four


def test_other_rows_draw_what_they_draw_without(worker):
    beside, _ = run(worker, 1, 20, a="", b=JSON, c="")
    for slot in range(3):
        worker.release(slot)
    alone, _ = run(worker, 1, 20, a="", b="", c="")
    assert (beside[0], beside[2]) == (alone[0], alone[2])
    assert beside[1] != alone[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_resumed_row_goes_on_as_it_would_have(worker, judge, temperature):
    sampling = {"temperature": temperature, "seed": 5, "grammar": JSON, "stop_token_ids": [EOS]}
    whole = worker.generate(0, prompt(9), 14, **sampling)
    assert len(whole) > 6
    resumed = worker.add(1, prompt(9) + whole[:5], num_prompt=9, **sampling)
    worker.step({1: 14})
    worker.decode([1], len(whole) - 6)
    assert resumed.tokens[9:] == whole
    judge.assert_follows(JSON, whole, ended=resumed.ended == STOP)


def test_forks_have_matchers_of_their_own(worker, judge):
    whole_block = prompt(16)
    worker.add(0, whole_block, grammar=JSON, seed=1, **RANDOM)
    for slot in (1, 2):
        worker.fork(slot, 0, grammar=JSON, seed=1 + slot, **RANDOM)
    worker.step({0: 16, 1: 0, 2: 0})
    worker.decode([0, 1, 2], 30)
    made = outputs(worker, (0, 1, 2), [whole_block] * 3)
    for slot, output in enumerate(made):
        judge.assert_follows(JSON, output, ended=worker.sequences[slot].ended == STOP)
    assert len({tuple(output) for output in made}) == 3
    worker.add(3, whole_block, grammar=JSON, seed=2, **RANDOM)
    worker.step({3: 16})
    worker.decode([3], len(made[1]) - 1)
    assert worker.sequences[3].tokens[16:] == made[1], "a fork draws what a row of its seed draws"


def test_a_slot_is_used_again_while_nobody_has_read_its_last_token(worker, judge):
    worker.add(0, prompt(9), grammar=JSON, seed=1, **RANDOM)
    first = worker.launch({0: 9})
    worker.release(0)
    worker.add(0, prompt(6), grammar=WORD, seed=1, **RANDOM)
    second = worker.launch({0: 6})
    worker.sequences[0].tokens = prompt(6)
    worker.read(*second)
    worker.decode([0], 12)
    assert first[1].drawn is not None
    sequence = worker.sequences[0]
    judge.assert_follows(WORD, sequence.tokens[6:], ended=sequence.ended == STOP)


@pytest.mark.parametrize(
    "grammar",
    [
        "start: nothing",
        regex_grammar("日本"),  # one of the two is in the vocabulary
        json.dumps({"grammars": [{"json_schema": {"type": "foo"}}]}),
    ],
)
def test_a_grammar_that_fails_fails_its_row_alone(worker, grammar):
    made, ended = run(worker, 1, 5, a="", b=grammar, c="")
    assert ended[1] == NAN and len(made[1]) <= 1
    assert len(made[0]) == len(made[2]) == 6


def test_without_a_vocabulary_a_row_with_a_grammar_fails(device):
    made, ended = run(device, 1, 2, a=JSON, b="")
    assert (made[0], ended[0]) == ([], NAN) and len(made[1]) == 3


def test_a_vocabulary_may_be_shorter_than_the_models(device, judge):
    short = tiny_vocabulary(VOCAB)
    del short.tokens[110:]
    device.runner.grammars.learn(short)
    made, ended = run(device, 1, 40, a=WORD)
    judge.assert_follows(WORD, made[0], ended=ended[0] == STOP)
    assert max(made[0]) < 110


def test_a_new_vocabulary_counts_from_then_on(worker):
    changed = tiny_vocabulary(VOCAB)
    first, second = changed.tokens[3 + ord("a") - 32], changed.tokens[3 + ord("b") - 32]
    changed.tokens[3 + ord("a") - 32], changed.tokens[3 + ord("b") - 32] = second, first
    for vocabulary, token in ((tiny_vocabulary(VOCAB), "a"), (changed, "b")):
        worker.runner.grammars.learn(vocabulary)
        assert worker.generate(0, prompt(9), 1, grammar=regex_grammar("a+!")) == [3 + ord(token) - 32]


def test_logprobs_are_the_models_own(worker):
    worker.add(0, prompt(9), num_logprobs=2, grammar=choice_grammar(["xyz"]), **RANDOM)
    worker.add(1, prompt(9), num_logprobs=0, **RANDOM)
    result = worker.step({0: 9, 1: 9})
    assert list(result.logprobs.num_top) == [2, 0]
    raw = worker.logits[-1][1, :VOCAB].float().log_softmax(-1)  # row 1's are as the model gave them
    assert result.logprobs.token_logprobs[0] == pytest.approx(float(raw[result.tokens[0]]), abs=1e-4)
    assert list(result.logprobs.top_logprobs) == pytest.approx(raw.topk(2).values.tolist(), abs=1e-4)


def test_penalties_and_filters_work_within_what_is_allowed(worker, judge):
    sampling = {**RANDOM, "top_k": 3, "top_p": 0.9, "frequency_penalty": 1.5, "repetition_penalty": 1.3}
    worker.add(0, prompt(9), grammar=WORD, **sampling)
    worker.step({0: 9})
    worker.decode([0], 20)
    sequence = worker.sequences[0]
    judge.assert_follows(WORD, sequence.tokens[9:], ended=sequence.ended == STOP)


@pytest.mark.parametrize("m", [1, 3])
def test_rows_that_sit_iterations_out_draw_the_same(device, judge, monkeypatch, m):
    """A GPU does not wait for a mask that takes long. A CPU does, so late masks are made up here."""
    grammars = device.runner.grammars
    grammars.learn(tiny_vocabulary(VOCAB))
    expected, ended = run(device, 1, 40, a=JSON, b="", c=WORD)
    for slot in range(3):
        device.release(slot)
    chance, late = random.Random(m), 0
    settle, fill = grammars.settle, grammars._fill
    jobs: list[Any] = []

    def settle_some() -> None:
        nonlocal late
        settle()
        waiting = [job for job in jobs if chance.random() < 0.4]
        late += len(waiting)
        for job in jobs:
            if job not in waiting:
                fill(*job)
        jobs[:] = waiting

    monkeypatch.setattr(grammars, "settle", settle_some)
    monkeypatch.setattr(grammars, "_fill", lambda row, token: jobs.append((row, token)))
    made, ended_again = run(device, m, 96 // m, a=JSON, b="", c=WORD)
    assert late > 10
    assert (made[0], made[2], ended_again[::2]) == (expected[0], expected[2], ended[::2])
    assert made[1][: len(expected[1])] == expected[1]


# -------------------------------------------------------------------------------------- the executor


def first_step(step_id, slot, grammar, seed, released=()):
    row = worker_pb2.NewRow(
        slot=slot, tokens=prompt(9), num_prompt_tokens=9, blocks=range(8), last_position=100,
        sampling=worker_pb2.RowSampling(grammar=grammar, seed=seed, **RANDOM),
    )  # fmt: skip
    return worker_pb2.Step(
        epoch=1, step_id=step_id, num_iterations=1, slots=[slot], num_tokens=[9], new_rows=[row],
        released_slots=released,
    )  # fmt: skip


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_steps_ahead_of_their_results(device, judge, depth):
    """At any depth the output is the same, and steps after a row's end draw nothing."""
    expected = None
    results: queue.SimpleQueue = queue.SimpleQueue()
    failures: queue.SimpleQueue = queue.SimpleQueue()
    executor = DeviceExecutor(
        device.runner, device.stager, WorkerMetrics("m", "g"), results.put, failures.put, device.place,
        RowSpans(None, "g", 0),
    )  # fmt: skip
    executor.start()
    try:
        executor.reset(1)
        executor.learn(tiny_vocabulary(VOCAB))
        executor.submit(first_step(0, 0, WORD, 3))
        sent, output = 1, []
        for _ in range(24):
            while sent - len(output) < depth and sent < 20:
                executor.submit(worker_pb2.Step(epoch=1, step_id=sent, num_iterations=1, slots=[0]))
                sent += 1
            output.append(results.get(timeout=WAIT_S))
            if len(output) == 20:
                break
        tokens = [t for result in output for t in result.tokens]
        assert tokens[-1] == EOS and len(tokens) < 20
        judge.assert_follows(WORD, tokens, ended=True)
        expected = expected or tokens
        executor.reset(1)
        executor.submit(first_step(0, 0, WORD, 3))
        assert list(results.get(timeout=WAIT_S).tokens) == expected[:1], "a reset forgets the matchers"
    finally:
        executor.close(WAIT_S)
    assert failures.empty()


# ---------------------------------------------------------------------------------------- the masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_allow_rules_out_what_has_no_bit(dtype):
    generator = np.random.default_rng(1)
    logits = torch.randn(5, 150).to(dtype)
    bits = generator.integers(0, 2, (2, 4 * 32), dtype=np.uint8)
    packed = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    before = logits.clone()
    allow(logits, torch.tensor([-1, 1, -1, 0, -1], dtype=torch.int32), torch.from_numpy(packed))
    for place, row in ((0, 3), (1, 1)):
        expected = before[row].clone()
        expected[:128][torch.from_numpy(bits[place] == 0)] = float("-inf")
        assert torch.equal(logits[row], expected)
    assert torch.equal(logits[[0, 2, 4]], before[[0, 2, 4]])
