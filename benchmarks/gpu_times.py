"""How long a device and its host take for work that is handed over launch by launch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def device_and_host_ms(
    run: Callable[[], object], repeats: int, prepare: Callable[[], object] = lambda: None
) -> tuple[float, float]:
    """Medians in milliseconds, by the device's clock and of handing over; `prepare` comes before each run and
    is not measured."""
    times = []
    for _ in range(repeats):
        prepare()
        torch.cuda.synchronize()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started = time.perf_counter()
        began.record()
        run()
        ended.record()
        host = time.perf_counter() - started
        torch.cuda.synchronize()
        times.append((began.elapsed_time(ended), host * 1e3))
    return statistics.median(device for device, _ in times), statistics.median(host for _, host in times)
