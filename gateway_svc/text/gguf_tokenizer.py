"""The tokenizer that a GGUF file describes in its metadata, without reading a tensor.

A GGUF has no `tokenizer.json`: vocabulary, merges and the ids of special tokens stand in its header, and the
way text is split before merging is only a name (`tokenizer.ggml.pre`). A wrong split gives wrong tokens
without a word, so a name that is not known here is refused.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gateway_svc.text.detokenize import SPACE_MARK, byte_alphabet

CONTROL, USER_DEFINED = 3, 4  # kinds of token, as GGUF numbers them
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "tekken": _TEKKEN,
}
_DIGIT_BY_DIGIT = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}
_GPT2 = {"gpt-2", "default"}
_WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3", "tekken"}


class GgufError(ValueError):
    """The file is not a GGUF, is cut off, or describes a tokenizer that is not supported."""


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key of the header with its value.

    Raises:
        GgufError: the file is not a GGUF, or ends within its header.
    """
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise GgufError(f"{path}: the file is empty") from error
        with data:
            if data[:4] != b"GGUF":
                raise GgufError(f"{path}: not a GGUF file")
            try:
                return _Header(data).read()
            except (struct.error, IndexError, UnicodeDecodeError) as error:
                raise GgufError(f"{path}: the file is cut off or damaged within its header") from error


class _Header:
    """A cursor over the header."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 4

    def read(self) -> dict[str, Any]:
        version = self._scalar(4)
        if version not in (2, 3):
            raise IndexError(f"version {version}")
        self._scalar(10)  # the number of tensors
        return {self._string(): self._value(self._scalar(4)) for _ in range(self._scalar(10))}

    def _scalar(self, kind: int) -> Any:
        form = struct.Struct("<" + _SCALARS[kind])
        (value,) = form.unpack_from(self._data, self._at)
        self._at += form.size
        return value

    def _string(self) -> str:
        length = self._scalar(10)
        end = self._at + length
        if end > len(self._data):
            raise IndexError("string beyond the end")
        text = self._data[self._at : end].decode()
        self._at = end
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise IndexError(f"value of unknown kind {kind}")
            return self._scalar(kind)
        element, count = self._scalar(4), self._scalar(10)
        if element in _SCALARS:
            form = struct.Struct(f"<{count}{_SCALARS[element]}")
            values = form.unpack_from(self._data, self._at)
            self._at += form.size
            return list(values)
        return [self._value(element) for _ in range(count)]


def load_gguf_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and what `PreTrainedTokenizerFast` wants to know beside it.

    Raises:
        GgufError: the file is damaged, or its tokenizer is not supported.
    """
    metadata = read_metadata(path)
    kind = metadata.get("tokenizer.ggml.model")
    builders: dict[Any, Callable[[dict[str, Any]], Tokenizer]] = {
        "gpt2": _byte_level,
        "llama": _sentencepiece,
    }
    if kind not in builders or "tokenizer.ggml.tokens" not in metadata:
        raise GgufError(f"{path}: the tokenizer {kind!r} is not supported; {', '.join(builders)} are")
    try:
        tokenizer = builders[kind](metadata)
    except GgufError as error:
        raise GgufError(f"{path}: {error}") from error
    _add_tokens(tokenizer, metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    extras: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and token_id < len(tokens):
            extras[f"{name}_token"] = tokens[token_id]
    if metadata.get("tokenizer.ggml.add_bos_token", _adds_bos(metadata)) and "bos_token" in extras:
        bos = extras["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokens.index(bos))]
        )
    if "tokenizer.chat_template" in metadata:
        extras["chat_template"] = metadata["tokenizer.chat_template"]
    return tokenizer, extras


def _adds_bos(metadata: dict[str, Any]) -> bool:
    """What holds when the file does not say: llama.cpp begins such prompts with BOS."""
    pre = metadata.get("tokenizer.ggml.pre")
    return metadata["tokenizer.ggml.model"] == "llama" or pre in ("llama-bpe", "llama3", "llama-v3")


def _byte_level(metadata: dict[str, Any]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _SPLITS)
    if pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    elif pre in _DIGIT_BY_DIGIT:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif pre in _GPT2:
        tokenizer.pre_tokenizer = byte_level
    else:
        raise GgufError(f"how the tokenizer splits text (tokenizer.ggml.pre = {pre!r}) is not known")
    if _SPLITS.get(pre) == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any]) -> Tokenizer:
    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges_from_scores(vocab, metadata["tokenizer.ggml.scores"]),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[Any] = [normalizers.Replace(" ", SPACE_MARK)]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(SPACE_MARK))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Sentencepiece joins the neighbours whose union scores best: merges are the tokens' cuts, by score."""
    cuts = []
    for token, token_id in vocab.items():
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in vocab and right in vocab:
                cuts.append((-scores[token_id], vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(cuts)]


def _add_tokens(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    """Tokens that stand for themselves in text: control tokens, which are special, and user-defined ones."""
    byte_level = metadata["tokenizer.ggml.model"] == "gpt2"
    alphabet = byte_alphabet() if byte_level else {}
    special, plain = [], []
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    for token, kind in zip(metadata["tokenizer.ggml.tokens"], kinds, strict=False):
        if kind == CONTROL and (not byte_level or all(c in alphabet for c in token)):
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == USER_DEFINED:
            plain.append(AddedToken(token, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
