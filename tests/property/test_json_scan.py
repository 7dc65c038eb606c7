"""The JSON scanner against Python's: it takes what json.loads takes, wherever the text is cut."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway_svc.text.tools.json_scan import JsonScanner

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=20,
)
# Mostly JSON's own characters, so that much of what is drawn is nearly JSON.
NEARLY = st.text(alphabet='{}[],:"\\ \n\t0123456789.-+eEtruefalsn/bu\x01é', max_size=24)

END = "\0"  # what no JSON has, anywhere
CUTS = st.lists(st.integers(0, 10_000), max_size=6)


def scan(text: str, cuts: Sequence[int]) -> tuple[JsonScanner, int]:
    """Feed the text in pieces; the scanner and where it stopped."""
    scanner, stopped = JsonScanner(), 0
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for begin, end in itertools.pairwise(edges):
        stopped = begin + scanner.feed(text[begin:end])
        if scanner.ended or scanner.failed:
            break
    return scanner, stopped


def python_takes(text: str) -> bool:
    def refuse(word: str) -> Any:
        raise ValueError(word)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


@given(JSON, st.booleans(), st.sampled_from([None, 1]), CUTS, st.text())
def test_a_value_ends_where_it_ends(
    value: Any, ascii_only: bool, indent: int | None, cuts: list[int], rest: str
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    scanner, stopped = scan(text + END + rest, cuts)
    assert scanner.ended and stopped == len(text)


@given(NEARLY, CUTS)
def test_what_is_taken_is_json(text: str, cuts: list[int]) -> None:
    whole, at = scan(text + END, [])
    cut, cut_at = scan(text + END, cuts)
    assert (whole.ended, whole.failed, at) == (cut.ended, cut.failed, cut_at)
    assert whole.ended or whole.failed or not python_takes(text)
    if whole.ended:
        assert python_takes(text[:at])
    assert (whole.ended and not text[at:].strip(" \t\n\r")) == python_takes(text)
