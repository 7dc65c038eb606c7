import pytest
import torch

from kernels import cpu
from kernels.linear import embedding, embedding_reference, linear, linear_reference, pack, silu_and_mul_linear

SHAPES = [(96, 64), (100, 48), (33, 17), (1, 1), (576, 576), (70, 1536)]
ROWS = [1, 2, 3, 7, 13, 14, 15, 29, 64, 255, 256, 300]


def exact(x, weight, bias=None):
    result = x.double() @ weight.double().t()
    return result if bias is None else result + bias.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_exact_product(shape, dtype, threads, randn, close):
    weight = randn(*shape, dtype=dtype)
    packed = pack(weight)
    for rows in ROWS:
        x = randn(rows, shape[1], dtype=dtype)
        close(linear(x, packed), exact(x, weight), ulps=48 if dtype is torch.float32 else 1)


def test_a_vocabulary_of_logits(randn, close):
    weight = randn(49152, 576, dtype=torch.bfloat16)
    packed = pack(weight, out_dtype=torch.float32)
    x = randn(3, 576, dtype=torch.bfloat16)
    logits = linear(x, packed)
    assert logits.dtype is torch.float32
    close(logits, exact(x, weight), ulps=48)


def test_bias(dtype, randn, close):
    weight, bias = randn(50, 40, dtype=dtype), randn(50, dtype=dtype)
    packed = pack(weight, bias)
    for rows in (1, 20):
        x = randn(rows, 40, dtype=dtype)
        close(linear(x, packed), exact(x, weight, bias), ulps=48 if dtype is torch.float32 else 1)


def test_reference(dtype, randn, close):
    weight, bias, x = randn(50, 40, dtype=dtype), randn(50, dtype=dtype), randn(9, 40, dtype=dtype)
    close(linear_reference(x, weight, bias), exact(x, weight, bias), ulps=48 if dtype is torch.float32 else 2)
    logits = linear_reference(x, weight, out_dtype=torch.float32)
    close(logits, exact(x, weight), ulps=48)


def test_strided_input_and_output_in_poisoned_memory(dtype, randn, close):
    weight = randn(40, 24, dtype=dtype)
    packed = pack(weight)
    for rows in (1, 5, 300):
        x = torch.full((rows, 100), float("nan"), dtype=dtype)
        x[:, 30:54] = randn(rows, 24, dtype=dtype)
        out = torch.full((rows, 90), 7.0, dtype=dtype)
        assert linear(x[:, 30:54], packed, out=out[:, 8:48]).data_ptr() == out[:, 8:].data_ptr()
        close(out[:, 8:48], exact(x[:, 30:54], weight), ulps=48 if dtype is torch.float32 else 1)
        assert (out[:, :8] == 7).all() and (out[:, 48:] == 7).all()


def test_strided_weight(dtype, randn):
    weight = randn(20, 64, dtype=dtype)
    x = randn(2, 32, dtype=dtype)
    assert torch.equal(linear(x, pack(weight[:, 32:])), linear(x, pack(weight[:, 32:].clone())))


def test_a_row_does_not_depend_on_its_batch(dtype, threads, randn):
    if cpu.library() is None:
        return  # torch makes no such promise
    packed = pack(randn(130, 200, dtype=dtype))
    x = randn(400, 200, dtype=dtype)
    whole = linear(x, packed)
    for rows in (1, 2, 3, 14, 15, 100, 256):
        assert torch.equal(linear(x[7 : 7 + rows], packed), whole[7 : 7 + rows])


def test_a_bad_row_does_not_spoil_the_others(dtype, randn):
    packed = pack(randn(64, 64, dtype=dtype))
    x = randn(20, 64, dtype=dtype)
    x[3] = float("nan")
    finite = torch.isfinite(linear(x, packed)).all(1)
    assert finite.tolist() == [row != 3 for row in range(20)]


def test_silu_and_mul_on_the_way_in(dtype, threads, randn, close):
    packed = pack(weight := randn(70, 50, dtype=dtype))
    for rows in (1, 6, 33, 260):
        gate_up = randn(rows, 100, dtype=dtype)
        gate, up = gate_up.double().chunk(2, dim=1)
        hidden = (torch.nn.functional.silu(gate) * up).to(dtype)
        close(silu_and_mul_linear(gate_up, packed), exact(hidden, weight), ulps=40)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_embedding_reads_the_rows(dtype, ids_dtype, randn):
    weight = randn(77, 45, dtype=dtype)
    packed = pack(weight)
    ids = torch.tensor([0, 76, 31, 32, 5, 5], dtype=ids_dtype)
    assert torch.equal(embedding(ids, packed), weight[ids.long()])
    assert torch.equal(embedding_reference(ids, weight), weight[ids.long()])
    assert torch.equal(packed.weight(), weight)


def test_embedding_refuses_unknown_ids(randn):
    packed = pack(randn(10, 8))
    for bad in (-1, 10):
        if cpu.library() is not None:
            with pytest.raises(IndexError, match=r"ids"):
                embedding(torch.tensor([1, bad]), packed)


def test_packed_weights_are_the_only_copy(dtype, randn):
    packed = pack(randn(576, 576, dtype=dtype), randn(576))
    assert packed.nbytes == 576 * 576 * dtype.itemsize + 576 * 4


def test_nothing_to_do(dtype, randn):
    assert linear(randn(0, 8, dtype=dtype), pack(randn(16, 8, dtype=dtype))).shape == (0, 16)


def test_errors_name_the_argument(randn):
    packed = pack(randn(16, 8))
    with pytest.raises(ValueError, match=r"^x must"):
        linear(randn(2, 9), packed)
    with pytest.raises(ValueError, match=r"^x must"):
        linear(randn(2, 8, dtype=torch.bfloat16), packed)
    with pytest.raises(ValueError, match=r"^gate_up must"):
        silu_and_mul_linear(randn(2, 8), packed)
    with pytest.raises(ValueError, match=r"^out must"):
        linear(randn(2, 8), packed, out=randn(3, 16))
    with pytest.raises(ValueError, match=r"^weight must"):
        pack(randn(4, 4).half())
    with pytest.raises(ValueError, match=r"^bias must"):
        pack(randn(4, 4), randn(5))
    with pytest.raises(ValueError, match=r"^out_dtype must"):
        pack(randn(4, 4), out_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^ids must"):
        embedding(torch.zeros(2, 2, dtype=torch.int64), packed)
