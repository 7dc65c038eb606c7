"""A decoder layer's Triton kernels: on the GPU where there is one, else float32 in Triton's interpreter."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from tests.support.scale import scaled
from tests.support.triton import ARCHS, SHARED_BYTES, compile_for, device, interpreted

pytest.importorskip("triton")
from kernels.attention import Tiles, cache_shape, make_tiles
from kernels.cuda import activation, layer, linear, norm, rope
from kernels.cuda.device import Traits
from kernels.cuda.linear import Normed, Rotation, Tile
from kernels.layer import Layer, LayerStack, Step
from kernels.linear import PackedLinear

DEVICE = device()
DTYPES = [torch.float32] if interpreted() else [torch.float32, torch.bfloat16]
EPS = 1e-5
# (rows, N, K), and how to cut it: whole tiles, ragged ones, one row, more tiles than columns to split.
PRODUCTS = [
    ((3, 64, 96), Tile(32, 32, 3)),
    ((1, 56, 80), Tile(16, 32, 2, split=2)),
    ((17, 40, 72), Tile(16, 64, 2, split=3)),
    ((5, 96, 64), Tile(64, 32, 2, swap=True)),
    ((16, 72, 200), Tile(64, 64, 2, split=2, swap=True)),
]
PRODUCT_IDS = [f"{shape}-{tile.rows}x{tile.depth}x{tile.split}-{tile.swap}" for shape, tile in PRODUCTS]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def data(generator, dtype):
    """Normal numbers on the device, times a scale."""
    return lambda *shape, scale=1.0: (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def plain(weight, bias=None):
    """Packed as on CUDA: the plain matrix."""
    bias = None if bias is None else bias.float()
    return PackedLinear(tuple(weight.shape), weight.dtype, weight.dtype, weight, bias, is_packed=False)


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def check(result, exact, ulps=60.0):
    """Within rounding; bfloat16 may also have rounded an intermediate or two."""
    assert torch.isfinite(result).all()
    limit = ulps * torch.finfo(torch.float32).eps if result.dtype is torch.float32 else 0.03
    scale = exact.abs().clamp(min=exact.abs().mean())
    assert ((result.double() - exact).abs() / scale).max() <= limit


def rms(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def normed_input(x, weight, parts=3):
    """`Normed` of x, whose squares lie in several parts; what is beyond those that count is poison."""
    squares = poisoned(parts + 1, linear.padded_rows(x.shape[0]), dtype=torch.float32)
    squares[:parts] = 0
    pieces = x.float().pow(2).tensor_split(parts, dim=1)
    for part, piece in enumerate(pieces):
        squares[part, : x.shape[0]] = piece.sum(1)
    return Normed((x.float() * weight.float()).to(x.dtype), squares, parts, EPS)


def product_inputs(data, shape, bias=True):
    rows, n, k = shape
    return data(rows, k), plain(data(n, k, scale=k**-0.5), data(n) if bias else None)


def exact_product(x, packed):
    result = x.double() @ packed.data.double().t()
    return result if packed.bias is None else result + packed.bias.double()


def arrivals_are_cleared():
    return not linear.workspace(torch.empty(0, device=DEVICE).device)[1].any()


@pytest.mark.parametrize(("shape", "tile"), PRODUCTS, ids=PRODUCT_IDS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear(shape, tile, bias, data, dtype):
    x, packed = product_inputs(data, shape, bias)
    out = poisoned(shape[0], shape[1] + 8, dtype=dtype)
    linear.skinny_linear(x, packed, out[:, : shape[1]], tile)
    check(out[:, : shape[1]], exact_product(x, packed))
    assert out[:, shape[1] :].isnan().all() and arrivals_are_cleared()


@pytest.mark.parametrize(("shape", "tile"), PRODUCTS, ids=PRODUCT_IDS)
def test_linear_of_a_norm(shape, tile, data, dtype):
    x, packed = product_inputs(data, shape)
    weight = data(shape[2])
    out = poisoned(*shape[:2], dtype=dtype)
    linear.skinny_linear(normed_input(x, weight), packed, out, tile)
    check(out, exact_product(rms(x.double(), weight), packed))


def test_logits_are_float32(data, dtype):
    x, packed = product_inputs(data, (4, 48, 64), bias=False)
    out = poisoned(4, 48, dtype=torch.float32)
    linear.skinny_linear(x, packed, out, Tile(16, 32, 2))
    check(out, exact_product(x, packed))


@pytest.mark.parametrize(("shape", "tile"), PRODUCTS, ids=PRODUCT_IDS)
def test_residual(shape, tile, data, dtype):
    (x, packed), weight = product_inputs(data, shape), data(shape[1])
    hidden = data(*shape[:2])
    exact = hidden.double() + exact_product(x, packed)
    squares = poisoned(9, linear.padded_rows(shape[0]), dtype=torch.float32)
    normed = Normed(poisoned(*shape[:2], dtype=dtype), squares, 0, EPS)
    normed = linear.residual_linear(x, packed, hidden, weight, normed, tile)
    check(hidden, exact)
    check(normed.scaled, hidden.double() * weight.double())
    check(squares[: normed.parts].sum(0)[: shape[0]], hidden.double().pow(2).sum(1))
    assert arrivals_are_cleared()


@pytest.mark.parametrize(("shape", "tile"), PRODUCTS, ids=PRODUCT_IDS)
def test_gated(shape, tile, data, dtype):
    (x, packed), weight = product_inputs(data, shape), data(shape[2])
    out = poisoned(shape[0], shape[1] // 2, dtype=dtype)
    linear.gated_linear(normed_input(x, weight), packed, out, tile)
    gate, up = exact_product(rms(x.double(), weight), packed).chunk(2, dim=1)
    check(out, silu(gate) * up, ulps=200)


def rotated(x, cos_sin, positions):
    """x: [T, heads, D] float64."""
    cos, sin = cos_sin[positions.long()].double().unsqueeze(1).chunk(2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rotations(max_len, dim):
    angles = torch.outer(torch.arange(max_len), 100.0 ** -(torch.arange(0, dim, 2) / dim))
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(DEVICE)


def heads_and_slots(rows, dim, dtype):
    """Caches of poison of 2 kv heads and blocks of 16, positions, and slots, one of which is none."""
    shapes = cache_shape(4, 2, 16, dim, dtype, "cuda")
    caches = [poisoned(*shape, dtype=dtype) for shape in shapes]
    positions = torch.arange(rows, dtype=torch.int32, device=DEVICE) * 3 % 32
    slots = torch.arange(rows, device=DEVICE) * 7 % 64
    slots[rows // 2] = -1
    return caches, positions, slots


def check_written(caches, slots, k, v):
    """k and v, [T, 2, D], are where `slots` say, and nothing is elsewhere."""
    for cache, x in zip(caches, (k, v), strict=True):
        flat = cache.view(4, 2, 16, -1).transpose(1, 2).flatten(0, 1).clone()
        written = slots >= 0
        check(flat[slots[written]], x[written].double(), ulps=200)
        flat[slots[written]] = float("nan")
        assert flat.isnan().all()


@pytest.mark.parametrize(
    ("dim", "tile"), [(16, Tile(32, 32, 2)), (48, Tile(32, 32, 2, split=2)), (64, Tile(64, 64, 2, swap=True))]
)
@pytest.mark.parametrize("rows", [2, 9])
def test_rotated(dim, tile, rows, data, dtype):
    heads = 3
    (x, packed), weight = product_inputs(data, (rows, (heads + 4) * dim, 80)), data(80)
    caches, positions, slots = heads_and_slots(rows, dim, dtype)
    cos_sin, out = rotations(32, dim), poisoned(rows, (heads + 4) * dim, dtype=dtype)
    rotation = Rotation(cos_sin, positions, slots, *caches, heads)
    linear.rotated_linear(normed_input(x, weight), packed, rotation, out, tile)
    exact = exact_product(rms(x.double(), weight), packed).unflatten(1, (-1, dim))
    exact[:, : heads + 2] = rotated(exact[:, : heads + 2], cos_sin, positions)
    check(out, exact.flatten(1), ulps=400)
    _, k, v = out.unflatten(1, (-1, dim)).split([heads, 2, 2], dim=1)
    check_written(caches, slots, k, v)


@pytest.mark.parametrize(("heads", "dim"), [(3, 16), (20, 48)])
def test_rope_and_cache(heads, dim, data, dtype):
    caches, positions, slots = heads_and_slots(5, dim, dtype)
    fused = poisoned(5, heads + 5, dim, dtype=dtype)
    fused[:, :-1] = data(5, heads + 4, dim)
    before, cos_sin = fused.double(), rotations(32, dim)
    q, k, v, rest = fused.split([heads, 2, 2, 1], dim=1)
    rope.rope_and_cache(q, k, v, cos_sin, positions, *caches, slots)
    turned = rotated(before[:, : heads + 2], cos_sin, positions)
    check(torch.cat((q, k), dim=1), turned)
    assert torch.equal(v.double(), before[:, heads + 2 : heads + 4]) and rest.isnan().all()
    check_written(caches, slots, k, v)


@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(with_residual, data, dtype):
    x, weight, residual = data(3, 50), data(50), data(3, 50)
    wide = poisoned(3, 70, dtype=dtype)
    wide[:, 8:58] = x
    out, total = poisoned(3, 50, dtype=dtype), x.double() + residual.double() if with_residual else x.double()
    norm.rms_norm(wide[:, 8:58], weight, EPS, residual if with_residual else None, out)
    check(out, rms(total, weight))
    if with_residual:
        check(residual, total)


def test_head_rms_norm_in_place(data, dtype):
    fused, weight = data(3, 7, 20), data(20)
    before = fused.clone()
    norm.rms_norm(fused[:, 1:4], weight, EPS, None, fused[:, 1:4])
    check(fused[:, 1:4], rms(before[:, 1:4].double(), weight))
    assert torch.equal(fused[:, 4:], before[:, 4:]) and torch.equal(fused[:, 0], before[:, 0])


def test_silu_and_mul(data, dtype):
    gate_up, out = data(3, 4200), poisoned(3, 2100, dtype=dtype)
    activation.silu_and_mul(gate_up, out)
    gate, up = gate_up.double().chunk(2, dim=1)
    check(out, silu(gate) * up)


HIDDEN, INNER, HEADS, KV_HEADS, DIM, BLOCK = 48, 80, 6, 2, 16, 16


def make_layer(data, dtype, kind):
    def matrix(n, k, bias=False):
        return plain(data(n, k, scale=k**-0.5), data(n) if bias else None)

    caches = [poisoned(*s, dtype=dtype) for s in cache_shape(6, KV_HEADS, BLOCK, DIM, dtype, "cuda")]
    width = (HEADS + 2 * KV_HEADS) * DIM
    norms = {"q_norm": data(DIM), "k_norm": data(DIM)} if kind == "qwen3" else {}
    return Layer(
        data(HIDDEN), matrix(width, HIDDEN, bias=True), matrix(HIDDEN, HEADS * DIM, bias=kind == "biases"),
        data(HIDDEN), matrix(2 * INNER, HIDDEN, bias=kind == "biases"),
        matrix(HIDDEN, INNER, bias=kind == "biases"), *caches, HEADS, EPS, DIM**-0.5,
        sliding_window=5 if kind == "window" else None, **norms,
    )  # fmt: skip


def make_step(starts, lengths):
    """Rows at positions `starts` with so many tokens, in slots 2 and 0 of 3, then a padding token."""
    tables = torch.tensor([[4, 0], [9999, 9999], [3, 1]], dtype=torch.int32)
    slots_of_rows, positions, slots = torch.tensor([2, 0]), [], []
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        at = torch.arange(start, start + length)
        positions.append(at)
        slots.append(tables[slots_of_rows[row], at // BLOCK] * BLOCK + at % BLOCK)
    paged, fresh = (torch.from_numpy(t).to(DEVICE) for t in make_tiles(lengths, starts))
    tensors = {
        "cos_sin": rotations(32, DIM),
        "positions": torch.cat([*positions, torch.tensor([0])]).int(),
        "slot_mapping": torch.cat([*slots, torch.tensor([-1])]).long(),
        "block_tables": tables,
        "query_start": torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32),
        "seq_lens": torch.tensor([s + n for s, n in zip(starts, lengths, strict=True)], dtype=torch.int32),
        "table_rows": slots_of_rows,
    }
    return Step(**{name: x.to(DEVICE) for name, x in tensors.items()}, tiles=Tiles(paged, fresh))


def exact_states(layers, x):
    """What a whole sequence's embeddings, [n, H] float64, have become before the final norm."""
    n, cos_sin = x.shape[0], rotations(32, DIM)
    position = torch.arange(n, device=x.device)
    distance = position[:, None] - position[None, :]
    for one in layers:
        qkv = exact_product(rms(x, one.input_norm), one.qkv).unflatten(1, (-1, DIM))
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        if one.q_norm is not None:
            q, k = rms(q, one.q_norm), rms(k, one.k_norm)
        q, k = rotated(q, cos_sin, position), rotated(k, cos_sin, position)
        seen = (distance >= 0) & (distance < (one.sliding_window or n))
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        attended = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        x = x + exact_product(attended.transpose(0, 1).flatten(1), one.o)
        gate, up = exact_product(rms(x, one.post_norm), one.gate_up).chunk(2, dim=1)
        x = x + exact_product(silu(gate) * up, one.down)
    return x


