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
    """

    def __init__(self, device: torch.device, capacity: int, num_buffers: int) -> None:
        self._on_device, self._target = device.type != "cpu", device
        self._host = [self._allocate(capacity) for _ in range(num_buffers)]
        self._device = [self._mirror(host) for host in self._host]
        self._arrays = [buffer.numpy() for buffer in self._host]
        self._current = 0
        self._used = 0

    def _allocate(self, capacity: int) -> torch.Tensor:
        return torch.empty(capacity, dtype=torch.int32, pin_memory=self._on_device)

    def _mirror(self, host: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(host, device=self._target) if self._on_device else host

    @property
    def buffer(self) -> torch.Tensor:
        """The current buffer on the device."""
        return self._device[self._current]

    @property
    def array(self) -> np.ndarray:
        """The current buffer on the host."""
        return self._arrays[self._current]

    def begin(self, size: int) -> None:
        """Start the next step's buffer, which holds at least `size` numbers."""
        self._current = i = (self._current + 1) % len(self._host)
        self._used = 0
        if len(self._arrays[i]) < size:
            self._host[i] = self._allocate(2 * size)
            self._device[i] = self._mirror(self._host[i])
            self._arrays[i] = self._host[i].numpy()

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
            n, i = self._used, self._current
            self._device[i][:n].copy_(self._host[i][:n], non_blocking=True)
