"""The long run: 20,000 mixed requests through Pagoda's services, and nothing leaks.

    python -m benchmarks.gpu_soak --out soak.json                  # the 0.5B shape on a GPU, random weights
    python -m benchmarks.gpu_soak --model FOLDER --device cpu --num-requests 300 --slots 32 --blocks 1500
    python -m benchmarks.gpu_soak --simulate --num-requests 2000   # no model: a simulated worker

Scheduler and worker are processes of their own, this one is four of their clients. Requests are those of
`gpu_soak_load.py`: every kind, a tenth of them cancelled at any moment, some refused, now and then a whole
session dropped, prefixes shared, and a cache so small that requests are preempted. They come in rounds; after
each one everything is waited for, and the books are checked at rest, as they are under load every few seconds
(`gpu_soak_checks.py`). The first round is the warm-up, with which memory is compared. Unless --load-format
says otherwise, weights are read where there is a --model, else drawn.

Exit status: 0 when all held, 1 when something did not, 2 when the run failed, 130 and 143 when it was told to
end by SIGINT or SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc.aio

from benchmarks.gpu_flags import add_service_flags, described, start, worker_command
from benchmarks.gpu_models import PRESETS, config_folder
from benchmarks.gpu_services import ServiceError, Services, reporting
from benchmarks.gpu_soak_book import Book
from benchmarks.gpu_soak_checks import Memory, book_problems, growth, growth_problems, idle_problems, look
from benchmarks.gpu_soak_client import Session, SessionEndedError
from benchmarks.gpu_soak_load import End, Mix
from pagoda.v1 import scheduler_pb2 as pb
from pagoda.v1 import scheduler_pb2_grpc as rpc

PACKAGES = ("torch", "triton", "grpcio", "protobuf", "numpy", "pydantic", "msgspec")
NUM_SESSIONS = 4
DROPS_A_ROUND = 2
SIMULATED_VOCAB, SIMULATED_STOP_IDS, MAX_STOP_IDS = 1000, 16, 1024
IDLE_LIMIT_S = 20.0
MOST_TOLD = 200  # violations
MOST_LISTED = 10_000  # requests of a snapshot: all that there can be


class StalledError(Exception):
    """Nothing came for too long; the message says how far the run got."""


class Soak:
    """One run: the load, its sessions, and what was found."""

    def __init__(self, options: argparse.Namespace, services: Services) -> None:
        self.options, self.services = options, services
        self.started = time.perf_counter()
        self.problems: list[str] = []
        self.idle: list[Memory] = []
        self.num_sent = self.num_checks = 0
        self.seconds = 0.0
        self._books: list[Book] = []
        self._sessions: list[Session] = []
        self._aborts: set[asyncio.Task[None]] = set()
        self._random = random.Random(options.seed)
        self._last: pb.Snapshot = pb.Snapshot()
        self._device_mib: float | None = None

    def say(self, text: str) -> None:
        """Print a line with the time since the start."""
        print(f"[{time.perf_counter() - self.started:6.1f} s] {text}", flush=True)

    async def run(self) -> None:
        """All rounds. Raises ServiceError, SessionEndedError, StalledError where the run cannot go on."""
        o = self.options
        async with grpc.aio.insecure_channel(self.services.address) as channel:
            self._control: Any = rpc.ControlServiceStub(channel)
            for _ in range(NUM_SESSIONS):
                await self._open()
            model = self._sessions[0].model
            self._mix = Mix(
                seed=o.seed,
                vocab_size=model.vocab_size,
                max_model_len=model.max_model_len,
                eos=tuple(model.eos_token_ids),
                max_stop_ids=SIMULATED_STOP_IDS if o.simulate else MAX_STOP_IDS,
                longest_prompt=o.longest_prompt,
                longest_answer=o.longest_answer,
                cycle=o.cycle,
            )
            self._epoch = (await self._snapshot()).workers[0].epoch
            for number, size in enumerate(_rounds(o.num_requests, o.warm_requests, o.rounds)):
                began = time.perf_counter()
                await self._round(size, DROPS_A_ROUND if number else 0)
                self.seconds += time.perf_counter() - began
                await self._at_rest()
            for session in self._sessions:
                session.check()
                await session.leave(politely=True)
        self.problems += growth_problems(self.idle)
        self.problems += self._not_met()

    async def _open(self) -> None:
        session = Session(self.services.address, f"soak-{len(self._books)}", self._abort)
        await session.open(self.options.ready_s)
        self._sessions.append(session)
        self._books.append(session.book)

    def _abort(self, request_id: str) -> None:
        async def abort() -> None:
            await self._control.Abort(pb.AbortRequest(request_id=request_id))

        task = asyncio.create_task(abort())
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def _snapshot(self) -> pb.Snapshot:
        request = pb.SnapshotRequest(include_requests=True, include_blocks=True, max_requests=MOST_LISTED)
        snapshot: pb.Snapshot = (await self._control.Snapshot(request, timeout=20)).snapshot
        self._last = snapshot
        return snapshot

    # ---------------------------------------------------------------------------------------- load

    def _open_now(self) -> int:
        return sum(len(session.book.open) for session in self._sessions)

    async def _round(self, size: int, drops: int) -> None:
        """Send so many requests, so many at a time, and wait for all of them."""
        watching = asyncio.create_task(self._watch())
        sending = asyncio.create_task(self._send(size, drops))
        try:
            await asyncio.wait([watching, sending], return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
            await sending
        finally:
            for task in (watching, sending):
                task.cancel()
            await asyncio.gather(watching, sending, return_exceptions=True)

    async def _send(self, size: int, drops: int) -> None:
        dropping = set(self._random.sample(range(size), min(drops, size)))
        for number in range(size):
            # Looked at again and again: an event for each end would cost more than it saves.
            while self._open_now() >= self.options.at_once:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            if number in dropping:
                session = self._sessions.pop(self._random.randrange(len(self._sessions)))
                await session.leave(politely=self._random.random() < 0.5)
                await self._open()
            self._random.choice(self._sessions).submit(self._mix.draw())
            self.num_sent += 1
            if number % 16 == 0:  # so that what was sent leaves, and what came is read
                await asyncio.sleep(0)
        while self._open_now():  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def _watch(self) -> None:
        """Look after the services and the sessions, tell how far it is, check the books under load."""
        moved, moved_at, told_at = -1, time.monotonic(), time.monotonic()
        while True:
            await asyncio.sleep(0.5)
            now = time.monotonic()
            self.services.check()
            for session in list(self._sessions):
                session.check()
            done = sum(book.num_tokens + book.ended.total() for book in self._books)
            if done != moved:
                moved, moved_at = done, now
            elif now - moved_at > self.options.stall_s:
                raise StalledError(
                    f"nothing came for {now - moved_at:.0f} s, {self._open_now()} requests open"
                )
            if now - told_at >= self.options.tell_s:
                told_at = now
                self._check(book_problems(await self._snapshot()), "under load")
                if self.options.device == "cuda" and not self.options.simulate:
                    memory = await asyncio.to_thread(self._look)
                    self._device_mib = memory.device
                self.say(self._progress())

    # -------------------------------------------------------------------------------------- checks

    async def _at_rest(self) -> None:
        """Everything has ended: the books must balance, and memory is looked at."""
        deadline = time.monotonic() + IDLE_LIMIT_S
        while problems := idle_problems(await self._snapshot(), self._epoch):
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.05)
        self._check(problems, "at rest")
        for session in self._sessions:
            session.book.settle()
        received = sum(book.num_tokens for book in self._books)
        if received > self._last.generation_tokens:
            self._check([f"{received} tokens came, {self._last.generation_tokens} were generated"], "at rest")
        await asyncio.sleep(self.options.settle_s)
        self.idle.append(await asyncio.to_thread(self._look))
        self._device_mib = self.idle[-1].device
        self.say(f"at rest, {'; '.join(problems) or 'the books balance'}. {self._progress()}")

    def _look(self) -> Memory:
        pids = {name: self.services.pid(name) for name in ("scheduler", "worker")}
        device = self.options.device == "cuda" and not self.options.simulate
        return look(self.num_sent, time.perf_counter() - self.started, pids, device)

    def _check(self, problems: list[str], when: str) -> None:
        self.num_checks += 1
        self.problems += [f"{when}, after {self.num_sent} requests: {problem}" for problem in problems]

    def _not_met(self) -> list[str]:
        """What the run was to show and had no occasion to."""
        if self.num_sent < 2000:  # too few to ask each kind of them
            return []
        ended = self.ended()
        wanted = [end.value for end in End if end is not End.NATURAL] + [
            "dropped with the session",
            "stop id",
        ]
        missing = [f"no request came to the end '{name}'" for name in wanted if not ended[name]]
        if not self._last.num_preemptions:
            missing.append("nothing was preempted: the cache is too large, lower --blocks")
        if not sum(book.num_cached for book in self._books):
            missing.append("no prompt found anything in the prefix cache")
        return missing

    def ended(self) -> Counter[str]:
        """How many requests ended how."""
        return sum((book.ended for book in self._books), Counter())

    def _progress(self) -> str:
        now, tokens = self._last, sum(book.num_tokens for book in self._books)
        worker = now.workers[0] if now.workers else pb.WorkerSnapshot()
        rate = tokens / max(1e-9, time.perf_counter() - self.started)
        device = "" if self._device_mib is None else f", device {self._device_mib:.0f} MiB"
        wrong = sum(book.num_problems for book in self._books) + len(self.problems)
        return (
            f"{self.num_sent} sent, {self.ended().total()} ended, {now.num_running} running, "
            f"{now.num_waiting} waiting, {tokens} tokens ({rate:.0f}/s), {now.num_preemptions} preemptions, "
            f"{worker.num_free_blocks} blocks free and {worker.num_cached_blocks} cached of "
            f"{worker.num_blocks}{device}, {wrong} violations"
        )

    def row(self) -> dict[str, Any]:
        """The result."""
        prompt = sum(book.num_prompt for book in self._books)
        tokens = sum(book.num_tokens for book in self._books)
        ended = self.ended()
        violations = self.problems + [problem for book in self._books for problem in book.problems]
        # A request that is sent twice ends twice, the second time by being refused.
        return {
            "workload": "soak",
            "requests": self.num_sent,
            "ended": dict(ended.most_common()),
            "seconds": round(self.seconds, 2),
            "output_tokens": tokens,
            "output_tok_s": round(tokens / self.seconds, 1) if self.seconds else 0.0,
            "prompt_tokens": prompt,
            "cached_share": round(sum(b.num_cached for b in self._books) / max(1, prompt), 4),
            "preemptions": self._last.num_preemptions,
            "sessions": len(self._books),
            "book_checks": self.num_checks,
            "memory": growth(self.idle),
            "num_violations": len(self.problems) + sum(book.num_problems for book in self._books),
            "violations": violations[:MOST_TOLD],
        }


def _rounds(total: int, warm: int, rounds: int) -> list[int]:
    """How many requests each round has; the first is the warm-up."""
    warm = min(warm, total // 2)
    rest = total - warm
    return [warm, *(rest // rounds + (i < rest % rounds) for i in range(rounds))]


def _start(options: argparse.Namespace, services: Services) -> None:
    """Scheduler and worker, the prefix cache on and the KV cache small."""
    o = options
    if o.simulate:
        command = ["-m", "tests.support.sim_worker", "--slots", str(o.slots), "--blocks", str(o.blocks)]
        command += ["--vocab", str(SIMULATED_VOCAB), "--iteration-ms", "2", "--lenient", *o.worker_args]
    else:
        command = worker_command(
            *(o, o.model or config_folder(o.preset, o.base), "--num-blocks", str(o.blocks)),
            load_format=o.load_format or ("auto" if o.model else "dummy"),
        )
    start(o, services, command)


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, default="qwen2.5-0.5b")
    # Rests come between rounds, before memory is looked at.
    add_service_flags(p, logs=Path("/tmp/pagoda-soak"), settle_s=3.0, load_format="")
    p.add_argument(
        "--blocks", type=int, default=4000, help="KV blocks: few enough that requests are preempted"
    )
    p.add_argument("--num-requests", type=int, default=20_000)
    p.add_argument(
        "--warm-requests", type=int, default=2000, help="of these, before memory is looked at first"
    )
    p.add_argument("--rounds", type=int, default=4, help="after the warm-up, each with a rest behind it")
    p.add_argument("--at-once", type=int, default=600, help="most requests that are open")
    p.add_argument("--longest-prompt", type=int, default=2000)
    p.add_argument("--longest-answer", type=int, default=512)
    p.add_argument(
        "--cycle", type=int, default=2000, help="requests from one surge of long answers to the next"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--stall-s", type=float, default=30, help="longest time without anything coming")
    p.add_argument("--tell-s", type=float, default=5, help="between lines of progress")
    p.add_argument("--simulate", action="store_true", help="a simulated worker instead of a model")
    return p.parse_args()


def main() -> int:
    """Run, print and write; see the module's text for the exit status."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the services are ended, too
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell's background job ignores it
    names: dict[str, Any] = {"engine": "pagoda", "preset": options.preset}
    result = names | described(options, PACKAGES)
    code = 0
    services = Services(options.logs)
    soak = Soak(options, services)
    soak.say(json.dumps(result["facts"]))
    try:
        with services:
            _start(options, services)
            soak.say("services ready")
            with reporting(services):
                asyncio.run(soak.run())
    except KeyboardInterrupt:
        result["failed"], code = "interrupted", 130
    except SystemExit:  # what ran until then is written all the same
        result["failed"], code = "told to end", 143
    except (ServiceError, SessionEndedError, StalledError, TimeoutError, grpc.RpcError) as error:
        result["failed"], code = f"{type(error).__name__}: {error}", 2
    if "failed" in result:
        soak.say(f"failed: {result['failed']}")
    row = soak.row()
    result["results"] = [row]
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))
    print(json.dumps({k: v for k, v in row.items() if k != "violations"}), flush=True)
    for violation in row["violations"]:
        print(f"VIOLATION: {violation}", flush=True)
    return code or (1 if row["num_violations"] else 0)


if __name__ == "__main__":
    sys.exit(main())
