"""Loading tokenizers from folders and GGUF files, templates, and prompts that take long."""

from __future__ import annotations

import asyncio
import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from gateway_svc.errors import InvalidField
from gateway_svc.text.gguf_tokenizer import load_gguf_tokenizer
from gateway_svc.text.tokenizer import TokenizerError, load_tokenizer
from tests.support.data import model_folder
from tests.unit.gateway.conftest import ids_of, model_tokenizer

USER = [{"role": "user", "content": "hi"}]


def write_gguf(path: Path, metadata: dict[str, Any]) -> None:
    """A GGUF of a header alone."""

    def string(text: str) -> bytes:
        data = text.encode()
        return struct.pack("<Q", len(data)) + data

    def value(item: Any) -> bytes:
        match item:
            case bool():
                return struct.pack("<I?", 7, item)
            case int():
                return struct.pack("<II", 4, item)
            case str():
                return struct.pack("<I", 8) + string(item)
            case [str(), *_]:
                return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(string, item))
            case [float(), *_]:
                return struct.pack(f"<IIQ{len(item)}f", 9, 6, len(item), *item)
            case _:
                return struct.pack(f"<IIQ{len(item)}i", 9, 5, len(item), *item)

    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata))
    path.write_bytes(head + b"".join(string(k) + value(v) for k, v in metadata.items()))


def smollm_metadata() -> dict[str, Any]:
    """The header of the model's GGUF, made from its tokenizer.json."""
    document = json.loads((model_folder() / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    special = {token["content"] for token in document["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}",
    }


async def test_a_gguf_splits_as_the_folder_does(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, smollm_metadata())
    tokenizer = load_tokenizer(path)
    for text in (
        "In 1984, 31415 and 2³.",
        "世界 👋🏽 naïve",
        "<|im_start|>user\n",
        "def f(x):\n    return x**10",
    ):
        assert await tokenizer.encode(text, True) == ids_of(text)
    assert await tokenizer.encode_chat(USER) == ids_of("userhi<|im_end|>")
    assert tokenizer.visible[1] == b"" and tokenizer.verbatim[1] == b"<|im_start|>"


def test_sentencepiece_in_a_gguf(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "h", "i", "hi", "▁hi"]
    write_gguf(
        tmp_path / "m.gguf",
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.scores": [0.0] * 259 + [-1.0, -2.0, -3.0, -0.5, -0.25],
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 5,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.unknown_token_id": 0,
        },
    )
    tokenizer, extras = load_gguf_tokenizer(tmp_path / "m.gguf")
    ids = tokenizer.encode("hi é").ids
    assert [tokenizer.id_to_token(i) for i in ids] == ["<s>", "▁hi", "▁", "<0xC3>", "<0xA9>"]
    assert extras["bos_token"] == "<s>"


def test_what_cannot_be_loaded_names_the_file(tmp_path: Path) -> None:
    good = smollm_metadata()
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, good)
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 10, 40, 1000, 300_000):
        cut.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(TokenizerError, match=r"cut\.gguf"):
            load_tokenizer(cut)
    for change, word in (
        ({"tokenizer.ggml.pre": "martian"}, "martian"),
        ({"tokenizer.ggml.model": "bert"}, "bert"),
    ):
        write_gguf(cut, good | change)
        with pytest.raises(TokenizerError, match=word):
            load_tokenizer(cut)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match=r"empty: holds no tokenizer\.json"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(TokenizerError, match="empty"):
        load_tokenizer(tmp_path / "empty")


async def test_chats_equal_the_reference() -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast.from_pretrained(model_folder())
    chats = [
        USER,
        [
            {"role": "system", "content": "Be brief."},
            *USER,
            {"role": "assistant", "content": "Hello 世界"},
            *USER,
        ],
    ]
    for chat in chats:
        expected = reference.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert await model_tokenizer().encode_chat(chat) == expected
    begun = [*USER, {"role": "assistant", "content": "The answer"}]
    ids = await model_tokenizer().encode_chat(begun, add_generation_prompt=False, continue_final_message=True)
    assert (await model_tokenizer().decode(ids)).endswith("<|im_start|>assistant\nThe answer")


async def test_templates_are_sandboxed_and_their_errors_are_the_callers() -> None:
    tokenizer = model_tokenizer()
    for template in (
        "{{ messages.__class__.__mro__ }}",
        "{{ raise_exception('no system role') }}",
        "{% for x in %}",
        "{{ messages[0].content.undefined.again }}",
    ):
        with pytest.raises(InvalidField) as caught:
            await tokenizer.encode_chat(USER, chat_template=template)
        assert caught.value.field == "messages"
    assert await tokenizer.encode_chat(USER, chat_template="{{ x }}", variables={"x": "Yes"}) == ids_of("Yes")


async def test_a_model_without_a_template(tmp_path: Path) -> None:
    shutil.copy(model_folder() / "tokenizer.json", tmp_path)
    with pytest.raises(InvalidField, match="no chat template"):
        await load_tokenizer(tmp_path).encode_chat(USER)


async def test_a_template_from_a_file(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model_folder())
    (tmp_path / "mine.jinja").write_text("Yes{{ messages[0].content }}")
    tokenizer.use_chat_template(tmp_path / "mine.jinja")
    assert await tokenizer.encode_chat([{"role": "user", "content": "!"}]) == ids_of("Yes!")
    with pytest.raises(TokenizerError, match="cannot read the chat template"):
        tokenizer.use_chat_template(tmp_path / "not-there.jinja")


async def test_a_long_prompt_does_not_hold_up_the_loop() -> None:
    """Seconds of tokenizing, while the loop goes on turning: most of its turns are short."""
    work = asyncio.create_task(model_tokenizer().encode("Some words, and 世界. " * 60_000, True))
    gaps = []
    while not work.done():
        before = time.perf_counter()
        await asyncio.sleep(0.001)
        gaps.append(time.perf_counter() - before)
    assert len(await work) > 300_000
    assert len(gaps) > 20, "the loop turned while the prompt was being tokenized"
