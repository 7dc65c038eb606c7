"""Numbers on their way from the host to the device: a ring of buffers, one for each step in flight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.batch import ALIGNMENT

Values = Sequence[int] | np.ndarray


@dataclass
class Spans:
    """Runs of staged numbers that go to places in a flattened array."""

    places: torch.Tensor
    """int64[N, 3]: first place there, first place in the staging buffer, length."""
    longest: int
    source: torch.Tensor
    """The staging buffer, int32."""


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
    def used(self) -> int:
        """The place at which the next values go."""
        return self._used

    def begin(self, size: int) -> None:
        """Start the next step's buffer, which holds at least `size` numbers."""
        self._current = i = (self._current + 1) % len(self._host)
        self._used = 0
        if len(self._arrays[i]) < size:
            self._host[i] = self._allocate(2 * size)
            self._device[i] = self._mirror(self._host[i])
            self._arrays[i] = self._host[i].numpy()

    def put(self, values: Values) -> torch.Tensor:
        """int32[len(values)] on the device."""
        start, end = self._used, self._used + len(values)
        self._arrays[self._current][start:end] = values
        self._used = -(-end // ALIGNMENT) * ALIGNMENT
        return self.buffer[start:end]

    def put_long(self, values: Values) -> torch.Tensor:
        """int64[len(values)] on the device."""
        return self.put(np.asarray(values, dtype=np.int64).view(np.int32)).view(torch.int64)

    def put_matrix(self, values: np.ndarray) -> torch.Tensor:
        """int32 or float32 [n, m] on the device, as `values` is."""
        flat = self.put(np.ascontiguousarray(values).reshape(-1).view(np.int32))
        return (flat.view(torch.float32) if values.dtype == np.float32 else flat).view(values.shape)

    def put_spans(self, spans: list[tuple[int, int, int]]) -> Spans:
        """Spans of what was put before: first place there, first place here, length."""
        places = self.put_long(np.array(spans, dtype=np.int64).reshape(-1)).view(-1, 3)
        return Spans(places, max(length for _, _, length in spans), self.buffer)

    def flush(self) -> None:
        """Queue the copy of everything put since `begin`."""
        if self._on_device:
            n, i = self._used, self._current
            self._device[i][:n].copy_(self._host[i][:n], non_blocking=True)