@pytest.mark.parametrize("kind", ["plain", "biases", "qwen3", "window"])
@pytest.mark.parametrize("path", ["skinny", "wide"])
@pytest.mark.parametrize("times", [0, 1, 40], ids=["all", "wanted", "wanted by forks"])
def test_a_stack(times, path, kind, data, dtype, monkeypatch):
    """Two sequences: prompts, a chunk of one while the other decodes, then both decode."""
    monkeypatch.setattr(layer, "forward", getattr(layer, f"forward_{path}"))
    layers = [make_layer(data, dtype, kind) for _ in range(2)]
    stack = LayerStack(layers)
    inputs = [data(25, HIDDEN), data(20, HIDDEN)]
    exact = [exact_states(layers, x.double()) for x in inputs]
    places = [0, 0]
    for lengths in ([19, 1], [5, 1], [1, 1]):
        step = make_step(places, lengths)
        pieces = [x[p : p + n] for x, p, n in zip(inputs, places, lengths, strict=True)]
        hidden = torch.cat([*pieces, data(1, HIDDEN)]).float()
        expected = torch.cat([x[p : p + n] for x, p, n in zip(exact, places, lengths, strict=True)])
        if times:  # the last token of each row
            step = replace(step, wanted=(step.query_start[1:].long() - 1).repeat(times))
            expected = expected[step.wanted]
        step.check(hidden.shape[0], DIM)
        # The interpreter has no CUDA tensors to be dispatched by.
        parts = layer.forward(layers, hidden, step) if interpreted() else stack.forward(hidden, step)
        state = sum(part.double() for part in parts)[: len(expected)]
        assert len(parts[0]) == len(parts[1]) == len(expected) + (not times)
        error = (state - expected).abs().max() / expected.abs().max()
        assert error <= (2e-5 if dtype is torch.float32 else 0.03)
        places = [p + n for p, n in zip(places, lengths, strict=True)]


