"""Beam searches on the device: one driven by hand finds what the book finds over transformers' model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_worker.staging import StepError
from pagoda.internal.v1 import worker_pb2
from tests.support.beam_reference import FIRST, beam_search
from tests.unit.worker.harness import VOCAB, Device, Sequence_, prompt, reference_logits

WIDTH, NUM_STEPS = 3, 20
SLOTS = (4, 1, 6)  # of the beams; the first one computes the prompt
DRAWN = {"temperature": 1.0, "seed": 5, "num_logprobs": 1}


class Search:
    """One search, driven by hand: the smallest scheduler that shares blocks and copies tails."""

    def __init__(self, device: Device, tokens: list[int], **sampling: object) -> None:
        self.device, self.sampling = device, sampling
        self.beams = [device.add(SLOTS[0], tokens, **sampling)]
        self.scores = [0.0]
        self.num_prompt = len(tokens)
        self.held = list(self.beams[0].blocks)  # every block that it ever had

    def ask(self, step: worker_pb2.Step, slots: list[int]) -> None:
        """Let the next step find candidates."""
        step.beam_rows.extend(slots.index(beam.slot) for beam in self.beams)
        step.beam_scores.extend(self.scores)
        step.beam_counts.append(len(self.beams))
        step.beam_widths.append(WIDTH)

    def go_on(self, result: worker_pb2.StepResult, first: int = 0) -> None:
        """Take the second half of the candidates for beams, moved by the next step."""
        places = range(first + WIDTH, first + 2 * WIDTH)
        children = [(result.beam_parents[i], result.beam_tokens[i], result.beam_scores[i]) for i in places]
        step, size = self.device.pending, self.device.limits.block_size
        before, free = self.beams, [s for s in SLOTS if all(b.slot != s for b in self.beams)]
        keepers = {parent: before[parent].slot for parent, *_ in children}
        free += [beam.slot for beam in before if beam.slot not in keepers.values()]
        self.beams, self.scores = [], []
        for parent, token, score in children:
            old = before[parent]
            slot = keepers.pop(parent, None)
            beam = Sequence_(
                free.pop() if slot is None else slot, [*old.tokens, token], [*old.blocks], len(old.tokens)
            )
            if beam.slot not in self.device.sequences:
                step.new_rows.add(
                    slot=beam.slot, tokens=[token], num_prompt_tokens=1, last_position=100,
                    sampling=worker_pb2.RowSampling(**self.sampling),
                )  # fmt: skip
            self.device.sequences[beam.slot] = beam
            step.beam_slots.append(beam.slot)
            step.beam_parent_slots.append(old.slot)
            step.beam_tokens.append(token)
            if slot is None and len(old.tokens) % size:
                own = self.device.free.pop()
                self.held.append(own)
                step.copy_src_blocks.append(beam.blocks[-1])
                step.copy_dst_blocks.append(own)
                step.replace_slots.append(beam.slot)
                step.replace_indexes.append(len(beam.blocks) - 1)
                step.replace_blocks.append(own)
                beam.blocks[-1] = own
            self.beams.append(beam)
            self.scores.append(score)
        for beam in self.beams:
            self.device.grow(beam, len(beam.tokens))


def launch(device: Device, chunks: dict[int, int], search: Search) -> worker_pb2.StepResult:
    """One step in which the search gets candidates; the other rows draw."""
    search.ask(device.pending, list(chunks))
    beams = {beam.slot for beam in search.beams}
    sampling, outputs = device.launch(chunks)
    for beam in search.beams:
        beam.num_computed = len(beam.tokens)
    return device.read([slot for slot in sampling if slot not in beams], outputs)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a row that draws"])
def test_a_search_finds_what_the_book_finds(tiny, device: Device, beside: bool) -> None:
    model, tokens = tiny("llama")[0], prompt(21)

    def tell(history: tuple[int, ...]) -> np.ndarray:
        return torch.log_softmax(reference_logits(model, history)[-1].double(), -1).numpy()

    drawn = device.generate(2, prompt(9), NUM_STEPS, **DRAWN)
    search = Search(device, tokens, num_logprobs=2)
    chunks = {SLOTS[0]: len(tokens)}
    if beside:
        device.add(2, prompt(9), **DRAWN)
        chunks = {2: 9, **chunks}
    for i in range(NUM_STEPS):
        result = launch(device, chunks, search)
        assert len(result.beam_scores) == 2 * WIDTH
        assert len(result.tokens) == beside and not result.num_sampled
        tops = list(zip(result.beam_logprobs.top_ids, result.beam_logprobs.top_logprobs, strict=True))
        assert list(result.beam_logprobs.num_top) == [2] * len(search.beams)
        for row, beam in enumerate(search.beams):
            want = tell(tuple(beam.tokens))
            best = np.sort(want)[::-1][:2]
            assert [value for _, value in tops[2 * row : 2 * row + 2]] == pytest.approx(list(best), abs=1e-4)
        found = beam_search(tell, tokens, width=WIDTH, n=WIDTH, max_tokens=i + 1, early_stopping=FIRST)
        search.go_on(result)
        assert [tuple(beam.tokens[21:]) for beam in search.beams] == [r.tokens for r in found]
        assert search.scores == pytest.approx([r.score * (i + 1) for r in found], abs=1e-3)
        if beside:
            device.grow(device.sequences[2], device.sequences[2].num_computed + 1)
        chunks = {slot: 1 for slot in (2,) * beside + SLOTS}
    if beside:
        assert device.sequences[2].tokens[9:] == drawn
    assert all(token < VOCAB for beam in search.beams for token in beam.tokens)


def test_stop_ids_are_left_out_of_the_second_half(tiny, device: Device) -> None:
    tokens = prompt(21)
    best = reference_logits(tiny("llama")[0], tokens)[-1].topk(5).indices.tolist()
    search = Search(device, tokens, stop_token_ids=best[:2])
    result = launch(device, {SLOTS[0]: len(tokens)}, search)
    assert list(result.beam_tokens) == [*best[:3], *best[2:5]]
    assert list(result.beam_parents) == [0] * 6


def test_a_search_that_contradicts_itself_is_refused(device: Device) -> None:
    def step(**changes: object) -> worker_pb2.Step:
        fields = {"epoch": 1, "num_iterations": 1, "slots": [0], "num_tokens": [4], "beam_rows": [0]}
        fields |= {"beam_scores": [0.0], "beam_counts": [1], "beam_widths": [2]}
        made = worker_pb2.Step(**{**fields, **changes})
        made.new_rows.add(slot=0, tokens=prompt(4), num_prompt_tokens=4, blocks=[0], last_position=60)
        return made

    for changes in (
        {"beam_rows": [1]},
        {"beam_scores": []},
        {"beam_counts": [2]},
        {"beam_widths": [2, 2]},
        {"num_tokens": [3]},
        {"beam_slots": [0], "beam_parent_slots": [0], "beam_tokens": [1]},
        {"beam_slots": [3], "beam_parent_slots": [0], "beam_tokens": [1]},
        {"beam_slots": [0], "beam_parent_slots": [0]},
    ):
        device.stager.clear()
        with pytest.raises(StepError):
            device.stager.stage(step(**changes))
