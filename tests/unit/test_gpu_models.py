"""The checkpoint that a start is timed with is one that any loader takes."""

import json

import pytest
import torch
from safetensors import safe_open

from benchmarks import gpu_models
from benchmarks.gpu_models import PRESETS, checkpoint_bytes, room_for, tensor_shapes, write_checkpoint

SMALL = PRESETS["qwen2.5-0.5b"] | {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
    "vocab_size": 1000, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", SMALL)
    monkeypatch.setattr(gpu_models, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(gpu_models, "NUM_DRAWN", 10_000)  # less than a tensor has, so that it comes around


def test_every_tensor_is_there_with_its_shape_and_a_models_numbers(tmp_path):
    size = write_checkpoint("small", tmp_path)
    assert size == checkpoint_bytes("small")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size
    shapes = dict(tensor_shapes(SMALL))
    assert index["weight_map"].keys() == shapes.keys()
    files = set(index["weight_map"].values())
    assert len(files) > 2
    found: dict[str, torch.Tensor] = {}
    for name in files:
        with safe_open(tmp_path / name, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
    for name, tensor in found.items():
        values = tensor.float()
        if name.endswith("norm.weight"):
            assert values.eq(1).all()
        elif values.numel() > 1000:
            assert abs(values.mean()) < 2e-3 and 0.018 < values.std() < 0.022
    one, other = (found[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
    assert not torch.equal(one, other)


def test_the_worker_loads_it(tmp_path):
    from gpu_worker.models.loader import open_model

    write_checkpoint("small", tmp_path)
    weights = open_model(tmp_path, "auto", 0).weights()
    for name, shape in tensor_shapes(SMALL):
        assert tuple(weights.take(name, shape).shape) == shape
    weights.finish()


def test_memory_is_taken_where_it_has_room(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_models, "IN_MEMORY", tmp_path / "none")
    assert room_for("small", tmp_path) == tmp_path
    monkeypatch.setattr(gpu_models, "IN_MEMORY", tmp_path)
    assert room_for("small", tmp_path / "base") == tmp_path
    monkeypatch.setitem(PRESETS, "huge", SMALL | {"vocab_size": 1 << 50})
    assert room_for("huge", tmp_path / "base") == tmp_path / "base"