@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=["same", "float32"])
def test_linear_of_many_rows(out_dtype, data, dtype):
    x, packed = product_inputs(data, (70, 48, 64), bias=out_dtype is None)
    out = linear.linear(x, packed, poisoned(70, 48, dtype=out_dtype or dtype))
    check(out, exact_product(x, packed))


# -- compiled for every card, at the sizes that are served ---------------------------------------------------

MODELS = {  # hidden, query heads, kv heads, head size, intermediate, vocabulary
    "7b": (3584, 28, 4, 128, 18944, 152064),
    "0.5b": (896, 14, 2, 64, 4864, 151936),
    "135m": (576, 9, 3, 64, 1536, 49152),
}


def record(monkeypatch, arch):
    """Notes launches instead of making them, as on a card of that compute capability."""
    calls = []

    def launch(kernel, grid, *arguments, overlaps=False, **options):
        calls.append((kernel, arguments, options | ({"launch_pdl": True} if overlaps else {})))

    traits = Traits(arch, 132, SHARED_BYTES[arch])
    for module in (linear, norm, rope, activation):
        monkeypatch.setattr(module, "launch", launch)
        monkeypatch.setattr(module, "traits", lambda _: traits, raising=False)
    monkeypatch.setattr(layer, "paged_attention", lambda *_, **__: None)
    # The library's products launch nothing of ours, and torch 2.11 gets them wrong for tensors of no device.
    monkeypatch.setattr(torch, "addmm", lambda *_, out, **__: out)
    linear.choose_tile.cache_clear()
    return calls


