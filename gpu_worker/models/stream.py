"""Carries tensors from files to a device: read side by side, copied while others are still being read.

One thread that touches mapped pages brings 1 to 2 GB a second, whatever the disk or the device could do. So
some threads read pieces of the files into page-locked memory, which the device copies at the link's full
rate; a type that differs is converted on the device.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

THREADS = 8
PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class Span:
    """Where a tensor's numbers lie, one after another."""

    file: Path
    offset: int
    """Bytes before the first number."""
    dtype: torch.dtype
    stride: int = 0
    """Bytes from a row's first number to the next row's, where only a range of each row is wanted."""


class StreamError(Exception):
    """A tensor could not be brought; `name` is the tensor's."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(str(error))
        self.name = name


class Streamer:
    """Fills tensors of one device from files, in the background.

    Its threads are daemons: a process that is told to stop while it loads does not wait for them.
    """

    def __init__(self, device: torch.device, arrived: Callable[[int], None], threads: int = THREADS) -> None:
        """Begin with nothing to do.

        Args:
            device: where the tensors are.
            arrived: called, by any thread, with the bytes of the file that a tensor has just received.
            threads: how many read.
        """
        self._device, self._arrived = device, arrived
        self._jobs: queue.SimpleQueue[tuple[str, Callable[[_Lane], None]] | None] = queue.SimpleQueue()
        self._files: dict[Path, int] = {}
        self._error: StreamError | None = None
        self._threads = [
            threading.Thread(target=self._work, name=f"weights-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def fill(self, name: str, span: Span, out: torch.Tensor) -> None:
        """Bring a tensor into `out`, of any float type; it is there when `finish` returns.

        `out` is contiguous or, for a span with a stride, [rows, columns], no row larger than a piece.

        Raises:
            OSError: the file cannot be opened.
        """
        if span.file not in self._files:
            self._files[span.file] = os.open(span.file, os.O_RDONLY)
        file, step = self._files[span.file], PIECE_BYTES // span.dtype.itemsize
        if span.stride:
            step, stride = step // max(1, out.shape[1]), span.stride
        else:
            out, stride = out.view(-1), span.dtype.itemsize
        for first in range(0, len(out) if out.numel() else 0, step):
            piece = replace(span, offset=span.offset + first * stride)
            self._jobs.put((name, partial(self._copy, file, piece, out[first : first + step])))

    def fill_from(
        self, name: str, read: Callable[[], torch.Tensor], num_bytes: int, out: torch.Tensor
    ) -> None:
        """The same for a tensor that the host computes, from so many bytes of a file."""

        def job(lane: _Lane) -> None:
            values = read()
            with lane.entered():
                out.copy_(values.to(self._device).to(out.dtype))
            lane.synchronize()
            self._arrived(num_bytes)

        self._jobs.put((name, job))

    def finish(self) -> None:
        """Wait for everything that was asked for.

        Raises:
            StreamError: a tensor could not be brought; the first such one.
        """
        self._end()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Give up what has not begun."""
        self._error = self._error or StreamError("", InterruptedError("abandoned"))
        self._end()

    def _end(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    @torch.inference_mode()  # a caller that loads in it makes tensors that nobody else may write
    def _work(self) -> None:
        lane: _Lane | None = None
        while (entry := self._jobs.get()) is not None:
            name, job = entry
            if self._error is not None:
                continue
            try:
                lane = lane or _Lane(self._device)
                job(lane)
            except Exception as error:  # whatever it is, the one who waits is told
                self._error = self._error or StreamError(name, error)

    def _copy(self, file: int, span: Span, out: torch.Tensor, lane: _Lane) -> None:
        num_bytes = out.numel() * span.dtype.itemsize
        host, width = lane.host.numpy().data[:num_bytes], num_bytes // (len(out) if span.stride else 1)
        for i, first in enumerate(range(0, num_bytes, width)):
            _read(file, host[first : first + width], span.offset + i * span.stride)
        values = lane.host[:num_bytes].view(span.dtype)
        with lane.entered():
            if span.dtype is not out.dtype or not out.is_contiguous():  # torch would convert on the host
                values = lane.staging[:num_bytes].view(span.dtype).copy_(values, non_blocking=True)
            out.copy_(values.view(out.shape), non_blocking=True)
        lane.synchronize()
        self._arrived(num_bytes)


class _Lane:
    """What one thread needs for itself: page-locked memory, a stream, and room on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        self.host = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
        self._stream = torch.cuda.Stream(device) if on_gpu else None

    def entered(self) -> AbstractContextManager[object]:
        """Device work of this thread goes to its stream, and so to its device, meanwhile."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @cached_property
    def staging(self) -> torch.Tensor:
        """uint8[PIECE_BYTES] on the device."""
        return torch.empty(PIECE_BYTES, dtype=torch.uint8, device=self._device)

    def synchronize(self) -> None:
        """Wait until the page-locked memory may be written again."""
        if self._stream is not None:
            self._stream.synchronize()


def _read(file: int, target: memoryview, offset: int) -> None:
    """Fill `target`. One call may bring less than was asked for: at most 2 GiB, or what a signal left."""
    while target:
        count = os.preadv(file, [target], offset)
        if not count:
            raise OSError(f"the file ends {len(target)} bytes early")
        target, offset = target[count:], offset + count
