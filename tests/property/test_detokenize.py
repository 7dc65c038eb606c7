"""Incremental detokenising equals a decode of the whole, wherever the tokens are cut."""

from __future__ import annotations

import functools
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gateway_svc.text.detokenize import Detokenizer, TokenBytes
from tests.support.data import model_folder
from tests.unit.gateway.qwen_tokenizer import qwen_tokenizer

# A padded vocabulary: ids beyond the tokenizer's own do come out of such models.
PADDING = 200
PIECES = ["👩🏿‍🚀", "é", "ạ̈", "\ufffd", " ", "\n", "0", "١", "<|im_end|>", "naïve"]
TEXTS = st.one_of(
    st.text(max_size=80),
    st.text(alphabet="中文字符，。！测试漢字かなカナ한국어𠮷𡃁", max_size=60),
    st.text(alphabet="👨‍👩‍👧‍👦🏳️‍🌈👍🏽🇨🇳é̂ñ̃a\u0301\u200d\ufe0f\ufffd", max_size=60),
    st.lists(st.sampled_from(PIECES)).map("".join),
)


@functools.cache
def smollm() -> Tokenizer:
    return Tokenizer.from_file(str(model_folder() / "tokenizer.json"))


@functools.cache
def single_bytes() -> Tokenizer:
    """A tokenizer that knows single bytes only, so that characters are cut everywhere.

    With special and ordinary added tokens, some of them outside of the byte alphabet.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken("<|im_start|>"), AddedToken("<|im_end|>"), AddedToken("<｜end▁x｜>")]
    )
    tokenizer.add_tokens(["<tool_call>", "中 文"])
    return tokenizer


TOKENIZERS = {"smollm": smollm, "qwen": qwen_tokenizer, "bytes": single_bytes}


@functools.cache
def table(name: str, skip_special: bool) -> TokenBytes:
    return TokenBytes(TOKENIZERS[name](), skip_special)


def stream(token_bytes: TokenBytes, ids: list[int], places: list[int]) -> list[str]:
    detokenizer = Detokenizer(token_bytes)
    edges = [0, *sorted(p % (len(ids) + 1) for p in places), len(ids)]
    pieces = [detokenizer.feed(ids[a:b]) for a, b in itertools.pairwise(edges)]
    return [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(text=TEXTS, places=st.lists(st.integers(0, 1000), max_size=40), skip_special=st.booleans())
def test_text_comes_back(name: str, text: str, places: list[int], skip_special: bool) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = stream(table(name, skip_special), ids, places)
    whole = tokenizer.decode(ids, skip_special_tokens=skip_special)
    assert "".join(pieces) == whole
    if "\ufffd" not in whole:  # SmolLM2's vocabulary lacks some bytes
        assert "\ufffd" not in "".join(pieces), "a character was shown before it was complete"


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data(), places=st.lists(st.integers(0, 1000), max_size=40), skip_special=st.booleans())
def test_any_tokens_decode_as_the_whole(
    name: str, data: st.DataObject, places: list[int], skip_special: bool
) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + PADDING), max_size=40))
    expected = tokenizer.decode(ids, skip_special_tokens=skip_special)
    assert "".join(stream(table(name, skip_special), ids, places)) == expected


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=40), places=st.lists(st.integers(0, 1000), max_size=40))
def test_any_bytes_decode_as_the_whole(raw: bytes, places: list[int]) -> None:
    """Overlong forms, surrogates, cut characters: the replacement characters fall in the same places."""
    token_of = {table("bytes", True)[token]: token for token in range(256)}
    ids = [token_of[bytes([b])] for b in raw]
    assert "".join(stream(table("bytes", True), ids, places)) == single_bytes().decode(ids)


def test_one_token_at_a_time_shows_whole_characters() -> None:
    text = "中文 👨‍👩‍👧‍👦 é"
    pieces = stream(table("smollm", True), smollm().encode(text).ids, list(range(200)))
    assert "".join(pieces) == text and all("\ufffd" not in piece for piece in pieces)


def test_byte_fallback_vocabularies() -> None:
    """Sentencepiece style: a mark for the space, and bytes spelt out for what the vocabulary lacks."""
    vocab = {"<unk>": 0, "▁": 1, "▁hi": 2, "h": 3} | {f"<0x{b:02X}>": 4 + b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    ids = [2, 1, *(4 + b for b in "中".encode()), 3]
    assert "".join(stream(TokenBytes(tokenizer, True), ids, [3, 4])) == tokenizer.decode(ids) == " hi 中h"


def test_an_unknown_decoder_is_refused() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="WordPiece"):
        TokenBytes(tokenizer, True)
