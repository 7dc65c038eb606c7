"""Qwen's first architecture: the numbers of a Qwen2 model under its names give the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gpu_worker.models.config import ModelError, read_config
from gpu_worker.models.loader import open_model
from tests.support.qwen1 import as_qwen1, qwen2_twin
from tests.unit.worker.harness import VOCAB, Device, prompt, reference_logits


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A Qwen2 model and its twin in the first architecture."""
    qwen2_twin(tmp_path / "qwen2", vocab_size=VOCAB)
    return tmp_path / "qwen2", as_qwen1(tmp_path / "qwen2", tmp_path / "qwen1")


def run(folder: Path) -> tuple[list[int], torch.Tensor]:
    device = Device(folder)
    sequence = device.add(2, prompt(45))
    device.step({2: 30})
    device.step({2: 15})
    device.decode([2], 20)
    return sequence.tokens, torch.cat(device.logits)


def change(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_same_logits_as_its_qwen2_twin_and_as_transformers(tmp_path: Path) -> None:
    reference = qwen2_twin(tmp_path / "qwen2", vocab_size=VOCAB)
    tokens, logits = run(as_qwen1(tmp_path / "qwen2", tmp_path / "qwen1"))
    twins_tokens, twins_logits = run(tmp_path / "qwen2")
    assert tokens == twins_tokens and torch.equal(logits, twins_logits)
    expected = reference_logits(reference, tokens)[44:-1]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    assert tokens[45:] == expected.argmax(-1).tolist()


def test_a_device_reads_the_thirds_of_the_fused_tensor_from_the_file(pair: tuple[Path, Path]) -> None:
    """Other devices than the CPU fill tensors from where they lie in the file: the same numbers lie there."""
    twin, qwen1 = (open_model(folder, "auto", 0).weights() for folder in pair)
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.2.self_attn.v_proj.bias"):
        stored, expected = qwen1._left[name], twin._left[name].read()  # type: ignore[attr-defined]
        data = stored.file.read_bytes()[stored.span.offset :][: stored.num_bytes]
        read = torch.frombuffer(bytearray(data), dtype=stored.span.dtype).view(stored.shape)
        assert torch.equal(read, expected) and torch.equal(stored.read(), expected)


def test_the_greatest_length_is_the_one_before_attention_changes(pair: tuple[Path, Path]) -> None:
    config = read_config(pair[1])
    assert config.max_position == 256 and config.eos_token_ids == (151643, 151645)
    assert config.intermediate_size == 96 and config.qkv_bias and not config.o_bias


def test_ids_beyond_the_vocabulary_are_cut(pair: tuple[Path, Path]) -> None:
    change(pair[1], vocab_size=600)
    lines = b"".join(b"QQ== %d\n" % rank for rank in range(300))
    (pair[1] / "qwen.tiktoken").write_bytes(lines)
    assert open_model(pair[1], "dummy", 0).vocab_size == 300 + 208


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"rotary_pct": 0.5}, "rotary_pct"),
        ({"scale_attn_weights": False}, "unscaled"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantiz"),
    ],
)
def test_what_is_not_served_is_refused(pair: tuple[Path, Path], values: dict, named: str) -> None:
    change(pair[1], **values)
    with pytest.raises(ModelError, match=named):
        read_config(pair[1])