def run_layer(model, rows, forward, dtype):
    """A forward of one layer and logits, on tensors that are not there."""
    hidden, heads, kv_heads, dim, inner, vocab = MODELS[model]

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def matrix(n, k, bias=None):
        return PackedLinear((n, k), dtype, dtype, empty(n, k), bias, is_packed=False)

    width = (heads + 2 * kv_heads) * dim
    caches = [empty(*s) for s in cache_shape(8, kv_heads, 16, dim, dtype, "cuda")]
    one = Layer(
        empty(hidden), matrix(width, hidden, empty(width, dtype=torch.float32)), matrix(hidden, heads * dim),
        empty(hidden), matrix(2 * inner, hidden), matrix(hidden, inner), *caches, heads, EPS, 1.0,
    )  # fmt: skip
    i32 = torch.int32
    step = Step(
        empty(99, dim, dtype=torch.float32), empty(rows, dtype=i32), empty(rows, dtype=torch.int64),
        empty(rows, 9, dtype=i32), empty(rows + 1, dtype=i32), empty(rows, dtype=i32),
    )  # fmt: skip
    x = empty(rows, hidden, dtype=torch.float32)
    forward([one, one], x, step)
    norm.rms_norm(x, one.input_norm, EPS, x, empty(rows, hidden))
    x = empty(rows, hidden)
    if forward is layer.forward_skinny:
        linear.skinny_linear(x, matrix(vocab, hidden), empty(rows, vocab, dtype=torch.float32))


