"""Tensors carried from files to a device: in place, converted there, whatever the pieces; errors named."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gpu_worker.models import stream
from gpu_worker.models.config import ModelError, read_config
from gpu_worker.models.layers import LayerLoader
from gpu_worker.models.loader import (
    DummyWeights,
    Progress,
    StoredWeights,
    open_model,
    safetensors_index,
)

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def numbers() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {str(d): torch.randn(123, 57, generator=generator).to(d) for d in FLOATS}


@pytest.fixture
def file(numbers, tmp_path) -> Path:
    save_file(numbers, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def source(file: Path, **kwargs) -> StoredWeights:
    return StoredWeights(file.parent, safetensors_index([file]), False, **kwargs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("piece", [64, 1000, stream.PIECE_BYTES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_type_arrives_in_its_place(file, numbers, monkeypatch, device, piece, dtype):
    monkeypatch.setattr(stream, "PIECE_BYTES", piece)
    stacked = torch.full((len(numbers) * 123 + 2, 57), 7.0, dtype=dtype, device=device)
    parts = stacked[1:-1].split(123)
    weights = source(file)
    for name, part in zip(numbers, parts, strict=True):
        weights.fill(name, part)
    weights.finish()
    for (name, expected), part in zip(numbers.items(), parts, strict=True):
        assert torch.equal(part.cpu(), expected.to(dtype)), name
    assert (stacked[[0, -1]] == 7).all(), "nothing beside it was touched"


def test_a_file_that_shrinks_meanwhile_is_named(file, numbers):
    """Opening checks a file's size, so a piece that is missing later was cut off since."""
    weights = source(file)
    file.write_bytes(file.read_bytes()[:-5000])
    out = {name: torch.empty(123, 57) for name in numbers}
    with pytest.raises(ModelError, match=r"model\.safetensors: tensor torch\.\w+ cannot be read: .* early"):
        for name in numbers:
            weights.fill(name, out[name])
        weights.finish()
    assert not [t for t in threading.enumerate() if t.name.startswith("weights-")]


def test_a_file_that_has_gone_is_named(file, numbers):
    weights = source(file)
    file.unlink()
    with pytest.raises(ModelError, match=r"tensor torch\.float32 cannot be read"):
        weights.fill("torch.float32", torch.empty(123, 57))


def test_what_a_thread_lacks_is_told(file, numbers, monkeypatch):
    """As when there is no page-locked memory: waiting for ever, or serving zeros, would be worse."""
    monkeypatch.setattr(stream, "_Lane", lambda device: torch.empty(-1))
    weights = source(file)
    for name in numbers:
        weights.fill(name, torch.empty(123, 57))
    with pytest.raises(ModelError, match="cannot be read"):
        weights.finish()


def test_mistakes_are_named_and_end_the_threads(file):
    for mistake, match in (
        (lambda w: w.fill("torch.float32", torch.empty(57, 123)), r"\[123, 57\], the config asks for \[57"),
        (lambda w: w.fill("torch.int8", torch.empty(123, 57)), "torch.int8 is missing"),
        (lambda w: w.finish(), r"has no place in this architecture \(and 2 more\)"),
    ):
        weights = source(file)
        weights.fill("torch.bfloat16", torch.empty(123, 57))
        with pytest.raises(ModelError, match=match):
            mistake(weights)
        assert not [t for t in threading.enumerate() if t.name.startswith("weights-")]


def test_tensors_that_the_host_computes():
    values = torch.randn(5, 3)
    out, arrived = torch.empty(5, 3, dtype=torch.bfloat16), []
    streamer = stream.Streamer(torch.device("cpu"), arrived.append, threads=2)
    streamer.fill_from("x", lambda: values, 44, out)
    streamer.finish()
    assert torch.equal(out, values.bfloat16()) and arrived == [44]


