"""Logprobs of prompts' own tokens: each once as its prompt is computed, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from gpu_worker import prompt_logprobs
from pagoda.internal.v1 import worker_pb2
from tests.unit.worker.harness import Device, prompt, reference_logits

Entry = tuple[float, int, list[int], list[float]]
WANTED = {"num_prompt_logprobs": 4}


def reported(result: worker_pb2.StepResult) -> dict[int, list[Entry]]:
    """By row of the step: logprob, rank, best ids and their logprobs of each token."""
    columns = result.prompt_logprobs
    assert len(columns.token_logprobs) == len(columns.ranks) == len(columns.num_top)
    entries, start = [], 0
    for value, rank, count in zip(columns.token_logprobs, columns.ranks, columns.num_top, strict=True):
        top = slice(start, start + count)
        entries.append((value, rank, list(columns.top_ids[top]), list(columns.top_logprobs[top])))
        start += count
    assert start == len(columns.top_ids) == len(columns.top_logprobs)
    rest = iter(entries)
    rows = {
        row: [next(rest) for _ in range(count)]
        for row, count in zip(result.prompt_rows, result.num_prompt_logprobs, strict=True)
    }
    assert not list(rest)
    return rows


def check(model, tokens: Sequence[int], entries: Sequence[Entry], first: int, num_top: int) -> None:
    """Entries are what transformers says of the tokens from `first` on."""
    logprobs = reference_logits(model, tokens).log_softmax(-1)
    for position, (value, rank, ids, values) in enumerate(entries, start=first):
        expected, token = logprobs[position - 1], tokens[position]
        assert value == pytest.approx(expected[token].item(), abs=1e-4)
        assert rank == (expected > expected[token]).sum().item() + 1
        best = expected.topk(num_top)
        assert ids == best.indices.tolist()
        assert values == pytest.approx(best.values.tolist(), abs=1e-4)


def test_chunks_beside_other_rows(device, tiny):
    """Rows that ask, rows that do not and decodes: who asked is told, chunk by chunk."""
    model, _ = tiny("llama")
    asks, long, silent = prompt(40, 1), prompt(90, 2), prompt(60, 3)
    decoding = device.add(7, prompt(9, 4))
    device.step({7: 9})
    device.add(3, asks, num_prompt_logprobs=4, temperature=1.0, seed=5)
    device.add(0, long, num_prompt_logprobs=0)
    device.add(5, silent)
    got: dict[int, list[Entry]] = {3: [], 0: []}
    steps = (
        {7: 1, 5: 20, 3: 13, 0: 30},
        {7: 1, 5: 39, 3: 1},
        {7: 1, 3: 1, 5: 1, 0: 1},
        {7: 1, 3: 24, 0: 1},
        {7: 1, 3: 1, 0: 58},
    )
    for chunks in steps:
        device.grow(decoding, decoding.num_computed + 1)
        asking = {row: slot for row, slot in enumerate(chunks) if slot in got}
        result = device.step(chunks)
        for row, entries in reported(result).items():
            got[asking[row]] += entries
    assert [len(got[3]), len(got[0])] == [39, 89]
    check(model, asks, got[3], 1, 4)
    check(model, long, got[0], 1, 0)
    device.decode([7, 3, 0], 1)  # and nothing more
    assert not device.step({7: 1}).prompt_rows


def test_a_prompt_at_once_in_slices(device, tiny, monkeypatch):
    monkeypatch.setattr(prompt_logprobs, "SLICE", 7)
    tokens = prompt(100)
    device.add(2, tokens, **WANTED)
    check(tiny("llama")[0], tokens, reported(device.step({2: 100}))[0], 1, 4)


def test_sampled_logprobs_and_tokens_stay_what_they_are(device):
    """The tokens drawn, and their logprobs, do not depend on whether prompts are reported on."""
    options = {"temperature": 1.0, "seed": 3, "num_logprobs": 2}
    results = []
    for more in ({}, WANTED):
        device.add(1, prompt(33), **options, **more)
        device.add(4, prompt(20, 1), **options)
        results.append(device.step({1: 33, 4: 20}))
        for slot in (1, 4):
            device.release(slot)
    assert results[0].tokens == results[1].tokens
    without, beside = (result.logprobs for result in results)
    assert (without.ranks, without.top_ids) == (beside.ranks, beside.top_ids)
    assert list(without.token_logprobs) == pytest.approx(list(beside.token_logprobs), abs=1e-4)
    assert not results[0].HasField("prompt_logprobs") and not results[0].prompt_rows
    assert results[1].prompt_rows == [0]


def test_forks_are_told_nothing(device, tiny):
    """Only the row that computes the prompt reports, and the step's rows count its forks."""
    tokens, other = prompt(21), prompt(30, 1)
    device.add(0, tokens, **WANTED)
    device.step({0: 10})
    device.add(6, other, **WANTED)
    for slot in (1, 2):
        device.fork(slot, 0, seed=slot, temperature=1.0, **WANTED)
    result = device.step({0: 11, 1: 0, 2: 0, 6: 30})
    rows = reported(result)
    assert list(rows) == [0, 3] and len(result.tokens) == 4
    check(tiny("llama")[0], tokens, rows[0], 11, 4)
    check(tiny("llama")[0], other, rows[3], 1, 4)


