"""Blocks that go to host memory and come back elsewhere: a row goes on as if it had never been away."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.staging import StepError
from pagoda.internal.v1 import worker_pb2
from tests.unit.worker.harness import Device, Sequence_, prompt

# A GPU's kernels and events are measured where there is one.
PLACES = [torch.device(kind) for kind in ("cpu", *["cuda"] * torch.cuda.is_available())]


@pytest.fixture(params=PLACES, ids=str)
def device(request, tiny):
    return Device(tiny("llama")[1], place=request.param, num_host_blocks=6, num_blocks=12)


def swap_out(device: Device, slot: int, host_blocks: list[int]) -> Sequence_:
    """Take a row off the device with the next step."""
    sequence = device.sequences[slot]
    device.pending.swap_out_device_blocks.extend(sequence.blocks)
    device.pending.swap_out_host_blocks.extend(host_blocks)
    device.release(slot)
    return sequence


def swap_in(device: Device, slot: int, away: Sequence_, host_blocks: list[int]) -> Sequence_:
    """Bring a row back into a slot with the next step, on other blocks."""
    row = device.add(slot, away.tokens, num_prompt=33, num_computed=len(away.tokens) - 1)
    device.pending.swap_in_host_blocks.extend(host_blocks)
    device.pending.swap_in_device_blocks.extend(row.blocks[: len(host_blocks)])
    return row


def test_a_row_goes_on_where_it_was(device: Device) -> None:
    expected = device.generate(0, prompt(33), 20)
    device.add(3, prompt(33))
    assert device.step({3: 33}).swap_us == 0
    device.decode([3], 5)
    host = [5, 0, 2]
    away = swap_out(device, 3, host)
    # In that very step, others write into its blocks: all of the device's are theirs.
    for slot, length in ((0, 100), (1, 75)):
        device.add(slot, prompt(length, seed=slot + 1))
    assert not device.free and device.step({0: 100, 1: 75}).swap_us > 0
    device.decode([0, 1], 2)
    for slot in (0, 1):
        device.release(slot)
    device.free.reverse()
    back = swap_in(device, 2, away, host)
    result = device.step({2: 1})
    assert result.swap_us > 0 and len(result.tokens) == 1, "it takes its next token in that step"
    assert back.blocks[:3] != away.blocks[:3]
    assert device.step({2: 1}).swap_us == 0
    device.decode([2], 12)
    assert back.tokens[33:] == expected


def test_out_comes_before_copies_and_in_after_them_in_one_step(device: Device) -> None:
    """A block goes out, is copied over, and what went out comes back into a third."""
    pool = device.cache.pool
    pool.random_(0, 256)
    first, second = pool[:, 1].clone(), pool[:, 2].clone()
    pending = device.pending
    pending.swap_out_device_blocks.append(1)
    pending.swap_out_host_blocks.append(4)
    pending.copy_src_blocks.append(2)
    pending.copy_dst_blocks.append(1)
    pending.swap_in_host_blocks.append(4)
    pending.swap_in_device_blocks.append(7)
    device.step({})
    assert torch.equal(pool[:, 7], first) and torch.equal(pool[:, 1], second)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"swap_out_device_blocks": [0], "swap_out_host_blocks": [6]}, "block 6 does not exist: there are 6"),
        ({"swap_out_device_blocks": [12], "swap_out_host_blocks": [0]}, "block 12 does not exist"),
        ({"swap_in_host_blocks": [6], "swap_in_device_blocks": [0]}, "block 6 does not exist"),
        ({"swap_in_host_blocks": [0], "swap_in_device_blocks": [12]}, "block 12 does not exist"),
        ({"swap_in_host_blocks": [0, 1], "swap_in_device_blocks": [2]}, "2 blocks to copy to 1"),
    ],
    ids=str,
)
def test_swaps_that_cannot_be(device: Device, columns: dict[str, list[int]], message: str) -> None:
    with pytest.raises(StepError, match=message):
        device.stager.stage(worker_pb2.Step(num_iterations=1, **columns))
