import pytest
import torch

from kernels.activation import silu_and_mul, silu_and_mul_reference


def exact(gate_up):
    gate, up = gate_up.double().chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("op", [silu_and_mul, silu_and_mul_reference])
@pytest.mark.parametrize("dim", [1, 17, 64, 1536])
def test_matches_the_formula(op, dim, dtype, threads, randn):
    for rows in (1, 3, 50):
        gate_up = randn(rows, 2 * dim, dtype=dtype) * 5
        tolerance = {"rtol": 2e-6, "atol": 1e-30} if dtype is torch.float32 else {"rtol": 4e-3, "atol": 1e-30}
        torch.testing.assert_close(op(gate_up).double(), exact(gate_up), **tolerance)


@pytest.mark.parametrize("op", [silu_and_mul, silu_and_mul_reference])
def test_extreme_gates(op):
    gates = torch.tensor([-1e30, -200.0, -100.0, -88.0, -0.0, 88.0, 200.0, 1e30, float("nan")])
    result = op(torch.cat((gates, torch.ones(9))).unsqueeze(0))[0]
    assert (result[:4].abs() < 1e-30).all() or op is silu_and_mul
    assert (result[1:5].abs() < 1e-30).all() and torch.equal(result[5:8], gates[5:8]) and result[8].isnan()


def test_strided_input_and_output(dtype, randn):
    wide = randn(4, 300, dtype=dtype)
    out = torch.zeros(4, 100, dtype=dtype)
    silu_and_mul(wide[:, 20:120], out=out[:, 25:75])
    assert torch.equal(out[:, 25:75], silu_and_mul(wide[:, 20:120].clone()))
    assert not out[:, :25].any() and not out[:, 75:].any()


def test_errors_name_the_argument(randn):
    with pytest.raises(ValueError, match=r"^gate_up must"):
        silu_and_mul(randn(2, 7))
    with pytest.raises(ValueError, match=r"^gate_up must"):
        silu_and_mul(randn(2, 8).half())
    with pytest.raises(ValueError, match=r"^out must"):
        silu_and_mul(randn(2, 8), out=randn(2, 8))