def compile_call(kernel, arguments, options, arch):
    """Compiles as a launch with these arguments would."""
    names = list(inspect.signature(kernel.fn).parameters)
    values = dict(zip(names, arguments, strict=False))
    constexprs = {n: v for n, v in values.items() if v is None} | {
        n: options.pop(n) for n in list(options) if n in names
    }
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}
    signature = {
        n: types[v.dtype] if isinstance(v, torch.Tensor) else "fp32" if isinstance(v, float) else "i32"
        for n, v in values.items()
        if v is not None
    }
    free = ("M", "count")
    divisible = [n for n, v in values.items() if isinstance(v, int) and v % 16 == 0 and n not in free]
    return compile_for(kernel, arch, signature, constexprs, options, divisible)


KERNELS = {  # that run_layer launches, each in some of SERVED
    "linear_kernel", "residual_kernel", "gated_kernel", "rotated_kernel",
    "scale_and_square_kernel", "rms_norm_kernel", "rope_and_cache_kernel", "silu_and_mul_kernel",
}  # fmt: skip
SERVED = [
    ("7b", 64, layer.forward_skinny, torch.bfloat16), ("7b", 100, layer.forward_wide, torch.bfloat16),
    *scaled([], [
        ("7b", 1, layer.forward_skinny, torch.bfloat16), ("0.5b", 20, layer.forward_skinny, torch.bfloat16),
        ("135m", 64, layer.forward_skinny, torch.bfloat16), ("135m", 100, layer.forward_wide, torch.float32),
    ]),
]  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_as_served(arch, monkeypatch):
    calls = record(monkeypatch, arch)
    for case in SERVED:
        run_layer(*case)
    linear.choose_tile.cache_clear()
    assert {kernel.fn.__name__ for kernel, *_ in calls} == KERNELS
    seen = {}
    for kernel, arguments, options in calls:
        kinds = [getattr(a, "dtype", a is None) for a in arguments if not isinstance(a, int | float)]
        seen.setdefault((kernel.fn.__name__, str(kinds), str(options)), (kernel, arguments, options))
    for kernel, arguments, options in seen.values():
        compiled = compile_call(kernel, arguments, dict(options), arch)
        assert compiled.spilled == 0, f"{compiled.name} spills {compiled.spilled} bytes with {options}"
