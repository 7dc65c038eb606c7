"""From what the device drew to a `StepResult`: the one place where device values are read."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.host_pool import seconds_between
from gpu_worker.prompt_logprobs import Wanted
from gpu_worker.runner import StepOutputs
from gpu_worker.spans import Report
from kernels.rows import GOES_ON, NAN
from kernels.sample import SampledLogprobs
from pagoda.internal.v1 import worker_pb2

MAX_UINT32 = 2**32 - 1
# How long to sleep between two looks at a step that runs: so many seconds, or this share of the time that it
# has run for.
LOOK_EVERY_S, LOOK_SHARE = 50e-6, 1 / 256

Events = tuple[torch.cuda.Event, torch.cuda.Event]


def collect(epoch: int, step_id: int, outputs: StepOutputs) -> worker_pb2.StepResult:
    """Put a step's values, which the device has delivered, into columns. The times are the caller's."""
    result = worker_pb2.StepResult(epoch=epoch, step_id=step_id)
    if outputs.swaps is not None:
        result.swap_us = microseconds(seconds_between(*outputs.swaps))
    if outputs.prompts is not None:
        _add_prompts(result, *outputs.prompts)
    if outputs.found is not None:
        parents, ids, scores = outputs.found.numpy()
        result.beam_parents.extend(parents.tolist())
        result.beam_tokens.extend(ids.tolist())
        result.beam_scores.extend(scores.view(np.float32).tolist())
    if outputs.alternatives is not None:
        wanted, top_ids, top_logprobs = outputs.alternatives
        asked, none = np.array(wanted), np.empty(0)
        tops = (part.cpu().numpy()[asked >= 0] for part in (top_ids, top_logprobs))
        _add(result.beam_logprobs, asked[asked >= 0], none, none, *tops)
    if outputs.drawn is None:
        return result
    values = outputs.drawn.numpy()
    tokens, outcomes = values[:, 0], values[:, 1]  # [m, R] each
    taken = outcomes.view(np.uint32) < NAN  # WAS_DONE is -1, the largest as an unsigned number
    if taken.all():
        result.tokens.extend(tokens.T.ravel().tolist())
    else:
        result.tokens.extend(tokens.T[taken.T].tolist())
        result.num_sampled.extend(taken.sum(axis=0).tolist())
    reasons = outcomes.max(axis=0)  # a row ends at most once, and is done from then on
    ended = np.flatnonzero(reasons > GOES_ON)
    if len(ended):
        result.ended_rows.extend(ended.tolist())
        result.ended_reasons.extend(reasons[ended].tolist())
    if max(outputs.num_logprobs) >= 0:
        _add_logprobs(result.logprobs, outputs, taken)
    return result


def _add_logprobs(columns: worker_pb2.LogprobColumns, outputs: StepOutputs, taken: np.ndarray) -> None:
    """One entry for each token of the rows that asked, row by row as the tokens stand in the result."""
    wanted = np.array(outputs.num_logprobs)
    told = (taken & (wanted >= 0)).T
    if not told.any():
        return
    parts = zip(*(vars(logprobs).values() for logprobs in outputs.logprobs), strict=True)
    by_row = (np.stack([x[: len(wanted)].cpu().numpy() for x in part], axis=1) for part in parts)
    _add(columns, np.repeat(wanted, told.sum(axis=1)), *(part[told] for part in by_row))


def _add_prompts(result: worker_pb2.StepResult, wanted: Wanted, logprobs: SampledLogprobs) -> None:
    """One entry for each token that was to be reported on, row by row."""
    result.prompt_rows.extend(wanted.rows)
    result.num_prompt_logprobs.extend(wanted.counts)
    asked = np.repeat(wanted.num_top, wanted.counts)
    _add(result.prompt_logprobs, asked, *(part.cpu().numpy() for part in vars(logprobs).values()))


def _add(
    columns: worker_pb2.LogprobColumns, asked: np.ndarray, chosen: np.ndarray, ranks: np.ndarray,
    ids: np.ndarray, values: np.ndarray,
) -> None:  # fmt: skip
    """Logprobs and ranks of tokens, and of each one's best tokens as many as were asked for; the columns are
    in the order of `SampledLogprobs`."""
    columns.token_logprobs.extend(chosen.tolist())
    columns.ranks.extend(ranks.tolist())
    num_top = np.minimum(asked, ids.shape[1])
    taken = np.arange(ids.shape[1]) < num_top[:, None]
    columns.num_top.extend(num_top.tolist())
    columns.top_ids.extend(ids[taken].tolist())
    columns.top_logprobs.extend(values[taken].tolist())


def microseconds(seconds: float) -> int:
    """A duration as the wire carries it."""
    return min(MAX_UINT32, max(0, round(seconds * 1e6)))


@dataclass(frozen=True)
class Launched:
    """A step that was handed to the device.

    Attributes:
        epoch, step_id: whose it is.
        outputs: what it will have drawn.
        events: when it began and ended, by the device's own clock.
        staged: seconds that staging took on the host.
        report: what else wants its result.
    """

    epoch: int
    step_id: int
    outputs: StepOutputs
    events: Events
    staged: float
    report: Report | None = None


class EventPool:
    """Pairs of events with times, used again and again: making one takes longer than recording it. One thread
    takes, another gives back."""

    def __init__(self) -> None:
        self._spare: deque[Events] = deque()

    def take(self) -> Events:
        """A pair that nobody waits for."""
        if self._spare:
            return self._spare.popleft()
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def give_back(self, events: Events) -> None:
        """Nobody will look at this pair any more."""
        self._spare.append(events)


def wait(event: torch.cuda.Event) -> None:
    """Return when the device has come to `event`, or failed.

    A thread that the driver puts to sleep wakes 0.1 ms late, and one that spins takes a core. Short sleeps
    take some hundredths of a core, and fewer for long steps, which can bear a later result.

    Raises:
        RuntimeError: the device failed.
    """
    started = time.perf_counter()
    while not event.query():
        time.sleep(max(LOOK_EVERY_S, (time.perf_counter() - started) * LOOK_SHARE))


class OutputThread:
    """Waits for the steps that a device was given, one after the other, and reports each."""

    def __init__(
        self,
        device: torch.device,
        on_result: Callable[[worker_pb2.StepResult, Launched], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """Both are called from this thread; after a failure it ends."""
        self._device, self._on_result, self._on_failure = device, on_result, on_failure
        self.events = EventPool()
        self._queue: queue.SimpleQueue[Launched | threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    def put(self, launched: Launched) -> None:
        """Report this step when the device is done with it."""
        self._queue.put(launched)

    def flush(self) -> None:
        """Wait until everything put so far has been reported; the next step has nothing before it."""
        reported = threading.Event()
        self._queue.put(reported)
        while not reported.wait(0.2) and self._thread.is_alive():
            continue

    def close(self, timeout: float) -> None:
        """End the thread when what was put has been reported."""
        self._queue.put(None)
        self._thread.join(timeout)

    @torch.inference_mode()
    def _run(self) -> None:
        last: Events | None = None
        # Logprobs are copied on a stream of their own, past the steps that are queued by then.
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            while (item := self._queue.get()) is not None:
                if isinstance(item, threading.Event):
                    last = None
                    item.set()
                    continue
                try:
                    self._report(item, last)
                except BaseException as error:
                    self._on_failure(error)
                    return
                last = item.events

    def _report(self, item: Launched, last: Events | None) -> None:
        began, ended = item.events
        wait(ended)
        result = collect(item.epoch, item.step_id, item.outputs)
        result.device_us = microseconds(began.elapsed_time(ended) / 1e3)
        result.idle_us = microseconds(last[1].elapsed_time(began) / 1e3) if last is not None else 0
        self._on_result(result, item)
        if last is not None:
            self.events.give_back(last)
