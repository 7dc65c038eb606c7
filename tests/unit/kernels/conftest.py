"""Fixtures of the kernel tests. Every test also runs, on the references, where there is no C compiler."""

import pytest
import torch

from kernels import cpu


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request):
    before = cpu.threads()
    cpu.set_threads(request.param)
    yield request.param
    cpu.set_threads(before)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)


@pytest.fixture
def randn(generator):
    """Normal numbers of a shape and type, the same in every run."""
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator).to(dtype)


@pytest.fixture
def close():
    """Asserts that a result is within rounding of the exact one: `ulps` of the result's type at its scale."""

    def check(result: torch.Tensor, exact: torch.Tensor, ulps: float = 4) -> None:
        epsilon = torch.finfo(result.dtype).eps
        scale = exact.abs().clamp(min=exact.abs().mean())
        error = ((result.double() - exact.double()) / scale).abs()
        assert torch.isfinite(result).all()
        assert error.max() <= ulps * epsilon, f"off by {error.max() / epsilon:.1f} ulps"

    return check
