"""A rank reads its part of a checkpoint, and nothing else where the file's layout allows it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gpu_worker.models import stream
from gpu_worker.models.config import ModelError, read_config
from gpu_worker.models.loader import StoredWeights, WeightSource, open_model
from gpu_worker.models.shard import Shard
from tests.support.qwen1 import as_qwen1, qwen2_twin
from tests.unit.worker.harness import SHAPE, VOCAB
from tests.unit.worker.test_gguf import write_gguf

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# 3 KV heads on 2 and 4 ranks, and on 6 (two ranks a head, three queries): uneven, padded and replicated.
CHANGES = {
    **{"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
    **{"attention_bias": True, "mlp_bias": True},
}


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | CHANGES))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp(request.param)
    model.to(getattr(torch, request.param)).save_pretrained(folder)
    return folder


def opened(folder: Path, shard: Shard | None, load_format: str = "auto") -> WeightSource:
    weights = open_model(folder, load_format, 3).weights()
    if shard is not None:
        weights.split(shard)
    return weights


def taken(weights: WeightSource, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    tensors = {name: weights.take(name, shape) for name, shape in shapes.items()}
    weights.finish()
    return tensors


def filled(
    weights: WeightSource, shapes: dict[str, tuple[int, ...]], device: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    tensors = {name: torch.full(shape, 7.0, dtype=dtype, device=device) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        weights.fill(name, tensor)
    weights.finish()
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def expected_parts(shard: Shard, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor of a model cut in memory."""
    parts = ((name, tensor, shard.part(name)) for name, tensor in whole.items())
    return {name: part.cut(tensor) if part else tensor for name, tensor, part in parts}


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("size", [2, 4, 6])
def test_a_part_that_is_taken_is_the_whole_tensors(checkpoint: Path, size: int) -> None:
    for rank in range(size):
        shard = Shard.of(read_config(checkpoint), rank, size)
        expected = expected_parts(shard, load_file(checkpoint / "model.safetensors"))
        found = taken(opened(checkpoint, shard), shapes_of(expected))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("piece", [1000, stream.PIECE_BYTES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_that_is_filled_is_the_whole_tensors(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, device: str, piece: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(stream, "PIECE_BYTES", piece)
    for rank, size in ((0, 2), (1, 2), (3, 4), (5, 6)):
        shard = Shard.of(read_config(checkpoint), rank, size)
        expected = expected_parts(shard, load_file(checkpoint / "model.safetensors"))
        found = filled(opened(checkpoint, shard), shapes_of(expected), device, dtype)
        assert all(torch.equal(found[name], expected[name].to(dtype)) for name in expected)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_read_the_model_once_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Numbers that are read from the file, by offset: each by one rank, norms by all; progress says so."""
    monkeypatch.setattr("gpu_worker.models.loader.REPORT_SECONDS", 0.0)
    changes = {"intermediate_size": 256, "vocab_size": 512, "num_key_value_heads": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | changes)).save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    everywhere = sum(tensor.nbytes for name, tensor in whole.items() if name.endswith("norm.weight"))
    everything = sum(tensor.nbytes for tensor in whole.values())
    read, offsets = stream._read, Counter[int]()

    def counted(file: int, target: memoryview, offset: int) -> None:
        offsets.update(range(offset, offset + len(target), 4))
        read(file, target, offset)

    monkeypatch.setattr(stream, "_read", counted)
    share = (everything - everywhere) // size + everywhere
    heard: list[tuple[int, int]] = []
    for rank in range(size):
        before = offsets.total()
        shard = Shard.of(read_config(tmp_path), rank, size)
        assert shard.describe() == {}
        weights = open_model(tmp_path, "auto", 0).weights(lambda *said: heard.append(said))
        weights.split(shard)
        filled(weights, shapes_of(expected_parts(shard, whole)), "cpu", torch.float32)
        assert 4 * (offsets.total() - before) == share
    assert [said for said in heard if said[0] == share] == [(share, share)] * size
    assert 4 * len(offsets) == everything
    assert Counter(offsets.values()) == {1: (everything - everywhere) // 4, size: everywhere // 4}


def test_a_device_draws_and_cuts_what_a_single_rank_draws(checkpoint: Path) -> None:
    config = read_config(checkpoint)
    shapes = shapes_of(load_file(checkpoint / "model.safetensors"))
    alone = taken(opened(checkpoint, None, "dummy"), shapes)
    for device in DEVICES:
        matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
        in_place = filled(opened(checkpoint, None, "dummy"), matrices, device, torch.bfloat16)
        for rank in range(4):
            shard = Shard.of(config, rank, 4)
            expected = expected_parts(shard, alone)
            found = taken(opened(checkpoint, shard, "dummy"), shapes_of(expected))
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            expected = expected_parts(shard, in_place)
            weights = opened(checkpoint, shard, "dummy")
            found = filled(weights, shapes_of(expected), device, torch.bfloat16)
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_gguf_files_and_fused_tensors_are_cut(tiny, tmp_path: Path) -> None:
    qwen2_twin(tmp_path / "qwen2", vocab_size=VOCAB)
    fused = as_qwen1(tmp_path / "qwen2", tmp_path / "qwen1")
    for path in (write_gguf(tmp_path / "m.gguf", tiny("llama")[0]), fused):
        files = open_model(path, "auto", 0)
        stored: StoredWeights = files.weights()
        whole = {name: tensor.read() for name, tensor in stored._left.items()}
        for rank in range(2):
            expected = expected_parts(files.shard(rank, 2), whole)
            found = taken(opened(path, files.shard(rank, 2)), shapes_of(expected))
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            found = filled(opened(path, files.shard(rank, 2)), shapes_of(expected), "cpu", torch.float32)
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_wrong_is_named_by_the_whole_tensor(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, 1:].contiguous()
    tensors["q_proj"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    shard = Shard.of(read_config(tmp_path), 1, 2)
    with pytest.raises(ModelError, match=rf"{name} has shape \[72, 95\], the config asks for \[72, 96\]"):
        opened(tmp_path, shard).take(name, (72, 64))
    with pytest.raises(ModelError, match=r"has no place in this architecture \(and 1 more\)"):
        shapes = shapes_of(expected_parts(shard, load_file(checkpoint / "model.safetensors")))
        taken(opened(tmp_path, shard), {n: shape for n, shape in shapes.items() if n != name})


def test_a_file_that_ends_within_a_column_is_named(checkpoint: Path, tmp_path: Path) -> None:
    name = "x.o_proj.weight"
    save_file({name: torch.ones(72, 72)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    weights = opened(tmp_path, Shard.of(read_config(tmp_path), 1, 2))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=rf"model\.safetensors: tensor {name} cannot be read: .* early"):
        weights.fill(name, torch.empty(72, 48))
        weights.finish()
