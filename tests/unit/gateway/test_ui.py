"""What /ui serves: files, their headers, and how a state is written."""

from __future__ import annotations

import json

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_svc.ui.live import INTERVAL_MS, INTERVAL_OF_MANY_MS, MANY_BLOCKS, interval_for
from gateway_svc.ui.state import CACHED, cells, ranges, state_of
from pagoda.v1 import scheduler_pb2 as pb
from tests.unit.gateway.conftest import Running
from tests.unit.gateway.fake_scheduler import FakeScheduler


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/ui", "text/html"), ("/ui/main.js", "text/javascript"), ("/ui/style.css", "text/css")],
)
async def test_files_come_with_a_policy(http: httpx.AsyncClient, path: str, kind: str) -> None:
    reply = await http.get(path)
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith(kind)
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; ")
    assert "unsafe" not in policy and "http" not in policy and "frame-ancestors 'none'" in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "://" not in reply.text.replace("http://www.w3.org", "")


async def test_other_files_are_not_there(http: httpx.AsyncClient) -> None:
    for name in ("routes.py", "nothing.js", "%2e%2e%2froutes.py"):
        reply = await http.get(f"/ui/{name}")
        assert (reply.status_code, reply.headers["content-type"]) == (404, "application/json")
    reply = await http.get("/ui/")
    assert (reply.status_code, reply.headers["location"]) == (307, str(http.base_url.join("/ui")))


async def test_the_page_is_open_and_the_state_is_not(start: Running, fake: FakeScheduler) -> None:
    server = await start(token="secret")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http.port}", timeout=30) as client:
        assert (await client.get("/ui")).status_code == 200
        assert (await client.get("/ui/api.js")).status_code == 200
        for path in ("/ui/state", "/ui/nothing.js"):
            assert (await client.get(path)).status_code == 401


async def test_a_scheduler_that_cannot_be_watched_is_said_in_words(http: httpx.AsyncClient) -> None:
    """The fake one has no ControlService."""
    async with http.stream("GET", "/ui/state") as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        line = await anext(reply.aiter_lines())
    event = json.loads(line.removeprefix("data: "))
    assert "cannot be watched (UNIMPLEMENTED" in event["error"]


def test_a_large_cache_is_asked_for_less_often() -> None:
    half = pb.WorkerSnapshot(num_blocks=MANY_BLOCKS // 2)
    one = pb.WorkerSnapshot(num_blocks=1)
    assert interval_for(pb.Snapshot()) == INTERVAL_MS
    assert interval_for(pb.Snapshot(workers=[half, half])) == INTERVAL_MS
    assert interval_for(pb.Snapshot(workers=[half, half, one])) == INTERVAL_OF_MANY_MS


def test_a_worker_says_how_many_ranks_it_has() -> None:
    workers = [pb.WorkerSnapshot(name="w0", device="cpu", num_ranks=n) for n in (1, 2)]
    shown = state_of(pb.Snapshot(workers=workers)).workers
    assert [(worker.ranks, worker.device) for worker in shown] == [(1, "cpu"), (2, "cpu")]


def test_a_request_in_any_state_is_shown() -> None:
    states = [state for state in pb.RequestState.values() if state != pb.REQUEST_STATE_UNSPECIFIED]
    shown = state_of(pb.Snapshot(requests=[pb.RequestSnapshot(state=state) for state in states])).requests
    assert [request.state for request in shown] == ["waiting", "prefill", "decode", "preempted", "swapped"]


@given(st.lists(st.integers(0, 3)), st.data())
def test_cells_say_what_the_columns_say(ref_counts: list[int], data: st.DataObject) -> None:
    ids = list(range(len(ref_counts)))
    cached = data.draw(st.lists(st.sampled_from(ids), unique=True)) if ids else []
    runs = cells(ref_counts, cached)
    unrolled = [v for v, n in zip(runs[::2], runs[1::2], strict=True) for _ in range(n)]
    assert unrolled == [CACHED if not c and b in cached else c for b, c in enumerate(ref_counts)]
    assert all(a != b for a, b in zip(runs[::2], runs[2::2], strict=False))


@given(st.lists(st.integers(0, 50)))
def test_ranges_name_each_block_once(blocks: list[int]) -> None:
    runs = ranges(blocks)
    unrolled = [b for first, n in zip(runs[::2], runs[1::2], strict=True) for b in range(first, first + n)]
    assert unrolled == sorted(set(blocks))
