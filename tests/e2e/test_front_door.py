"""The benchmark of the front door in small: every token comes, and slow clients get fewer, bigger chunks.

`python -m benchmarks.front_door` measures; nothing here looks at a clock.
"""

from __future__ import annotations

import pytest

from benchmarks.front_door import Phase, measure


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_clients_that_keep_up_lose_no_token(path: str) -> None:
    figures = measure(Phase("keep-up", streams=12, tokens=60, iteration_ms=4.0), path)
    assert figures["lost"] == 0 and figures["chunks_per_s"] > 0


def test_what_slow_clients_leave_is_gathered_and_none_of_it_lost() -> None:
    # One chunk a token would take each client 150 KB and 30 s; there is less than a second of tokens.
    figures = measure(Phase("slow", streams=8, tokens=600, iteration_ms=1.0, pause_ms=800.0))
    assert figures["lost"] == 0 and figures["tokens_per_chunk"] > 2
