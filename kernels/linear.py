"""Linear layers over packed weights, and the embedding that reads rows out of the same packing."""

import ctypes

import torch

from kernels import activation
from kernels.checks import FLOATS, output, require
from kernels.cpu.functions import fields, function, i32, i64, ptr
from kernels.cpu.memory import empty

_c_columns = function("pagoda_linear_columns", result=i32)
_c_pack = function("pagoda_linear_pack", ptr, ptr, i64)
_c_linear = function("pagoda_linear_run", ptr, ptr, i64, i32, ptr, i64, i64)
_c_gather = function("pagoda_linear_gather", ptr, ptr, i64, ptr, result=i32)


class _Descriptor(ctypes.Structure):
    """`pagoda_linear` of cpu/linear.h."""

    _fields_ = fields((ptr, "panels bias"), (i64, "n k"), (i32, "bf16 out_bf16"))


class PackedLinear:
    """A weight matrix [N, K] and a bias in the form that `linear` reads; made by `pack`.

    Attributes:
        out_features: N.
        in_features: K.
        dtype: type of the weights and of the inputs.
        out_dtype: type of the results.
        data: the only copy of the weights: packed panels, or the plain matrix where there is no C library.
        bias: [N] float32 or None.
        bias_like_out: the same in `out_dtype`, as cuBLAS wants it; None where the panels are packed.
        address: of the C descriptor; 0 where there is no C library.
    """

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, out_dtype: torch.dtype, data: torch.Tensor,
        bias: torch.Tensor | None, is_packed: bool,
    ) -> None:  # fmt: skip
        self.out_features, self.in_features = shape
        self.dtype = dtype
        self.out_dtype = out_dtype
        self.data = data
        self.bias = bias
        self.bias_like_out = None if bias is None or is_packed else bias.to(out_dtype)
        self._descriptor = _Descriptor(
            data.data_ptr(), None if bias is None else bias.data_ptr(), *shape, dtype is torch.bfloat16,
            out_dtype is torch.bfloat16,
        )  # fmt: skip
        self.address = ctypes.addressof(self._descriptor) if is_packed else 0

    @property
    def nbytes(self) -> int:
        """Bytes that the weights and the bias occupy."""
        return self.data.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def weight(self) -> torch.Tensor:
        """A plain copy of the weights, [N, K]."""
        return embedding(torch.arange(self.out_features, device=self.data.device), self)


def pack(
    weight: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> PackedLinear:
    """Packs a weight matrix for `linear`; the caller may then drop its own copy.

    Args:
        weight: [N, K], float32 or bfloat16, unit stride in the last dim.
        bias: [N] of any float type, or None; kept as float32.
        out_dtype: float32 or bfloat16; the weight's type when None. float32 is for logits.

    Raises:
        ValueError: a shape, type or stride is wrong; the message names the argument.
    """
    if weight.dim() != 2 or weight.dtype not in FLOATS or weight.stride(1) != 1:
        raise ValueError(f"weight must be float32 or bfloat16 [N, K], not {weight.dtype}, {weight.shape}")
    out_dtype = weight.dtype if out_dtype is None else out_dtype
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype must be float32 or bfloat16, not {out_dtype}")
    n, k = weight.shape
    if bias is not None:
        if bias.shape != (n,):
            raise ValueError(f"bias must be [{n}], not {tuple(bias.shape)}")
        bias = bias.to(torch.float32, copy=True).contiguous()
    if not weight.is_cpu or (c := _c_pack()) is None:
        return PackedLinear((n, k), weight.dtype, out_dtype, weight.contiguous(), bias, is_packed=False)
    columns = _c_columns()()
    words = k if weight.dtype is torch.float32 else -(-k // 2)
    data = empty((-(-n // columns) * columns * words,), torch.float32)
    packed = PackedLinear((n, k), weight.dtype, out_dtype, data, bias, is_packed=True)
    c(packed.address, weight.data_ptr(), weight.stride(0))
    return packed


def linear(x: torch.Tensor, packed: PackedLinear, out: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias, summed in float32, on the CPU in an order that does not depend on the number of rows.

    Args:
        x: [T, K], the type of the weights, unit stride in the last dim.
        packed: the weights.
        out: [T, N] of the weights' out_dtype, unit stride in the last dim, written and returned. A new tensor
            when None.

    Raises:
        ValueError: a shape, type or stride is wrong; the message names the argument.
    """
    return _run(x, packed, out, silu_and_mul=False)


def silu_and_mul_linear(
    gate_up: torch.Tensor, packed: PackedLinear, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`linear(silu_and_mul(gate_up), packed)` in one pass: a feed-forward block's down projection.

    Args:
        gate_up: [T, 2 K], the type of the weights: gates, then ups.
        packed: the weights.
        out: as in `linear`.

    Raises:
        ValueError: a shape, type or stride is wrong; the message names the argument.
    """
    return _run(gate_up, packed, out, silu_and_mul=True)


def _run(x: torch.Tensor, packed: PackedLinear, out: torch.Tensor | None, silu_and_mul: bool) -> torch.Tensor:
    rows = x.shape[0]
    name, width = ("gate_up", 2 * packed.in_features) if silu_and_mul else ("x", packed.in_features)
    require(name, x, packed.dtype, (rows, width), (1,))
    out = output(out, packed.out_dtype, (rows, packed.out_features), (1,), x.device)
    if packed.address:
        c = _c_linear()
        c(packed.address, x.data_ptr(), x.stride(0), silu_and_mul, out.data_ptr(), out.stride(0), rows)
        return out
    if silu_and_mul:
        x = activation.silu_and_mul(x)
    if x.is_cuda:
        from kernels.cuda import linear as cuda

        return cuda.linear(x, packed, out)
    return linear_reference(x, packed.data, packed.bias, packed.out_dtype, out)


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`linear` in plain torch over plain weights [N, K], on any device."""
    out_dtype = weight.dtype if out_dtype is None else out_dtype
    if out_dtype is torch.float32 and weight.dtype is torch.bfloat16:
        result = x.float() @ weight.float().t()
    else:
        result = torch.nn.functional.linear(x, weight)
    if bias is not None:
        result = result + bias
    return result.to(out_dtype) if out is None else out.copy_(result)


def embedding(ids: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """Rows `ids` of the packed matrix, [T, K], in the weights' type: the input side of tied embeddings.

    Args:
        ids: [T] int32 or int64.
        packed: the weights.

    Raises:
        ValueError: ids is not one-dimensional or of another type.
        IndexError: an id is outside [0, N). Not on CUDA, where nobody waits for the answer.
    """
    if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64 [T], not {ids.dtype} {tuple(ids.shape)}")
    if packed.data.is_cuda:
        return torch.index_select(packed.data, 0, ids)
    if not packed.address:
        return embedding_reference(ids, packed.data)
    ids = ids.to(torch.int64).contiguous()
    out = torch.empty((ids.shape[0], packed.in_features), dtype=packed.dtype)
    if _c_gather()(packed.address, ids.data_ptr(), ids.shape[0], out.data_ptr()):
        raise IndexError(f"ids must lie in [0, {packed.out_features})")
    return out


def embedding_reference(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`embedding` in plain torch over plain weights [N, K], on any device."""
    return weight[ids.long()]
