"""Candidates of beam searches: the kernel's torch against loops over rows, with every edit of logprobs."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.beams import Searches, candidates
from kernels.rows import RowState, fork, go_on
from kernels.sample import Features

PLACES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
VOCAB, PADDED, SLOTS = 37, 48, 12
SEARCHES = [Searches(2, 1, 3), Searches(2, 2, 2), Searches(1, 4, 4)]
NUM_ROWS = sum(s.number * s.num_beams for s in SEARCHES)


def random_state(place: str, generator: torch.Generator) -> RowState:
    state = RowState.allocate(SLOTS, 40, 4, 8, 8, torch.device(place))

    def numbers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).to(place)

    state.tokens.copy_(numbers(0, VOCAB, SLOTS + 1, 40))
    state.num_prompt.copy_(numbers(1, 5, SLOTS + 1))
    state.num_tokens.copy_(state.num_prompt + numbers(0, 6, SLOTS + 1))
    columns = state.columns
    columns.stop_ids[:, :3] = numbers(-1, VOCAB, SLOTS + 1, 3).to(torch.int32)
    columns.bias_ids[:, :2] = numbers(-1, VOCAB, SLOTS + 1, 2).to(torch.int32)
    columns.bias_values[:, :2] = torch.randn(SLOTS + 1, 2, generator=generator).to(place)
    columns.min_tokens.copy_(numbers(0, 4, SLOTS + 1))
    for column in (columns.presence, columns.frequency):
        column.copy_(torch.rand(SLOTS + 1, generator=generator))
    columns.repetition.copy_(1 + torch.rand(SLOTS + 1, generator=generator))
    return state


def by_hand(logits: torch.Tensor, slot: int, score: float, state: RowState) -> list[float]:
    """The scores that a beam would have with each token, by plain arithmetic."""
    columns = state.columns
    logprobs = torch.log_softmax(logits[:VOCAB].double(), -1).tolist()
    num_tokens, num_prompt = int(state.num_tokens[slot]), int(state.num_prompt[slot])
    history = state.tokens[slot, :num_tokens].tolist()
    for token, value in zip(columns.bias_ids[slot].tolist(), columns.bias_values[slot].tolist(), strict=True):
        if token >= 0:
            logprobs[token] += value
    for token in set(history):
        value, repetition = logprobs[token], float(columns.repetition[slot])
        value = value / repetition if value > 0 else value * repetition
        if count := history[num_prompt:].count(token):
            value -= float(columns.frequency[slot]) * count + float(columns.presence[slot])
        logprobs[token] = value
    if num_tokens - num_prompt < columns.min_tokens[slot]:
        for token in columns.stop_ids[slot].tolist():
            if token >= 0:
                logprobs[token] = -math.inf
    return [score + value for value in logprobs]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_are_the_best_of_each_search(place: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    features = Features(any_penalty=True, any_bias=True, any_min_tokens=True, max_logprobs=4)
    for _ in range(20):
        state = random_state(place, generator)
        logits = (3 * torch.randn(NUM_ROWS, PADDED, generator=generator)).to(place, dtype)
        slots = torch.randperm(SLOTS, generator=generator)[:NUM_ROWS].to(place)
        scores = -10 * torch.rand(NUM_ROWS, generator=generator).to(place)
        found, tops = candidates(logits, slots, scores, state, VOCAB, features, 3, SEARCHES)
        parents, tokens, bits = found
        got = list(zip(parents.tolist(), tokens.tolist(), bits.view(torch.float32).tolist(), strict=True))
        assert tops is not None
        row = 0
        for search in SEARCHES:
            for _ in range(search.number):
                each = []
                for beam in range(search.num_beams):
                    slot = int(slots[row + beam])
                    values = by_hand(logits[row + beam], slot, float(scores[row + beam]), state)
                    stops = state.columns.stop_ids[slot].tolist()
                    each += [(beam, token, value, token in stops) for token, value in enumerate(values)]
                    raw = torch.log_softmax(logits[row + beam, :VOCAB].float(), -1)
                    assert torch.equal(raw[tops[0][row + beam].long()], raw.topk(4).values)
                    torch.testing.assert_close(tops[1][row + beam], raw.topk(4).values)
                row += search.num_beams
                each.sort(key=lambda entry: -entry[2])
                for want in (each, [entry for entry in each if not entry[3]]):
                    here, got = got[: search.width], got[search.width :]
                    worth = {(beam, token): value for beam, token, value, _ in want}
                    assert len({entry[:2] for entry in here}) == search.width
                    for (beam, token, value), (_, _, wanted, _) in zip(here, want, strict=False):
                        assert value == pytest.approx(wanted, abs=1e-4)  # ties may stand either way
                        assert value == pytest.approx(worth[beam, token], abs=1e-4)
        assert not got


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_told_by_the_first_candidate(place: str, bad: float) -> None:
    state = random_state(place, torch.Generator().manual_seed(1))
    logits = torch.zeros(4, PADDED, device=place)
    logits[2, 5] = bad
    slots, scores = torch.arange(4, device=place), torch.zeros(4, device=place)
    found, tops = candidates(logits, slots, scores, state, VOCAB, Features(), 3, [Searches(1, 4, 4)])
    values = found[2].view(torch.float32)
    assert values[0].isnan() and values[4].isnan() and tops is None


@pytest.mark.parametrize("place", PLACES)
def test_beams_go_on_from_each_other(place: str) -> None:
    state = random_state(place, torch.Generator().manual_seed(2))
    state.block_tables.copy_(torch.arange(state.block_tables.numel()).view(state.block_tables.shape))
    before = {
        name: getattr(state, name).clone() for name in ("tokens", "block_tables", "num_tokens", "num_prompt")
    }
    last_position = state.last_position.clone()
    slots, parents = torch.tensor([2, 5, 7], device=place), torch.tensor([5, 2, 5], device=place)
    fork(state, slots, parents)
    go_on(
        state,
        torch.tensor([2, 5, 7, 9], device=place),
        torch.tensor([1, 2, 3, 4], dtype=torch.int32, device=place),
    )
    for slot, parent, token in ((2, 5, 1), (5, 2, 2), (7, 5, 3), (9, 9, 4)):
        length = int(before["num_tokens"][parent])
        assert (
            int(state.num_tokens[slot]) == length + 1
            and state.num_prompt[slot] == before["num_prompt"][parent]
        )
        assert state.tokens[slot, : length + 1].tolist() == [
            *before["tokens"][parent, :length].tolist(),
            token,
        ]
        assert torch.equal(state.block_tables[slot], before["block_tables"][parent])
    assert torch.equal(state.last_position, last_position)
