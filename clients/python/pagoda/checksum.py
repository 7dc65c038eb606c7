"""What the ranks of a worker group compare after each step."""

from __future__ import annotations

import zlib
from array import array

from pagoda.internal.v1 import worker_pb2


def step_checksum(result: worker_pb2.StepResult) -> int:
    """CRC-32 over what all ranks must have drawn alike: tokens, num_sampled, beam_parents and beam_tokens,
    one after the other, as little-endian 32-bit words."""
    crc = 0
    for column in (result.tokens, result.num_sampled, result.beam_parents, result.beam_tokens):
        crc = zlib.crc32(array("I", column).tobytes(), crc)
    return crc
