"""An independent judge of constrained outputs: a fresh matcher, fed the output token by token."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from pagoda.v1 import scheduler_pb2 as pb

EOS = 2
WORDS = ('{"', '":', '", "', '"}', "true", "false", "null", "ab", "ba", "12", "é", "日", "a1b", "xyz")


def tiny_vocabulary(num_tokens: int) -> pb.Vocabulary:
    """Three special tokens, all printable ASCII, some longer tokens; the rest stands for nothing."""
    tokens = [b"<pad>", b"<s>", b"</s>"]
    tokens += [*(bytes([i]) for i in range(0x20, 0x7F)), *(word.encode() for word in WORDS)]
    tokens += [b""] * (num_tokens - len(tokens))
    return pb.Vocabulary(tokens=tokens, special_token_ids=[0, 1, 2], eos_token_id=EOS)


class Judge:
    """Judges by one vocabulary."""

    bos_token_id = None

    def __init__(self, vocabulary: pb.Vocabulary) -> None:
        self.tokens = list(vocabulary.tokens)
        self.special_token_ids = list(vocabulary.special_token_ids)
        self.eos_token_id = vocabulary.eos_token_id
        self.tokenizer = LLTokenizer(TokenizerWrapper(self))

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.greedy_tokenize(text)

    def assert_follows(self, grammar: str, output: Sequence[int], ended: bool) -> None:
        """Raises AssertionError unless each token was allowed, and the last one is EOS where it `ended`."""
        matcher = LLMatcher(self.tokenizer, grammar)
        assert not matcher.is_error(), matcher.get_error()
        for place, token in enumerate(output):
            mask = matcher.compute_bitmask()
            assert mask[token // 8] >> token % 8 & 1, f"token {token} at {place} of {output} is not allowed"
            if token == self.eos_token_id:
                assert matcher.is_accepting() and ended and place == len(output) - 1
                return
            assert matcher.consume_token(token)
        assert not ended, f"{output} ended, and its last token is no EOS"

    def text(self, output: Sequence[int]) -> str:
        """The output's text."""
        return b"".join(self.tokens[i] for i in output if i not in self.special_token_ids).decode()
