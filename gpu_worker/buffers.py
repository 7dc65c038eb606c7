"""Numbers on their way from the host to the device: a ring of buffers, one for each step in flight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gpu_worker.batch import ALIGNMENT

Values = Sequence[int] | np.ndarray


class Staging:
    """A ring of int32 buffers in host memory, each with its place on the device.

    `put` packs values into the current buffer and returns the device tensor in which they appear; they are
    there for all work queued after `flush`. On a CPU both memories are one and `flush` has nothing to copy.
    A buffer is used again after `num_buffers` steps: one more than may be in flight. A step that needs more
    than a buffer holds gets a larger one in its place.

    Attributes:
        buffer: the current buffer on the device.
        array: the current buffer on the host.
    """

    def __init__(self, device: torch.device, capacity: int, num_buffers: int) -> None:
        self._on_device, self._target = device.type != "cpu", device
        self._ring = [self._allocate(capacity) for _ in range(num_buffers)]
        self._current = self._used = 0
        self._host, self.buffer, self.array = self._ring[0]

    def _allocate(self, capacity: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """A buffer: on the host, on the device, and again on the host."""
        host = torch.empty(capacity, dtype=torch.int32, pin_memory=self._on_device)
        device = torch.empty_like(host, device=self._target) if self._on_device else host
        return host, device, host.numpy()

    def begin(self, size: int) -> None:
        """Start the next step's buffer, which holds at least `size` numbers."""
        self._current = i = (self._current + 1) % len(self._ring)
        self._used = 0
        if len(self._ring[i][0]) < size:
            self._ring[i] = self._allocate(2 * size)
        self._host, self.buffer, self.array = self._ring[i]

    def reserve(self, count: int) -> int:
        """Keep room for `count` numbers, which are written to `array`; their place."""
        start = self._used
        self._used = -(-(start + count) // ALIGNMENT) * ALIGNMENT
        return start

    def write(self, *parts: Values) -> int:
        """Pack numbers, one part behind the other; the place of the first."""
        array, start = self.array, self._used
        end = start
        for part in parts:
            first, end = end, end + len(part)
            array[first:end] = part
        self._used = -(-end // ALIGNMENT) * ALIGNMENT
        return start

    def put(self, values: Values) -> torch.Tensor:
        """int32[len(values)] on the device."""
        start = self.write(values)
        return self.buffer[start : start + len(values)]

    def put_long(self, values: Values) -> torch.Tensor:
        """int64[len(values)] on the device."""
        return self.put(np.asarray(values, dtype=np.int64).view(np.int32)).view(torch.int64)

    def put_matrix(self, values: np.ndarray) -> torch.Tensor:
        """int32 or float32 [n, m] on the device, as `values` is."""
        flat = self.put(np.ascontiguousarray(values).reshape(-1).view(np.int32))
        return (flat.view(torch.float32) if values.dtype == np.float32 else flat).view(values.shape)

    def flush(self) -> None:
        """Queue the copy of everything put since `begin`."""
        if self._on_device:
            self.buffer[: self._used].copy_(self._host[: self._used], non_blocking=True)
