"""The tokenizer of Qwen's first models equals tiktoken's own, which its release runs."""

from __future__ import annotations

import base64
import functools
import unicodedata
from pathlib import Path

import jinja2
import pytest
import tiktoken
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gateway_svc.text.tokenizer import ModelTokenizer, TokenizerError, load_tokenizer
from pagoda.swift.engine import LazyTokenizer
from pagoda.swift.templates import QWEN_JINJA
from tests.unit.gateway.qwen_tokenizer import qwen_tiktoken

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

# One text mixes them: what is split depends on neighbours.
PIECES = st.one_of(
    st.text(max_size=12),
    st.text(alphabet="aA'sſStTmMdDrReElLvV ", max_size=12),
    st.text(alphabet="0123456789٣४四½Ⅷ. ", max_size=10),
    st.text(alphabet=" \t\n\r\v\f\u0085\u00a0\u2028\u3000\u200b", max_size=8),
    st.text(alphabet="ab", max_size=40),
    st.text(alphabet="=-*/<>|_", max_size=20),
    st.text(alphabet="e\u0301\u0338\u0323\u1100\u1161\u11a8가\u0958ſ", max_size=8),
    st.text(alphabet="的是不了人我在有他这中大来上国", max_size=12),
    st.text(alphabet="اللغةعربيהבתคนไทยहिन्दीбгдΩλ", max_size=12),
    st.text(alphabet="👋🏽👩‍💻🇫🇷️", max_size=8),
)
TEXTS = st.lists(PIECES, max_size=6).map("".join)
WITH_SPECIAL = st.lists(st.one_of(PIECES, st.sampled_from(SPECIAL)), max_size=8)


@functools.cache
def tiktokens() -> tiktoken.Encoding:
    """The encoding as the release's tokenization_qwen.py makes it."""
    lines = (line.split() for line in qwen_tiktoken().read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    return tiktoken.Encoding("Qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "qwen.tiktoken").symlink_to(qwen_tiktoken())
    return load_tokenizer(folder)


def encode(tokenizer: ModelTokenizer, text: str) -> list[int]:
    return tokenizer._encode([text], True)[0]


def expected(text: str) -> list[int]:
    return tiktokens().encode(unicodedata.normalize("NFC", text), allowed_special="all")


@settings(max_examples=500, deadline=None)
@given(text=TEXTS)
def test_texts_are_tiktokens(ours: ModelTokenizer, text: str) -> None:
    assert encode(ours, text) == expected(text)


@settings(max_examples=200, deadline=None)
@given(parts=WITH_SPECIAL)
def test_special_tokens_in_texts(ours: ModelTokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    # A mark that joins a special token's end leaves no special token to tiktoken, which normalizes before.
    composed = "".join(unicodedata.normalize("NFC", part) for part in parts)
    assume(unicodedata.normalize("NFC", text) == composed)
    assert encode(ours, text) == expected(text)


def test_every_character_of_unicode(ours: ModelTokenizer) -> None:
    """Among letters, digits, signs and spaces; beyond the planes with many kinds, one of 97."""
    planes = [*range(0x20000), *range(0x20000, 0x110000, 97)]
    codes = [code for code in planes if not 0xD800 <= code < 0xE000]
    for first in range(0, len(codes), 1000):
        part = [f"a{c}b {c}1{c}!{c}\n {c}" for c in map(chr, codes[first : first + 1000])]
        theirs = tiktokens().encode_ordinary_batch([unicodedata.normalize("NFC", text) for text in part])
        wrong = [text for text, a, b in zip(part, ours._encode(part, True), theirs, strict=True) if a != b]
        assert not wrong, [hex(ord(text[1])) for text in wrong]


async def test_tokens_back_to_text(ours: ModelTokenizer) -> None:
    text = "<|im_start|>user\n晚上睡不着觉怎么办？ naïve 👋🏽 3.14<|im_end|>"
    ids = await ours.encode(text, True)
    assert await ours.decode(ids) == text == tiktokens().decode(ids)
    assert ours.vocab_size == 151851 and ours.visible[151645] == b""
    assert ours.special_token("eos_token") == "<|im_end|>"
    assert [ours.verbatim[i] for i in (151643, 151646, 151850)] == [
        b"<|endoftext|>",
        b"<|extra_0|>",
        b"<|extra_204|>",
    ]
    assert all(ours.verbatim[i] == tiktokens().decode_single_token_bytes(i) for i in range(151851))


async def test_chats_are_chatml(ours: ModelTokenizer) -> None:
    chats = [
        [{"role": "user", "content": "hi"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        [{"role": r, "content": r[0]} for r in ("user", "assistant", "user")],
    ]
    for messages in chats:
        want = jinja2.Template(QWEN_JINJA, keep_trailing_newline=True).render(
            messages=messages, add_generation_prompt=True
        )
        assert await ours.encode_chat(messages) == expected(want)
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert await ours.encode_chat(chats[0]) == expected(head + "<|im_start|>assistant\n")


def test_the_sdks_engine_has_it_too(tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").symlink_to(qwen_tiktoken())
    tokenizer = LazyTokenizer("qwen-7b-chat", tmp_path)
    assert tokenizer.encode("晚上睡不着觉怎么办？<|im_end|>") == expected("晚上睡不着觉怎么办？<|im_end|>")


@pytest.mark.parametrize("damage", [b"", b"no ranks", b"!!!! 0\n", b"QQ== x\n", b"(cut)"])
def test_a_damaged_vocabulary_is_refused_and_named(tmp_path: Path, damage: bytes) -> None:
    whole = qwen_tiktoken().read_bytes()
    (tmp_path / "qwen.tiktoken").write_bytes(whole[: len(whole) // 2] if damage == b"(cut)" else damage)
    with pytest.raises(TokenizerError, match=r"qwen\.tiktoken"):
        load_tokenizer(tmp_path)