def test_progress_is_told_now_and_then():
    times, heard = iter((0.0, 0.5, 1.9, 2.0, 3.9, 4.1, 9.0)), []
    progress = Progress(100, lambda *a: heard.append(a), every=2.0, clock=lambda: next(times))
    for _ in range(6):
        progress.add(10)
    assert heard == [(30, 100), (50, 100), (60, 100)]


def test_loading_reports_every_byte(file, numbers, monkeypatch):
    monkeypatch.setattr("gpu_worker.models.loader.REPORT_SECONDS", 0.0)
    monkeypatch.setattr(stream, "PIECE_BYTES", 4096)
    heard: list[tuple[int, int]] = []
    weights = source(file, report=lambda *a: heard.append(a))
    for name in ("torch.float32", "torch.bfloat16"):
        weights.fill(name, torch.empty(123, 57))
    for name in ("torch.float16", "torch.float64"):
        weights.take(name, (123, 57))
    weights.finish()
    total = sum(t.nbytes for t in numbers.values())
    assert max(heard) == (total, total) and len(heard) > 10


@pytest.mark.parametrize("device", DEVICES)
def test_random_weights_are_drawn_in_place(tiny, device):
    """The same for the same name and seed, whatever the order; with the config's deviation."""
    config = read_config(tiny("llama")[1])

    def drawn(name: str, seed: int, dtype=torch.bfloat16) -> torch.Tensor:
        out = torch.zeros(300, 200, dtype=dtype, device=device)
        DummyWeights(config, seed).fill(name, out[:200])
        assert not out[200:].any()
        return out[:200]

    assert torch.equal(drawn("a", 1), drawn("a", 1))
    assert not torch.equal(drawn("a", 1), drawn("b", 1))
    assert not torch.equal(drawn("a", 1), drawn("a", 2))
    assert abs(drawn("a", 1, torch.float32).std() / config.initializer_range - 1) < 0.02


@pytest.mark.skipif(len(DEVICES) == 1, reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen2"])
def test_a_device_gets_the_layers_that_the_cpu_gets(tiny, kind):
    files = open_model(tiny(kind)[1], "auto", 0)
    loaded = {}
    for device in DEVICES:
        weights = files.weights()
        load = LayerLoader(files.config, weights, torch.float32, torch.device(device))
        layers = [load.layer(i, (torch.empty(0), torch.empty(0))) for i in range(files.config.num_layers)]
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in weights._left:
                load.matrix(name, files.config.vocab_size, files.config.hidden_size, 199)
        load.tensor("model.norm.weight", files.config.hidden_size)
        weights.finish()
        loaded[device] = layers
    for on_cpu, on_gpu in zip(loaded["cpu"], loaded["cuda"], strict=True):
        for name in ("qkv", "o", "gate_up", "down"):
            a, b = getattr(on_cpu, name), getattr(on_gpu, name)
            assert torch.equal(a.weight(), b.data.cpu())
            assert (a.bias is None) == (b.bias is None)
            assert a.bias is None or torch.equal(a.bias, b.bias.cpu())


class Asked:
    """A source that notes which shapes it is to fill."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}

    def fill(self, name: str, out: torch.Tensor) -> None:
        self.shapes[name] = tuple(out.shape)


def test_a_vocabulary_has_whole_tiles_on_a_device_and_only_its_own_ids_on_a_cpu(tiny):
    files = open_model(tiny("llama")[1], "dummy", 0)
    asked = Asked()
    load = LayerLoader(files.config, asked, torch.bfloat16, torch.device("meta"))
    assert load.matrix("lm_head.weight", 32_001, 64, keep=31_999).out_features == 32_064
    assert asked.shapes == {"lm_head.weight": (32_001, 64)}
    config = files.config
    load = LayerLoader(config, files.weights(), torch.bfloat16, torch.device("cpu"))
    rows = config.vocab_size
    assert load.matrix("lm_head.weight", rows, config.hidden_size, keep=rows - 5).out_features == rows - 5
