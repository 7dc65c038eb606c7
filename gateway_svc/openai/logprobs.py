"""Log probabilities in the two shapes that OpenAI gave them, and in vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, zip_longest

from msgspec import UNSET, UnsetType

from gateway_svc.generation import Generation, Sample
from gateway_svc.openai.replies import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
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


def score_of(sample: Sample) -> float | UnsetType:
    """What a result of a beam search or of best_of is ordered by."""
    return UNSET if sample.score is None else max(sample.score, LOWEST)


def prompt_logprobs(table: TokenBytes, generation: Generation, num_top: int) -> PromptLogprobs:
    """vLLM's shape: for each token of the prompt, itself and then the best `num_top`; null for the first."""
    entries: PromptLogprobs = [None]
    for token_id, entry in zip(generation.spec.prompt[1:], generation.prompt_logprobs, strict=False):
        own = PromptLogprob(max(entry.logprob, LOWEST), entry.rank, _text(table[token_id]))
        best = {
            str(i): PromptLogprob(max(value, LOWEST), rank, _text(table[i]))
            for rank, i, value in zip(range(1, num_top + 1), entry.top_ids, entry.top_logprobs, strict=False)
        }
        best.pop(str(token_id), None)
        entries.append({str(token_id): own, **best})
    return entries


class CompletionLogprobsBuilder:
    """The parallel lists of one sample, piece by piece: offsets go on from piece to piece."""

    def __init__(self, table: TokenBytes, num_top: int) -> None:
        """`table` spells special tokens out; `num_top` alternatives are given for each token."""
        self._table = table
        self._num_top = num_top
        self._detokenizer = Detokenizer(table)
        self._offset = 0

    def piece(self, token_ids: Sequence[int], logprobs: Sequence[pb.TokenLogprob]) -> CompletionLogprobs:
        """Entries for new tokens."""
        piece = CompletionLogprobs([], [], [], [])
        for token_id, entry in zip(token_ids, logprobs, strict=True):
            self._append(piece, token_id, entry)
            self._offset += len(self._detokenizer.feed((token_id,)))
        return piece

    def prompt(self, generation: Generation, text: str, visible: TokenBytes) -> CompletionLogprobs:
        """Entries for a prompt that is echoed as `text`; its first token follows nothing and has no logprob.

        A special token that the tokenizer added is not in the text, and may be known by `visible`, which does
        not spell such tokens out. One that puts a space before the text has it in its first token alone.
        """
        piece = CompletionLogprobs([], [], [], [])
        detokenizer = Detokenizer(self._table)
        entries = [None, *generation.prompt_logprobs]
        for token_id, entry in zip_longest(generation.spec.prompt, entries):
            self._append(piece, token_id, entry)
            part = detokenizer.feed((token_id,))
            if not text.startswith(part, self._offset):
                part = part.removeprefix(" ") if visible[token_id] else ""
            self._offset = min(self._offset + len(part), len(text))
        self._offset = len(text)
        return piece

    def _append(self, piece: CompletionLogprobs, token_id: int, entry: pb.TokenLogprob | None) -> None:
        name = self._name(token_id)
        piece.tokens.append(name)
        piece.text_offset.append(self._offset)
        if entry is None:
            piece.token_logprobs.append(None)
            piece.top_logprobs.append(None)
            return
        best = islice(zip(entry.top_ids, entry.top_logprobs, strict=True), self._num_top)
        top = {self._name(i): max(value, LOWEST) for i, value in best}
        top.setdefault(name, max(entry.logprob, LOWEST))
        piece.token_logprobs.append(max(entry.logprob, LOWEST))
        piece.top_logprobs.append(top)

    def _name(self, token_id: int) -> str:
        """The token's text, or its bytes spelt out: the alternatives are keys, which must differ."""
        data = self._table[token_id]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in data)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
