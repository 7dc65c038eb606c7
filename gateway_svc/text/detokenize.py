"""Tokens to text as they come, at a cost that depends on the new tokens only.

A token is bytes, and a character may be spread over several tokens. So each token's bytes are looked up
and run through an incremental UTF-8 decoder, which keeps an unfinished character back until the rest comes.
What can no longer become a character is U+FFFD, exactly as in a decode of the whole.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Iterable

from tokenizers import Tokenizer

SPACE_MARK = "▁"


def byte_alphabet() -> dict[str, int]:
    """The characters with which byte-level vocabularies write bytes (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class TokenBytes(dict[int, bytes]):
    """The bytes of each token, worked out when it is first seen.

    Special tokens are empty if `skip_special`, but for those in `seen`. Ids that the tokenizer does not know
    (a model's vocabulary may be padded) are empty too, as in a decode of the whole.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, seen: Collection[str] = ()) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._byte_level = _is_byte_level(tokenizer)
        self._alphabet = byte_alphabet() if self._byte_level else {}
        self._added = tokenizer.get_added_tokens_decoder()
        self._skip_special = skip_special
        self._seen = frozenset(seen)

    def __missing__(self, token_id: int) -> bytes:
        data = self._lookup(token_id)
        self[token_id] = data
        return data

    def _lookup(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None and added.special and self._skip_special and added.content not in self._seen:
            return b""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            try:
                return bytes([self._alphabet[c] for c in token])
            except KeyError:
                return token.encode()  # an added token, written as it is
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE_MARK, " ").encode()


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary writes bytes in the byte alphabet; else it writes text, with a mark for spaces.

    Raises:
        ValueError: the tokenizer decodes in a way that is not known here.
    """
    if tokenizer.decoder is None:
        raise ValueError("the tokenizer has no decoder")
    state = json.loads(tokenizer.decoder.__getstate__())
    kinds = {part["type"] for part in state.get("decoders", [state])}
    if "ByteLevel" in kinds:
        return True
    if kinds & {"ByteFallback", "Metaspace"}:
        return False
    raise ValueError(f"the tokenizer's decoder ({', '.join(sorted(kinds))}) is not supported")


class Detokenizer:
    """One sample's text, incrementally."""

    __slots__ = ("_decoder", "_table")

    def __init__(self, table: TokenBytes) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def fork(self) -> Detokenizer:
        """Another one for tokens that go on differently from here."""
        other = Detokenizer(self._table)
        other._decoder.setstate(self._decoder.getstate())
        return other

    def feed(self, token_ids: Iterable[int]) -> str:
        """The characters that these tokens complete."""
        table = self._table
        return self._decoder.decode(b"".join([table[i] for i in token_ids]))

    def flush(self) -> str:
        """What is left when no more tokens come: U+FFFD for an unfinished character."""
        return self._decoder.decode(b"", True)
