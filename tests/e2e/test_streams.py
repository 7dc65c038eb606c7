"""Many HTTP streams, some of whose clients hardly read: none is lost, none waits for the slow ones."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from tests.support import figures
from tests.support.cluster import Cluster, cluster
from tests.support.cluster_sched import wait_until
from tests.support.data import prompts, tokenizer
from tests.support.raw_http import Answer, RawRequest, post
from tests.support.runs import allowed
from tests.support.scale import scaled

pytestmark = pytest.mark.timeout(scaled(600, 3600))

NUM_STREAMS = scaled(40, 200)
NUM_SLOW = NUM_STREAMS // 10
NUM_PROMPTS = scaled(6, 25)
TOKENS = scaled(16, 64)
# Four samples with logprobs: 6 KB for each step, so that the stream is bigger than all buffers on its way.
SLOW_TOKENS, SLOW_SAMPLES, SLOW_LOGPROBS = scaled(100, 300), 4, 20

LOAD_S = scaled(20, 600)
LOAD_STREAMS = 32
MINUTE_S = LOAD_S / 10
MOST_GROWTH = 0.05


def texts(count: int) -> list[str]:
    """Short real prompts, different from each other."""
    short = [prompt.ids for prompt in prompts() if len(prompt.ids) < 120]
    assert len(short) >= count
    return [str(tokenizer().decode(ids, skip_special_tokens=True)) for ids in short[:count]]


def greedy(prompt: str, **options: Any) -> dict[str, Any]:
    """The body of a request that takes exactly TOKENS tokens unless `options` say otherwise."""
    fixed = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"prompt": prompt, **fixed, **options}


def stream(prompt: str, **options: Any) -> dict[str, Any]:
    """The same, streamed, with the usage at its end."""
    return greedy(prompt, stream=True, stream_options={"include_usage": True}, **options)


def check_complete(answer: Answer, num_tokens: int, num_samples: int = 1) -> None:
    """Assert that a stream came to its end and that what it said of itself is true."""
    assert (answer.status, answer.error, answer.done) == (200, None, True)
    assert answer.finish == dict.fromkeys(range(num_samples), "length")
    assert [len(answer.token_ids[i]) for i in range(num_samples)] == [num_tokens] * num_samples
    assert answer.usage is not None and answer.usage["completion_tokens"] == num_tokens * num_samples


async def ask(url: str, body: dict[str, Any]) -> Answer:
    """Send one request and read its response as fast as it comes."""
    async with post(url, body) as request:
        return await request.rest()


async def drip(request: RawRequest) -> None:
    """Read one byte a second, until cancelled."""
    while await request.read(1):  # noqa: ASYNC110 - the pause is the point
        await asyncio.sleep(1)


async def among_slow_readers(running: Cluster) -> tuple[list[Answer], list[Answer], list[int]]:
    """The answers of fast and slow ones, and how much the slow ones had read when all was computed."""
    asked = texts(NUM_PROMPTS)
    bodies = [stream(asked[i % NUM_PROMPTS]) for i in range(NUM_STREAMS - NUM_SLOW)]
    async with contextlib.AsyncExitStack() as stack:
        slow = []
        for i in range(NUM_SLOW):
            options = {"max_tokens": SLOW_TOKENS, "n": SLOW_SAMPLES, "logprobs": SLOW_LOGPROBS}
            body = stream(asked[i % NUM_PROMPTS], **options)
            slow.append(await stack.enter_async_context(post(running.url, body, small=True)))
        drips = [asyncio.create_task(drip(request)) for request in slow]
        fast = await asyncio.gather(*(ask(running.url, body) for body in bodies))
        # What the slow ones asked for is computed too, and their slots free, long before they have read it.
        await asyncio.to_thread(
            wait_until, lambda: not running.snapshot().num_running, 600, "all is computed"
        )
        had_read = [len(request.received) for request in slow]
        for task in drips:
            task.cancel()
        await asyncio.gather(*drips, return_exceptions=True)
        return list(fast), await asyncio.gather(*(request.rest() for request in slow)), had_read


def test_slow_readers_block_nobody_and_no_stream_is_lost() -> None:
    with cluster(
        # One token a message, so that a reader who keeps up gets about one event a token.
        scheduler_args=("--horizon-ms", "0"),
        worker_args=("--max-slots", str(NUM_STREAMS + NUM_SLOW * SLOW_SAMPLES)),
        gateway_args=(),
    ) as running:
        alone = [asyncio.run(ask(running.url, greedy(text))) for text in texts(NUM_PROMPTS)]
        fast, slow, had_read = asyncio.run(among_slow_readers(running))
    for answer in fast:
        check_complete(answer, TOKENS)
    for answer, read in zip(slow, had_read, strict=True):
        check_complete(answer, SLOW_TOKENS, SLOW_SAMPLES)
        assert read < sum(map(len, answer.text.values())), "a slow reader was not slow"
        pieces = SLOW_TOKENS * SLOW_SAMPLES
        assert answer.num_events < 0.8 * pieces, "what waits for a slow reader leaves in bigger pieces"
    # Batches of other sizes may round differently, so a near tie may fall the other way.
    differ = sum(
        answer.text[0] != alone[i % NUM_PROMPTS].text[0]
        or answer.token_ids[0] != alone[i % NUM_PROMPTS].token_ids[0]
        for i, answer in enumerate(fast)
    )
    assert differ <= allowed(len(fast))
    figures.record(
        "streams",
        streams=NUM_STREAMS,
        slow=NUM_SLOW,
        lost=0,
        texts_unlike_undisturbed=differ,
        slow_bytes_read_when_all_was_computed=max(had_read),
        slow_events=[answer.num_events for answer in slow],
        slow_tokens=SLOW_TOKENS * SLOW_SAMPLES,
    )


# --------------------------------------------------------------------------------------------- memory


@dataclass
class Resident:
    """The memory of the services' processes, looked at every second.

    "rss" is all that is resident, "anon" what the process itself has filled: only of that the kernel takes
    nothing away when others want memory, so that a leak cannot hide behind a page cache that shrinks.
    """

    processes: dict[str, psutil.Process]
    samples: dict[tuple[str, str], list[tuple[float, int]]] = field(default_factory=dict)

    async def watch(self, begin: float) -> None:
        """Look, until cancelled."""
        while True:
            for name, process in self.processes.items():
                memory = process.memory_info()
                at = time.monotonic() - begin
                self.samples.setdefault((name, "rss"), []).append((at, memory.rss))
                self.samples.setdefault((name, "anon"), []).append((at, memory.rss - memory.shared))
            await asyncio.sleep(min(1.0, MINUTE_S / 10))

    def around(self, name: str, kind: str, at_s: float) -> float:
        """The median over the half minute that ends then, in MB."""
        last = [size for at, size in self.samples[name, kind] if at_s - MINUTE_S / 2 <= at <= at_s]
        return statistics.median(last) / 1e6

    def growth(self, name: str, kind: str) -> float:
        """To the last minute's end from the lowest since the first one's, as a share.

        What was needed to start is given back at some time, which must not hide a growth after that.
        """
        lowest = min(size for at, size in self.samples[name, kind] if at >= MINUTE_S) / 1e6
        return self.around(name, kind, LOAD_S) / min(lowest, self.around(name, kind, MINUTE_S)) - 1

    def figures(self) -> dict[str, Any]:
        """In MB at both ends, and the growth."""
        return {
            f"{name}_{kind}": {
                "mb": [round(self.around(name, kind, at), 1) for at in (MINUTE_S, LOAD_S)],
                "growth": round(self.growth(name, kind), 4),
            }
            for name, kind in self.samples
        }


async def load(running: Cluster, resident: Resident) -> Counter[str]:
    """Streams without a break for LOAD_S; how they ended."""
    begin = time.monotonic()
    ends: Counter[str] = Counter()
    asked = texts(NUM_PROMPTS)

    async def client(number: int) -> None:
        turn = 0
        while time.monotonic() - begin < LOAD_S:
            # A prefix of its own, so that the prefix cache changes all the time; lengths differ too.
            prompt = f"{number}.{turn}: {asked[turn % NUM_PROMPTS]}"
            tokens = 4 + turn % 13
            check_complete(await ask(running.url, stream(prompt, max_tokens=tokens)), tokens)
            ends["complete"] += 1
            turn += 1

    watcher = asyncio.create_task(resident.watch(begin))
    await asyncio.gather(*(client(i) for i in range(LOAD_STREAMS)))
    watcher.cancel()
    return ends


def test_memory_does_not_grow_under_load() -> None:
    # Few blocks, so that within the first minute every one of them has been written once.
    with cluster(dtype="bfloat16", worker_args=("--num-blocks", "600"), gateway_args=()) as running:
        assert running.gateway is not None
        pids = {
            "gateway": running.gateway.popen.pid,
            "scheduler": running.scheduler.popen.pid,
            "worker": running.workers["w0"].popen.pid,
        }
        resident = Resident({name: psutil.Process(pid) for name, pid in pids.items()})
        ends = asyncio.run(load(running, resident))
    figures.record("streams", load_s=LOAD_S, streams=ends["complete"], **resident.figures())
    # Within seconds of their start processes still grow: only the full form can tell what they do then.
    assert all(resident.growth(*seen) < MOST_GROWTH for seen in scaled((), tuple(resident.samples)))
