"""Verdicts on beams: a candidate ends where its whole path's text has a stop string, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_svc.text.detokenize import Detokenizer
from gateway_svc.text.stops import StopMatcher
from gateway_svc.text.verdicts import StopVerdicts
from tests.unit.gateway.conftest import ids_of, model_tokenizer

# Few tokens, so that stop strings are met all the time; some are parts of characters.
TOKENS = sorted({*ids_of("ab ba aba\n\n"), *ids_of("👋🏽中"), 2})
STOPS = st.lists(st.text(alphabet="ab \n👋中", min_size=1, max_size=4), min_size=1, max_size=3)


def whole_text_has_a_stop(path: list[int], stops: list[str]) -> bool:
    """By the same search over the text as it is when all of it is there."""
    text = Detokenizer(model_tokenizer().visible).feed(path)
    return any(stop in text for stop in stops)


@settings(max_examples=300, deadline=None)
@given(STOPS, st.data())
def test_a_path_ends_where_its_text_has_a_stop_string(stops: list[str], data: Any) -> None:
    verdicts = StopVerdicts(model_tokenizer().visible, stops)
    paths: list[list[int]] = []
    alive: list[int] = []
    for step in range(data.draw(st.integers(1, 12), label="steps")):
        width = data.draw(st.integers(1, 5))
        tokens = data.draw(st.lists(st.sampled_from(TOKENS), min_size=width, max_size=width))
        if step == 0:
            parents = []
            paths = [[token] for token in tokens]
        else:
            parents = data.draw(st.lists(st.sampled_from(alive), min_size=width, max_size=width))
            paths = [[*paths[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        stopped = verdicts.judge(step, parents, tokens)
        expected = [i for i, path in enumerate(paths) if whole_text_has_a_stop(path, stops)]
        assert stopped == expected
        alive = [i for i in range(width) if i not in stopped]
        if not alive:
            break


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab。", max_size=12), st.text(alphabet="ab。", max_size=12), STOPS)
def test_a_fork_goes_its_own_way(common: str, rest: str, stops: list[str]) -> None:
    whole, matcher = StopMatcher(stops), StopMatcher(stops)
    whole.feed(common + rest)
    matcher.feed(common)
    forks = [matcher.fork() for _ in range(2)]
    shown = [fork.feed(rest) + fork.flush() for fork in forks]
    assert [fork.matched for fork in forks] == [whole.matched] * 2
    assert shown[0] == shown[1]
    again = StopMatcher(stops)
    again.feed(common)
    assert matcher.matched == again.matched, "what its forks were fed is nothing to it"
    assert matcher.feed(rest) + matcher.flush() == again.feed(rest) + again.flush() == shown[0]


def test_step_0_begins_anew() -> None:
    word, end = ids_of(" x")[0], ids_of(" end")[0]
    verdicts = StopVerdicts(model_tokenizer().visible, [" x end"])
    assert verdicts.judge(0, [], [word, end]) == []
    assert verdicts.judge(1, [0, 1], [end, end]) == [0]
    assert verdicts.judge(0, [], [end]) == [], "the path that there was is forgotten"
    assert verdicts.judge(1, [0], [end]) == []


@pytest.mark.parametrize(("step", "parents"), [(2, [0]), (1, [1]), (1, []), (1, [0, 0])])
def test_what_does_not_follow_is_a_fault(step: int, parents: list[int]) -> None:
    verdicts = StopVerdicts(model_tokenizer().visible, ["x"])
    verdicts.judge(0, [], [5])
    with pytest.raises(ValueError, match=f"at step {step}"):
        verdicts.judge(step, parents, [5])
