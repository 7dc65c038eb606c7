"""The plain beam search that the core is held against equals transformers' over the same model."""

from __future__ import annotations

import itertools

import pytest

from tests.support.beam_reference import FIRST, HEURISTIC, NEVER, beam_search
from tests.support.beam_transformers import Settings, over
from tests.support.model_device import STOP_ID, VOCAB, logprobs_after

STOPS = ((), (STOP_ID,), (STOP_ID, 3))


@pytest.mark.parametrize("early_stopping", [HEURISTIC, FIRST, NEVER])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_it_equals_transformers(length_penalty: float, early_stopping: int) -> None:
    for seed, (width, stops) in enumerate(itertools.product((2, 4, 8), STOPS)):
        prompt = [seed + 1, 2 * seed + 3, 5]
        settings = Settings(
            width, n=(width + 1) // 2, max_tokens=12, stops=stops, min_tokens=seed % 2,
            length_penalty=length_penalty, early_stopping=early_stopping,
        )  # fmt: skip
        want = over(logprobs_after, VOCAB, prompt, settings)
        got = beam_search(logprobs_after, prompt, **vars(settings))
        assert [r.tokens for r in got] == [r.tokens for r in want], settings
        assert [r.stopped for r in got] == [r.stopped for r in want]
        assert [r.score for r in got] == pytest.approx([r.score for r in want], abs=1e-4)
