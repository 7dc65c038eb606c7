"""What the kernels ask of a device, and the launch that those of a decoder layer go through."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Traits(NamedTuple):
    """What differs between devices.

    Attributes:
        shared_bytes: shared memory that one block may take.
        overlaps: whether a kernel may start while the one before it still runs, and wait inside for its end
            (programmatic dependent launch, sm_90 and newer).
    """

    shared_bytes: int
    overlaps: bool


@functools.cache
def traits(device: torch.device) -> Traits:
    """The traits of a CUDA device; of anything else (Triton's interpreter), the smallest."""
    if device.type != "cuda":
        return Traits(99 << 10, False)
    properties = torch.cuda.get_device_properties(device)
    shared_bytes = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in the stubs
    return Traits(shared_bytes, properties.major >= 9)


def launch(kernel, grid: tuple[int, ...], *arguments, overlaps: bool = False, **options) -> None:
    """Launches a kernel; with `overlaps`, before the end of the one in front of it on the stream."""
    if overlaps:  # Triton's interpreter does not know the option
        options["launch_pdl"] = True
    kernel[grid](*arguments, **options)
