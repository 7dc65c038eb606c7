"""The tokenizer of Qwen's first models, which come with tiktoken's ranks instead of a `tokenizer.json`.

Nothing else in such a folder says how text is split or which tokens are special, and no file brings a chat
template: both are in the models' own code, and so they are here.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers

QWEN_VOCABULARY = "qwen.tiktoken"
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_ENDOFTEXT, _IM_START, _IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# In the order of their ids, the first of which follows the greatest rank.
_SPECIAL = (_ENDOFTEXT, _IM_START, _IM_END, *(f"<|extra_{i}|>" for i in range(205)))
_CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class QwenVocabularyError(ValueError):
    """The file holds no ranks, or not all of them."""


def load_qwen_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of a `qwen.tiktoken`, and what `PreTrainedTokenizerFast` wants to know beside it.

    Raises:
        QwenVocabularyError: the file is damaged; the message names it.
    """
    from transformers.convert_slow_tokenizer import TikTokenConverter  # 1 s, and only these files need it

    class Converter(TikTokenConverter):
        """With a reader of our own: the library's needs one package more, and copies files to /tmp."""

        load_tiktoken_bpe = staticmethod(_read_ranks)

    tokenizer: Tokenizer = Converter(str(path), _SPLIT, extra_special_tokens=_SPECIAL).converted()
    tokenizer.normalizer = normalizers.NFC()
    extras = {"eos_token": _IM_END, "pad_token": _ENDOFTEXT, "chat_template": _CHATML}
    return tokenizer, extras


def _read_ranks(tiktoken_url: str) -> dict[bytes, int]:
    """Of a file, whatever the library calls its path. A line is a token in base64, a blank, and its rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(Path(tiktoken_url).read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise QwenVocabularyError(f"{tiktoken_url}: line {number} is no token and rank") from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise QwenVocabularyError(f"{tiktoken_url}: tokens are missing; the file may be cut off")
    return ranks
