"""Log probabilities in the two shapes that OpenAI gave them."""

from __future__ import annotations

from collections.abc import Sequence

from gateway_svc.openai.replies import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob
from gateway_svc.text.detokenize import Detokenizer, TokenBytes
from pagoda.v1 import scheduler_pb2 as pb

# JSON has no infinity. This is what OpenAI writes for a token that cannot be drawn.
LOWEST = -9999.0


def chat_logprobs(
    table: TokenBytes, token_ids: Sequence[int], logprobs: Sequence[pb.TokenLogprob]
) -> ChatLogprobs:
    """One entry a token. `bytes` is exact where a token is part of a character and `token` cannot be."""
    content = []
    for token_id, entry in zip(token_ids, logprobs, strict=True):
        top = [
            TopLogprob(_text(table[i]), max(value, LOWEST), list(table[i]))
            for i, value in zip(entry.top_ids, entry.top_logprobs, strict=True)
        ]
        data = table[token_id]
        content.append(ChatLogprob(_text(data), max(entry.logprob, LOWEST), list(data), top))
    return ChatLogprobs(content)


class CompletionLogprobsBuilder:
    """The parallel lists of one sample, piece by piece: offsets go on from piece to piece."""

    def __init__(self, table: TokenBytes, offset: int = 0) -> None:
        self._table = table
        self._detokenizer = Detokenizer(table)
        self._offset = offset

    def piece(self, token_ids: Sequence[int], logprobs: Sequence[pb.TokenLogprob]) -> CompletionLogprobs:
        """Entries for new tokens."""
        piece = CompletionLogprobs([], [], [], [])
        for token_id, entry in zip(token_ids, logprobs, strict=True):
            alternatives = zip(entry.top_ids, entry.top_logprobs, strict=True)
            top = {self._name(i): max(value, LOWEST) for i, value in alternatives}
            name = self._name(token_id)
            top.setdefault(name, max(entry.logprob, LOWEST))
            self._append(piece, token_id, name, max(entry.logprob, LOWEST), top)
        return piece

    def prompt(self, token_ids: Sequence[int]) -> CompletionLogprobs:
        """Entries for an echoed prompt: its tokens were not drawn, so they have no logprobs."""
        piece = CompletionLogprobs([], [], [], [])
        for token_id in token_ids:
            self._append(piece, token_id, self._name(token_id), None, None)
        return piece

    def _append(
        self,
        piece: CompletionLogprobs,
        token_id: int,
        name: str,
        logprob: float | None,
        top: dict[str, float] | None,
    ) -> None:
        piece.tokens.append(name)
        piece.token_logprobs.append(logprob)
        piece.top_logprobs.append(top)
        piece.text_offset.append(self._offset)
        self._offset += len(self._detokenizer.feed((token_id,)))

    def _name(self, token_id: int) -> str:
        """The token's text, or its bytes spelt out: the alternatives are keys, which must differ."""
        data = self._table[token_id]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in data)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
