"""GGUF files against the models that they were made from."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from gpu_worker.models.config import ModelError, inverse_frequencies, read_config
from gpu_worker.models.gguf import LAYER_NAMES, TOP_NAMES, open_gguf
from tests.unit.worker.harness import Device, prompt, reference_logits, reference_model

TYPES = gguf.GGMLQuantizationType
NAMES = {hf: ours for ours, hf in (*TOP_NAMES.items(), *LAYER_NAMES.items())}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k, as its converter makes it."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, model: transformers.PreTrainedModel, quantization: TYPES = TYPES.F32, **options
) -> Path:
    """A GGUF file of a tiny model, as llama.cpp's converter would write it."""
    config, arch = (
        model.config,
        {"LlamaForCausalLM": "llama"}.get(type(model).__name__, model.config.model_type),
    )
    writer = gguf.GGUFWriter(path, options.get("arch", arch))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_eos_token_id(2)
    if "divisors" in options:
        writer.add_tensor("rope_freqs.weight", options["divisors"])
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if arch == "llama" and "q_proj" in name:
            values = permute(values, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            values = permute(values, config.num_key_value_heads)
        kind = quantization if values.ndim == 2 else TYPES.F32
        writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{suffix}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{suffix}"


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "llama_biased", "qwen2", "qwen3"])
def test_logits_equal_the_folders(tiny, tmp_path, kind):
    reference, _ = tiny(kind)
    device = Device(write_gguf(tmp_path / "m.gguf", reference))
    assert device.files.vocab_size == 200
    assert device.files.config.eos_token_ids == (2,)
    device.add(0, prompt(30))
    device.step({0: 30})
    torch.testing.assert_close(
        device.logits[0][0], reference_logits(reference, prompt(30))[-1], atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_tensors(tmp_path, quantization):
    """What is taken from a quantized file is the weight, up to the format's precision, in our order."""
    reference = reference_model("llama")
    kind = TYPES[quantization]
    model = open_gguf(write_gguf(tmp_path / "m.gguf", reference, kind))
    name = "model.layers.1.self_attn.q_proj.weight"
    weight = reference.state_dict()[name]
    got = model.tensors[name].read()
    assert got.dtype == torch.float32 and got.shape == weight.shape
    step = {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 0.02}.get(quantization, 0.2)
    assert (got - weight).abs().max() < step * weight.abs().max()


@pytest.mark.parametrize("quantization", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_read_as_the_library_reads_them(tmp_path, quantization):
    """The library writes no K quants, so their bytes are random, with plain scales."""
    kind = TYPES[quantization]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=block, intermediate_size=block, num_hidden_layers=1, num_attention_heads=4
    )
    raw = np.random.default_rng(0).integers(0, 60, (block, size), dtype=np.uint8)
    model = transformers.LlamaForCausalLM(config)
    path = write_gguf(tmp_path / "base.gguf", model)
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        if tensor.name == "blk.0.ffn_down.weight":
            writer.add_tensor(tensor.name, raw, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = open_gguf(tmp_path / "m.gguf").tensors["model.layers.0.mlp.down_proj.weight"]
    assert got.shape == (block, block)
    np.testing.assert_array_equal(got.read().numpy(), gguf.dequantize(raw, kind))


def test_llama3_rope_divisors(tiny, tmp_path):
    reference, folder = tiny("llama3_rope")
    rope = read_config(folder).rope
    plain = inverse_frequencies(type(rope)(theta=rope.theta), 16)
    divisors = (plain / inverse_frequencies(rope, 16)).numpy()
    device = Device(write_gguf(tmp_path / "m.gguf", reference, divisors=divisors))
    device.add(0, prompt(30))
    device.step({0: 30})
    torch.testing.assert_close(
        device.logits[0][0], reference_logits(reference, prompt(30))[-1], atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("keep", [0.99, 0.5, 0.02, 0.0])
def test_truncated_files(tiny, tmp_path, keep):
    path = write_gguf(tmp_path / "m.gguf", tiny("llama")[0])
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ModelError, match=r"m\.gguf"):
        Device(path)


def test_other_architectures(tiny, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny("llama")[0], arch="gemma3")
    with pytest.raises(ModelError, match="gemma3 is not served"):
        open_gguf(path)


def test_missing_tensor(tiny, tmp_path):
    model = reference_model("llama")
    model.model.layers[2].mlp.down_proj = torch.nn.Identity()
    with pytest.raises(
        ModelError, match=r"m\.gguf: tensor model\.layers\.2\.mlp\.down_proj\.weight is missing"
    ):
        Device(write_gguf(tmp_path / "m.gguf", model))
