"""What the kernels ask of a device, and the launch that those of a decoder layer go through."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Traits(NamedTuple):
    """What differs between devices.

    Attributes:
        capability: compute capability, 10 x major + minor.
        multiprocessors: how many there are.
        shared_bytes: shared memory that one block may take.
    """

    capability: int
    multiprocessors: int
    shared_bytes: int

    @property
    def overlaps(self) -> bool:
        """Whether a kernel may start while the one before it still runs, and wait inside for its end
        (programmatic dependent launch)."""
        return self.capability >= 90


@functools.cache
def traits(device: torch.device) -> Traits:
    """The traits of a CUDA device; of anything else (Triton's interpreter), the smallest."""
    if device.type != "cuda":
        return Traits(0, 4, 99 << 10)
    properties = torch.cuda.get_device_properties(device)
    shared_bytes = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in the stubs
    capability = 10 * properties.major + properties.minor
    return Traits(capability, properties.multi_processor_count, shared_bytes)


def launch(kernel, grid: tuple[int, ...], *arguments, overlaps: bool = False, **options) -> None:
    """Launches a kernel; with `overlaps`, before the end of the one in front of it on the stream."""
    if overlaps:  # Triton's interpreter does not know the option
        options["launch_pdl"] = True
    kernel[grid](*arguments, **options)
