"""Ruling out tokens in Triton against the plain torch form: interpreted, or on the GPU there is."""

import pytest
import torch

from tests.support import triton as support

pytest.importorskip("triton")

from kernels.cuda import allow as cuda
from kernels.sample import allow

DEVICE = support.device()
TYPES = {"logits": "*fp32", "masks": "*i32", "bits": "*i32"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [31, 2048, 5000])
@pytest.mark.parametrize("words", [64, 157, 200])
def test_it_equals_the_reference(dtype, width, words):
    generator = torch.Generator().manual_seed(width + words)
    logits = torch.randn(6, width + 3, generator=generator).to(dtype)[:, :width]
    masks = torch.tensor([1, -1, -1, 2, 0, 1], dtype=torch.int32)
    bits = torch.randint(-(2**31), 2**31, (3, words), generator=generator).to(torch.int32)
    expected = logits.clone()
    allow(expected, masks, bits)
    got = torch.empty_strided(logits.shape, logits.stride(), dtype=dtype, device=DEVICE).copy_(logits)
    cuda.allow(got, masks.to(DEVICE), bits.to(DEVICE))
    assert torch.equal(got.cpu(), expected)
    assert 0 < expected.isinf().sum() < expected.numel()


@pytest.mark.parametrize("first", [64, 6400])
def test_columns_from_a_later_id_on(first):
    generator = torch.Generator().manual_seed(first)
    logits, masks = torch.zeros(3, 128), torch.tensor([1, -1, 0], dtype=torch.int32)
    bits = torch.randint(-(2**31), 2**31, (2, 200), generator=generator).to(torch.int32)
    whole = torch.zeros(3, 6400)
    allow(whole, masks, bits)
    got = logits.to(DEVICE)
    allow(logits, masks, bits[:, first // 32 :])
    cuda.allow(got, masks.to(DEVICE), bits.to(DEVICE)[:, first // 32 :])
    expected = torch.zeros(3, 128) if first == 6400 else whole[:, first : first + 128]
    assert torch.equal(logits, expected) and torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("arch", support.ARCHS)
@pytest.mark.parametrize("logits", ["*fp32", "*bf16"])
def test_it_compiles_for(arch, logits):
    names = ("logits", "masks", "bits", "stride", "num_words", "width")
    signature = {name: (TYPES | {"logits": logits}).get(name, "i32") for name in names}
    compiled = support.compile_for(cuda.allow_kernel, arch, signature, {"BLOCK": cuda.BLOCK}, {}, ["stride"])
    assert compiled.spilled == 0