def test_a_prefix_that_was_there_is_not_reported_on(device, tiny):
    tokens = prompt(50)
    held = device.add(0, tokens)
    device.step({0: 50})
    device.add(1, tokens, num_computed=32, blocks=held.blocks[:2], **WANTED)
    entries = reported(device.step({1: 18}))[0]
    assert len(entries) == 17
    check(tiny("llama")[0], tokens, entries, 33, 4)


def test_a_row_that_comes_back_reports_again(device, tiny):
    """After a preemption a slot starts from what it is told; with output, up to the prompt's end."""
    tokens = prompt(45)
    sequence = device.add(0, tokens, **WANTED)
    first = reported(device.step({0: 20}))[0]
    device.release(0)
    sequence = device.add(0, tokens, **WANTED)
    device.step({0: 45})
    device.decode([0], 4)
    device.release(0)
    again = device.add(0, sequence.tokens, num_prompt=45, **WANTED)
    entries = [e for n in (30, 15, 5) for e in reported(device.step({0: n})).get(0, [])]
    assert len(again.tokens) == len(sequence.tokens) + 1 and len(entries) == 44
    check(tiny("llama")[0], tokens, entries, 1, 4)
    check(tiny("llama")[0], tokens, first, 1, 4)


def test_another_row_in_a_slot_asks_for_itself(device):
    device.add(0, prompt(45), **WANTED)
    device.step({0: 20})
    device.release(0)
    device.add(0, prompt(45))
    assert not device.step({0: 20}).prompt_rows


@pytest.mark.parametrize("length", [1, 2])
def test_short_prompts(device, tiny, length):
    """The first token follows nothing, so a prompt of one has nothing to report."""
    tokens = prompt(length)
    device.add(0, tokens, **WANTED)
    result = device.step({0: length})
    assert len(result.tokens) == 1 and list(result.num_prompt_logprobs) == [1] * (length - 1)
    if length == 2:
        check(tiny("llama")[0], tokens, reported(result)[0], 1, 4)


def test_more_alternatives_than_the_vocabulary_has(device):
    device.add(0, prompt(5), num_prompt_logprobs=1000)
    (entries,) = reported(device.step({0: 5})).values()
    assert all(sorted(ids) == list(range(200)) for _, _, ids, _ in entries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_depend_on_tokens_alone(tiny, dtype):
    """Neither the cut of a prompt nor its neighbours change a bit of them on the CPU."""
    tokens, results = prompt(45), []
    for cuts, neighbour in (((45,), False), ((7, 30, 8), True)):
        device = Device(tiny("llama")[1], dtype=dtype)
        device.add(1, tokens, **WANTED)
        if neighbour:
            device.add(3, prompt(70, 1), **WANTED)
        entries = []
        for cut in cuts:
            rows = reported(device.step({**({3: 20} if neighbour else {}), 1: cut}))
            entries += rows[int(neighbour)]
        results.append(entries)
    assert results[0] == results[1]
