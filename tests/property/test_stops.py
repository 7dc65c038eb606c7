"""Stop strings: the streamed text equals a search of the whole text, however it is cut, and nothing leaks."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_svc.text.stops import StopMatcher

# Few letters, so that partial matches, overlaps and self-overlaps happen all the time.
LETTERS = st.text(alphabet="ab\n。", max_size=40)
STOPS = st.lists(st.text(alphabet="ab\n。", min_size=1, max_size=6), min_size=1, max_size=4)


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Search of the whole text: the match that ends first; among those that end together, the longest."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return (text[:end] if include else text[: end - len(stop)]), stop


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(p % (len(text) + 1) for p in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@settings(max_examples=1500, deadline=None)
@given(LETTERS, STOPS, st.booleans(), st.lists(st.integers(0, 100), max_size=12))
def test_equals_a_search_of_the_whole_text(
    text: str, stops: list[str], include: bool, places: list[int]
) -> None:
    expected, stop = reference(text, stops, include)
    matcher = StopMatcher(stops, include)
    shown = ""
    for piece in cut(text, places):
        shown += matcher.feed(piece)
        assert expected.startswith(shown), "text was shown that the stop string takes away"
    shown += matcher.flush()
    assert (shown, matcher.matched) == (expected, stop)


@settings(max_examples=500, deadline=None)
@given(LETTERS, STOPS)
def test_holds_back_no_more_than_it_must(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = matcher.feed(text)
    if matcher.matched is None:
        held = text[len(shown) :]
        longest = max((n for s in stops for n in range(len(s)) if text.endswith(s[:n])), default=0)
        assert len(held) == longest


def test_nothing_follows_a_match() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("one EN") == "one "
    assert matcher.feed("D two") == ""
    assert matcher.feed("three") == "" and matcher.flush() == ""
    assert matcher.matched == "END"


def test_a_partial_match_that_comes_to_nothing_is_shown() -> None:
    matcher = StopMatcher(["\n\nUser:", "###"])
    assert [matcher.feed(piece) for piece in ("a\n", "\nUs", "e", "d ##")] == ["a", "", "", "\n\nUsed "]
    assert matcher.flush() == "##"


def test_a_stop_inside_a_longer_one_ends_first() -> None:
    matcher = StopMatcher(["abc", "b"], include=True)
    assert matcher.feed("xabc") == "xab"
    assert matcher.matched == "b"
