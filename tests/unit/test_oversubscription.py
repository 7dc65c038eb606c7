"""The loads of benchmarks/oversubscription.py, what they need, and what is said of the figures."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.oversubscription import blocks_of, mixes, need, table, verdicts


def test_what_requests_need() -> None:
    assert [blocks_of(10, 6), blocks_of(10, 7), blocks_of(10, 8)] == [1, 1, 2], (
        "the last token is not computed"
    )
    ends_early, ends_late = ([1] * 30, 4), ([1] * 10, 60)
    assert need([ends_early]) == 2
    assert need([ends_late]) == 5  # 66 of its 69 tokens when it is last looked at, every fourth
    assert need([ends_early, ends_late]) == 5, "never the most of both at once"
    assert need([ends_late] * 3) == 15


@pytest.mark.parametrize(("scale", "blocks", "slots"), [(1.0, 3072, 512), (0.1, 32, 32)])
def test_mixes_need_twice_the_cache(scale: float, blocks: int, slots: int) -> None:
    loads = mixes(scale, 2 * blocks, 2 * slots)
    assert list(loads) == ["short", "long", "mixed"]
    for requests in loads.values():
        largest = max(blocks_of(len(prompt), answer_len) for prompt, answer_len in requests)
        assert 2 * blocks <= need(requests) <= 2 * blocks + largest
        assert largest < blocks / 2, "several run at a time"


def row(way: str, rate: float, number: int) -> dict[str, Any]:
    counts = {"num_preemptions": 3, "swapped_tokens": 4, "recomputed_tokens": 5}
    return {"round": number, "mix": "short", "way": way, "tokens_per_s": rate, **counts}


def test_verdicts_compare_within_a_round() -> None:
    rates = {
        "auto": (95.0, 190.0, 96.0), "swap": (97.0, 194.0, 97.0), "recompute": (60.0, 120.0, 60.0),
        "oracle": (100.0, 200.0, 100.0),
    }  # fmt: skip
    rows = [row(way, rate, i) for way, all_of in rates.items() for i, rate in enumerate(all_of)]
    (found,) = verdicts(rows)
    assert found["rates"]["auto"] == (96.0, 95.0, 190.0)
    assert found["of_oracle"] == pytest.approx((0.95, 0.95, 0.96))
    assert found["better"] == "swap" and found["reached"]
    assert "auto is 0.950 of the oracle [0.950, 0.960], bar 0.9" in table([found], rows)
    slow = [r | {"tokens_per_s": r["tokens_per_s"] * 0.9} if r["way"] == "auto" else r for r in rows]
    assert not verdicts(slow)[0]["reached"]
