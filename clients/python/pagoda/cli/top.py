"""`pagoda top`: what the scheduler is doing, live."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pagoda.calls import metadata_for, open_channel
from pagoda.errors import from_grpc
from pagoda.v1 import scheduler_pb2 as spb
from pagoda.v1 import scheduler_pb2_grpc

MAX_REQUESTS = 40
_STATES = {
    spb.REQUEST_STATE_WAITING: "waiting",
    spb.REQUEST_STATE_PREFILL: "prefill",
    spb.REQUEST_STATE_DECODE: "decode",
    spb.REQUEST_STATE_PREEMPTED: "preempted",
    spb.REQUEST_STATE_SWAPPED: "swapped",
}


def run(target: str, token: str | None, interval_s: float, once: bool) -> None:
    """Show snapshots until interrupted. Raises PagodaError when the scheduler cannot be asked."""
    console = Console()
    with open_channel(target) as channel:
        snapshots = _watch(channel, token, interval_s)
        before = next(snapshots)
        if once:
            console.print(render(before, None))
            return
        with Live(render(before, None), console=console, screen=console.is_terminal) as live:
            for now in snapshots:
                live.update(render(now, before))
                before = now


def _watch(channel: grpc.Channel, token: str | None, interval_s: float) -> Iterator[spb.Snapshot]:
    options = spb.SnapshotRequest(include_requests=True, max_requests=MAX_REQUESTS)
    request = spb.WatchRequest(options=options, interval_ms=round(interval_s * 1000))
    stub: Any = scheduler_pb2_grpc.ControlServiceStub(channel)  # type: ignore[no-untyped-call]
    try:
        for response in stub.Watch(request, metadata=metadata_for(token)):
            yield response.snapshot
    except grpc.RpcError as failure:
        raise from_grpc(failure) from failure


def render(now: spb.Snapshot, before: spb.Snapshot | None) -> Group:
    """One screen: totals, workers, requests. Rates are over the time since `before`."""
    return Group(_totals(now, before), _workers(now), _requests(now))


def _totals(now: spb.Snapshot, before: spb.Snapshot | None) -> Text:
    rates = ""
    if before is not None and now.unix_us > before.unix_us:
        seconds = (now.unix_us - before.unix_us) / 1e6
        out = (now.generation_tokens - before.generation_tokens) / seconds
        prompt = (now.prompt_tokens - before.prompt_tokens) / seconds
        rates = f"   {out:,.1f} tokens/s out, {prompt:,.1f} in"
    name = now.model.name or "no model yet"
    return Text(
        f"{name}   waiting {now.num_waiting}   running {now.num_running}   gateways {now.num_sessions}   "
        f"preemptions {now.num_preemptions}   swapped {now.swapped_tokens:,}   "
        f"recomputed {now.recomputed_tokens:,}{rates}"
    )


def _table(title: str, *headings: str) -> Table:
    """A table. A heading with > before it is of numbers; one with ... after it yields in a narrow window."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for heading in headings:
        name = heading.strip(">.")
        yields = heading.endswith("...")
        table.add_column(name, justify="right" if heading[0] == ">" else "left", no_wrap=not yields)
    return table


def _workers(now: spb.Snapshot) -> Table:
    blocks = (">blocks", ">cached", ">free", ">shared", ">saved", ">ahead", ">waste", ">host")
    table = _table("workers", "worker", ">slots", *blocks, ">m", ">step ms", "device...")
    for worker in now.workers:
        used = worker.num_blocks - worker.num_free_blocks - worker.num_cached_blocks
        table.add_row(
            worker.name,
            f"{worker.num_slots_used}/{worker.max_slots}",
            f"{used}/{worker.num_blocks}",
            str(worker.num_cached_blocks),
            str(worker.num_free_blocks),
            str(worker.num_shared_blocks),
            f"{worker.kv_sharing_ratio:.1%}",
            str(worker.num_lookahead_blocks),
            f"{worker.kv_waste_ratio:.1%}",
            f"{worker.num_host_blocks_used}/{worker.num_host_blocks}",
            str(worker.horizon),
            f"{worker.step_us / 1000:.2f}",
            f"{worker.num_ranks} x {worker.device}" if worker.num_ranks > 1 else worker.device,
        )
    return table


def _requests(now: spb.Snapshot) -> Table:
    counts = (">age s", ">prompt", ">cached", ">output")
    title = f"requests (the oldest {MAX_REQUESTS})"
    table = _table(title, "request...", "state", "worker", *counts, "why not running...")
    for request in now.requests:
        table.add_row(
            Text(request.request_id),  # a caller's text, never markup
            _STATES.get(request.state, "?"),
            request.worker,
            f"{request.age_us / 1e6:.1f}",
            str(request.prompt_tokens),
            str(request.cached_tokens),
            "+".join(str(sample.output_tokens) for sample in request.samples) or "0",
            Text(request.why_not_running),
        )
    return table
