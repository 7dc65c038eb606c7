"""Reading models: what is right is read as it is, what is wrong is named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gpu_worker.models.config import ModelError, read_config
from gpu_worker.models.loader import open_model
from tests.unit.worker.harness import Device, prompt, reference_logits, reference_model, save

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A copy of a tiny Llama that the test may damage."""
    shutil.copytree(tiny("llama")[1], tmp_path / "copy")
    return tmp_path / "copy"


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "(gone)"}))


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / WEIGHTS).unlink(), ["holds no .safetensors"]),
        (lambda f: truncate(f / WEIGHTS), [WEIGHTS, "truncated"]),
        (lambda f: (f / WEIGHTS).write_bytes(b"no weights"), [WEIGHTS, "truncated or no safetensors"]),
        (lambda f: shutil.copy(f / WEIGHTS, f / "b.safetensors"), ["2 .safetensors", "index.json"]),
        (lambda f: change_weights(f, drop("model.layers.1.mlp.up_proj.weight")),
         ["model.layers.1.mlp.up_proj.weight is missing"]),
        (lambda f: change_weights(f, drop("lm_head.weight")), ["lm_head.weight is missing"]),
        (lambda f: change_weights(f, put("model.norm.weight", torch.ones(65))),
         [WEIGHTS, "model.norm.weight", "[65]", "[64]"]),
        (lambda f: change_weights(f, put("model.layers.0.self_attn.q_proj.bias", torch.ones(64))),
         [WEIGHTS, "model.layers.0.self_attn.q_proj.bias", "no place"]),
        (lambda f: (f / "config.json").unlink(), ["config.json does not exist"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json cannot be read"]),
        (lambda f: (f / "config.json").write_text("[]"), ["config.json holds no JSON object"]),
        (lambda f: change_config(f, architectures=["GPT2LMHeadModel"]), ["GPT2LMHeadModel is not served"]),
        (lambda f: change_config(f, architectures=[]), ["(none) is not served"]),
        (lambda f: change_config(f, hidden_size="(gone)"), ["config.json", "hidden_size is missing"]),
        (lambda f: change_config(f, vocab_size="many"), ["config.json", "many"]),
        (lambda f: change_config(f, hidden_act="gelu"), ["hidden_act 'gelu'"]),
        (lambda f: change_config(f, num_key_value_heads=3), ["4 heads do not share 3"]),
        (lambda f: change_config(f, num_hidden_layers=0), ["num_layers must be at least 1"]),
        (lambda f: change_config(f, head_dim=15), ["head_dim 15 is odd"]),
        (lambda f: change_config(f, rope_parameters={"rope_type": "yarn"}), ["rope scaling 'yarn'"]),
        (lambda f: change_config(f, quantization_config={"bits": 4}), ["quantization_config"]),
        (lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer.json is no tokenizer"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(folder, damage, named):
    damage(folder)
    with pytest.raises(ModelError) as caught:
        Device(folder)
    for part in named:
        assert part in str(caught.value)


def test_neither_folder_nor_gguf(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"x")
    with pytest.raises(ModelError, match="neither a folder nor"):
        open_model(path, "auto", 0)


def test_sharded_folder(tmp_path):
    reference = reference_model("llama")
    folder = save(reference, tmp_path, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    device = Device(folder)
    device.add(0, prompt(20))
    device.step({0: 20})
    torch.testing.assert_close(
        device.logits[0][0], reference_logits(reference, prompt(20))[-1], atol=2e-4, rtol=1e-4
    )


def test_missing_shard_and_broken_index(tmp_path):
    folder = save(reference_model("llama"), tmp_path, max_shard_size="60KB")
    last = max(folder.glob("*.safetensors"))
    last.unlink()
    with pytest.raises(ModelError, match=re.escape(f"{last.name} is missing")):
        open_model(folder, "auto", 0)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match=r"index\.json is broken"):
        open_model(folder, "auto", 0)


def test_weights_are_mapped_not_read(folder):
    """Opening a model touches no tensor; what is taken lies in the file's pages."""
    files = open_model(folder, "auto", 0)
    tensor = files.weights().take("model.embed_tokens.weight", (200, 64))
    with safe_open(folder / WEIGHTS, framework="pt") as handle:
        assert torch.equal(tensor, handle.get_tensor("model.embed_tokens.weight"))


def test_tied_model_with_a_stored_head(tiny, tmp_path):
    """Some checkpoints store the shared matrix twice."""
    reference, source = tiny("llama_tied")
    shutil.copytree(source, tmp_path / "m")
    head = reference.model.embed_tokens.weight.detach().clone()
    change_weights(tmp_path / "m", put("lm_head.weight", head))
    device = Device(tmp_path / "m")
    device.add(0, prompt(9))
    device.step({0: 9})
    torch.testing.assert_close(
        device.logits[0][0], reference_logits(reference, prompt(9))[-1], atol=2e-4, rtol=1e-4
    )


def test_digest_tells_models_apart(folder, tmp_path):
    digest = open_model(folder, "auto", 0).digest
    shutil.copytree(folder, tmp_path / "again")
    assert open_model(tmp_path / "again", "auto", 0).digest == digest
    change_weights(folder, lambda t: t["model.norm.weight"].add_(1))
    changed = open_model(folder, "auto", 0).digest
    assert changed != digest
    change_config(folder, rms_norm_eps=1e-3)
    assert open_model(folder, "auto", 0).digest != changed
    dummies = {open_model(folder, "dummy", seed).digest for seed in (0, 0, 1)}
    assert len(dummies) == 2 and not dummies & {digest, changed}


def test_dummy_weights(folder):
    """Random weights need no file, and are the same for the same seed."""
    (folder / WEIGHTS).unlink()

    def taken(seed: int) -> torch.Tensor:
        return open_model(folder, "dummy", seed).weights().take("model.layers.0.mlp.up_proj.weight", (96, 64))

    assert torch.equal(taken(1), taken(1))
    assert not torch.equal(taken(1), taken(2))
    assert 0.1 < taken(1).std() < 0.3  # the config's initializer_range is 0.2


def test_old_rope_keys(folder):
    """Files from before transformers 5 say `rope_theta` and `rope_scaling`."""
    scaling = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
    change_config(folder, rope_parameters="(gone)", rope_theta=5e5, rope_scaling=scaling)
    rope = read_config(folder).rope
    assert (rope.theta, rope.type, rope.factor, rope.original_max_position) == (5e5, "llama3", 8.0, 64)
    change_config(folder, rope_scaling=None)
    assert read_config(folder).rope.type == "default"


def test_eos_ids(folder):
    """The generation config's list wins over the config's single id."""
    assert read_config(folder).eos_token_ids == (2,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert read_config(folder).eos_token_ids == (7, 9)
    (folder / "generation_config.json").unlink()
    change_config(folder, eos_token_id=None)
    assert read_config(folder).eos_token_ids == ()


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("mistral_window", {}, (12, 12, 12)),
        ("mistral_full", {}, (None, None, None)),
        ("mistral_full", {"sliding_window": "(gone)"}, (4096, 4096, 4096)),
        ("qwen2", {"sliding_window": 77, "use_sliding_window": False}, (None, None, None)),
        ("qwen2_window", {"layer_types": "(gone)"}, (None, 9, 9)),
        ("llama", {"sliding_window": 5}, (None, None, None)),
    ],
)
def test_sliding_windows(tiny, tmp_path, kind, changes, expected):
    shutil.copytree(tiny(kind)[1], tmp_path / "m")
    change_config(tmp_path / "m", **changes)
    assert read_config(tmp_path / "m").sliding_windows == expected
