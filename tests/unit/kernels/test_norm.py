import pytest
import torch

from kernels.norm import head_rms_norm, rms_norm, rms_norm_reference

EPS = 1e-5


def exact(x, weight):
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.mark.parametrize("norm", [rms_norm, rms_norm_reference])
@pytest.mark.parametrize("dim", [1, 15, 64, 576, 1000])
def test_matches_the_formula(norm, dim, dtype, threads, randn, close):
    weight = randn(dim, dtype=dtype)
    for rows in (1, 3, 100):
        x = randn(rows, dim, dtype=dtype)
        close(norm(x, weight, EPS), exact(x, weight), ulps=16 if dtype is torch.float32 else 2)


@pytest.mark.parametrize("norm", [rms_norm, rms_norm_reference])
def test_adds_to_the_residual_in_place(norm, dtype, randn, close):
    x, residual, weight = (randn(*shape, dtype=dtype) for shape in ((5, 70), (5, 70), (70,)))
    total = residual + x
    result = norm(x, weight, EPS, residual)
    assert torch.equal(residual, total)
    close(result, exact(total, weight), ulps=16 if dtype is torch.float32 else 2)


def test_rounds_as_transformers_does(randn):
    x, weight = randn(8, 576, dtype=torch.bfloat16), randn(576, dtype=torch.bfloat16)
    result, reference = rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS)
    assert (result == reference).float().mean() > 0.999


def test_out_may_be_x_and_rows_may_be_strided(dtype, randn):
    wide, weight = randn(6, 200, dtype=dtype), randn(64, dtype=dtype)
    x = wide[:, 10:74]
    expected = rms_norm(x.clone(), weight, EPS)
    rest = wide[:, 74:].clone()
    assert rms_norm(x, weight, EPS, out=x) is x
    assert torch.equal(x, expected) and torch.equal(wide[:, 74:], rest)


def test_heads_of_a_fused_projection(dtype, threads, randn, close):
    qkv, weight = randn(40, (7 + 2) * 24, dtype=dtype), randn(24, dtype=dtype)
    q = qkv[:, : 7 * 24].unflatten(1, (7, 24))
    expected = exact(q, weight)
    close(head_rms_norm(q, weight, EPS), expected, ulps=16 if dtype is torch.float32 else 2)
    rest = qkv[:, 7 * 24 :].clone()
    head_rms_norm(q, weight, EPS, out=q)
    close(q, expected, ulps=16 if dtype is torch.float32 else 2)
    assert torch.equal(qkv[:, 7 * 24 :], rest)


def test_errors_name_the_argument(randn):
    x, weight = randn(2, 8), randn(8)
    with pytest.raises(ValueError, match=r"^x must"):
        rms_norm(x.half(), weight.half(), EPS)
    with pytest.raises(ValueError, match=r"^weight must"):
        rms_norm(x, randn(9), EPS)
    with pytest.raises(ValueError, match=r"^residual must"):
        rms_norm(x, weight, EPS, randn(3, 8))
    with pytest.raises(ValueError, match=r"^out must"):
        rms_norm(x, weight, EPS, out=randn(2, 9))
    with pytest.raises(ValueError, match=r"^x must"):
        head_rms_norm(randn(2, 3, 16)[:, :, :8], weight, EPS)
    with pytest.raises(ValueError, match=r"^weight must"):
        head_rms_norm(randn(2, 3, 8), randn(9), EPS)
    with pytest.raises(ValueError, match=r"^out must"):
        head_rms_norm(randn(2, 3, 8), weight, EPS, out=randn(2, 3, 9))
