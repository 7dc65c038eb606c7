"""Which models the fallback opens, what it says of them, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gpu_worker.kv_cache import KVCache
from gpu_worker.models.config import ModelError
from gpu_worker.models.loader import open_model
from tests.support.other_models import COMMON, LLAMA_LIKE
from tests.unit.hf_backend.conftest import Other
from tests.unit.worker import harness
from tests.unit.worker.harness import Device, prompt


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def saved(name: str, folder: Path, **values: Any) -> Path:
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**values)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_what_the_worker_reads_of_a_config(other: Other) -> None:
    files = open_model(other("falcon")[1], "auto", 0, "auto")
    config = files.config
    assert (config.num_layers, config.num_kv_heads, config.head_dim) == (3, 1, 16)
    assert (files.vocab_size, config.max_position, config.eos_token_ids) == (200, 256, (2,))
    assert files.digest != open_model(other("falcon_new")[1], "auto", 0, "auto").digest
    assert files.digest == open_model(other("falcon")[1], "auto", 0, "transformers").digest


def test_rotations_that_change_with_the_length_end_where_they_change(other: Other) -> None:
    """Keys in pages are rotated already: the long factors would need all of them anew."""
    assert open_model(other("phi3_longrope")[1], "auto", 0, "auto").config.max_position == 160


def test_a_native_architecture_stays_native_unless_asked(tmp_path: Path) -> None:
    model = harness.reference_model("qwen3")
    harness.save(model, tmp_path)
    native, theirs = Device(tmp_path, model_impl="auto"), Device(tmp_path, model_impl="transformers")
    assert native.files.build is None and theirs.files.build is not None
    assert native.generate(0, prompt(30), 10) == theirs.generate(0, prompt(30), 10)


def test_layers_of_several_widths_share_pages(tmp_path: Path) -> None:
    """DeepSeek keeps a latent vector and a rotated part, of 16 and 8 dims, instead of keys and values."""
    sizes = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    values = {**LLAMA_LIKE, "num_key_value_heads": 4, "q_lora_rank": None, **sizes, **experts}
    folder = saved("DeepseekV3", tmp_path, **values, n_group=1, topk_group=1)
    device = Device(folder, model_impl="auto")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt(30)])
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert device.generate(0, prompt(30), 8) == want[0, 30:].tolist()


def test_weights_in_pytorchs_own_files(other: Other, tmp_path: Path) -> None:
    model, folder = other("opt")
    for file in ("config.json", "generation_config.json"):
        shutil.copy(folder / file, tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    tokens = [Device(path, model_impl="auto").generate(0, prompt(30), 8) for path in (folder, tmp_path)]
    assert tokens[0] == tokens[1]


def test_a_model_with_eyes_reads_text(tmp_path: Path) -> None:
    """Gemma 3 from 4B on: the decoder's configuration is a part of the model's."""
    text = {**LLAMA_LIKE, "head_dim": 32, "sliding_window": 9, "layer_types": ["sliding_attention"] * 3}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 28, "patch_size": 14}
    folder = saved("Gemma3", tmp_path, text_config=text, vision_config=vision | sizes, mm_tokens_per_image=4)
    device = Device(folder, model_impl="auto")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    sequence = device.add(0, prompt(30))
    device.step({0: 30})
    expected = harness.reference_logits(model, sequence.tokens[:30])[-1:]
    torch.testing.assert_close(device.logits[0], expected, atol=2e-4, rtol=1e-4)


def test_random_weights(other: Other, tmp_path: Path) -> None:
    for file in ("config.json", "generation_config.json"):
        shutil.copy(other("gpt2")[1] / file, tmp_path)
    one, same, two = (open_model(tmp_path, "dummy", seed, "auto") for seed in (1, 1, 2))
    assert one.digest == same.digest != two.digest
    first, second = (files.weights().state_dict()["transformer.wte.weight"] for files in (one, two))
    assert torch.equal(first, same.weights().state_dict()["transformer.wte.weight"])
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "values", "named"),
    [
        ("Mamba", {**COMMON, "hidden_size": 64, "num_hidden_layers": 2}, "mamba keep something else"),
        ("RecurrentGemma", LLAMA_LIKE, "recurrent_gemma keep something else"),
    ],
)
def test_recurrent_states_are_refused(tmp_path: Path, name: str, values: Any, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        open_model(saved(name, tmp_path, **values), "auto", 0, "auto")


def test_what_cannot_be_read_is_refused_and_named(other: Other, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    shutil.copytree(other("gpt2")[1], folder)

    def refused(match: str) -> None:
        with pytest.raises(ModelError, match=match):
            open_model(folder, "auto", 0, "auto")

    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: x for name, x in tensors.items() if "h.1.mlp.c_fc.weight" not in name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    refused(r"missing keys: \['transformer\.h\.1\.mlp\.c_fc\.weight'\]")
    (folder / "model.safetensors").write_bytes(b"no weights")
    refused("gpt2: transformers cannot run it: SafetensorError")
    (folder / "model.safetensors").unlink()
    refused("holds no .safetensors")
    change_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    refused("quantization_config")
    change_config(folder, model_type="t5", architectures=["T5ForConditionalGeneration"])
    refused("t5 is no causal language model")
    change_config(folder, model_type="martian", architectures=["MartianForCausalLM"])
    refused("martian")


def test_a_gguf_is_not_for_transformers(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"model\.gguf: transformers cannot run it"):
        open_model(tmp_path / "model.gguf", "auto", 0, "transformers")


def test_without_transformers_the_error_says_so(other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hf_backend", None)
    with pytest.raises(ModelError, match="transformers is missing"):
        open_model(other("gpt2")[1], "auto", 0, "auto")
    with pytest.raises(ModelError, match="architecture GPT2LMHeadModel is not served"):
        open_model(other("gpt2")[1], "auto", 0, "native")


def test_modules_that_do_not_give_their_own_logits_are_refused(other: Other) -> None:
    """Layers that look at tokens beside their own cannot run in chunks, whichever way they are run."""
    _, folder = other("gpt2")
    files = open_model(folder, "auto", 0, "auto")
    module = files.weights()
    forward = module.transformer.h[1].attn.forward

    def looking_ahead(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(hidden + hidden.mean(1, keepdim=True), *args, **kwargs)

    module.transformer.h[1].attn.forward = looking_ahead
    cache = KVCache(files.config, 8, 16, torch.float32, torch.device("cpu"))
    with pytest.raises(ModelError, match="do not give their own logits over pages: flat: logits differ"):
        files.build(  # type: ignore[misc]
            files.config,
            module,
            cache,
            dtype=torch.float32,
            device=torch.device("cpu"),
            vocab_size=200,
            max_len=128,
        )
