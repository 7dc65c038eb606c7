"""Grammars that outputs follow: which tokens each such row may draw next.

A row's matcher is llguidance's. It starts from the output tokens that the row enters with, so that a first
run, a resume and a replay are one, and follows what the device draws. Masks are filled by threads while the
device runs, which is never waited for and never waits: it writes what rows drew into host memory, looks there
for their masks when it comes to draw again, and a row whose mask is not there sits that iteration out (see
`kernels.rows.Masks`). Only a row's first mask is waited for, before the step that needs it.
"""

from __future__ import annotations

import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import structlog
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from kernels.rows import FREE, Masks
from pagoda.internal.v1 import worker_pb2
from pagoda.v1 import scheduler_pb2

NUM_THREADS = 2
NUM_FILLERS = min(8, len(os.sched_getaffinity(0)))
# How long to sleep between two looks at what rows drew: while they draw, and after a while without.
LOOK_EVERY_S, IDLE_LOOK_EVERY_S, IDLE_S = 20e-6, 1e-3, 0.02
# Masks beyond one for each slot, so that one that is given back is rarely wanted at once.
SPARE_MASKS = 64
# Rows of one grammar share its lexers, which get faster with use, but serve one row at a time.
NUM_LEXERS = min(8, max(1, len(os.sched_getaffinity(0)) // 2))
NUM_COMPILED = 64 * NUM_LEXERS  # kept


class _Tokens:
    """A vocabulary as `TokenizerWrapper` wants one. It cannot tokenize as the model's tokenizer does."""

    bos_token_id = None

    def __init__(self, vocabulary: scheduler_pb2.Vocabulary, vocab_size: int) -> None:
        if vocabulary.eos_token_id >= vocab_size:
            raise ValueError(f"EOS {vocabulary.eos_token_id} is not below the vocabulary's {vocab_size}")
        tokens = vocabulary.tokens[:vocab_size]
        self.tokens = [*tokens, *[b""] * (vocab_size - len(tokens))]
        self.special_token_ids = [i for i in vocabulary.special_token_ids if i < vocab_size]
        self.eos_token_id = vocabulary.eos_token_id
        self.made = LLTokenizer(TokenizerWrapper(self))

    def __call__(self, text: str) -> list[int]:
        """For grammars that force their fixed parts: the longest tokens."""
        return self.made.greedy_tokenize(text)


@dataclass(eq=False)
class Row:
    """A row that follows a grammar, in or on its way to a slot.

    Attributes:
        started: its matcher, once it has followed the output that the row enters with, and its first mask.
        matcher: the same, from its first draw on; None where its grammar failed.
        num_tokens: with how many tokens the row draws next.
        mask: the place of its mask, from its first draw on.
        has_job: whether a thread is at its mask, or will be.
        ended: whether it needs no more masks.
    """

    started: Future[tuple[LLMatcher, np.ndarray]]
    num_tokens: int
    matcher: LLMatcher | None = None
    mask: int = FREE
    has_job: bool = False
    ended: bool = False


Entering = dict[int, Row]
"""A step's new rows, by slot."""


class Grammars:
    """Matchers of the rows in slots. `learn` and `prepare` belong to the thread that receives steps, all else
    to the one that runs them; what takes long is done by threads of its own.

    Attributes:
        masks: what rows may draw, where the device looks for it.
    """

    def __init__(self, vocab_size: int, max_slots: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._on_device = device.type != "cpu"
        count, pin = max_slots + SPARE_MASKS, self._on_device
        self.masks = Masks(
            of_slot=torch.full((max_slots + 1,), FREE, dtype=torch.int32, device=device),
            bits=torch.zeros((count, -(-vocab_size // 32)), dtype=torch.int32, pin_memory=pin),
            num_tokens=torch.zeros(count, dtype=torch.int32, pin_memory=pin),
            drawn=torch.zeros(count, dtype=torch.int64, pin_memory=pin),
        )
        self._bits, self._num_tokens = self.masks.bits.numpy(), self.masks.num_tokens.numpy()
        self._address, self._size = self._bits.ctypes.data, self._bits[0].nbytes
        self._drawn = self.masks.drawn.numpy()
        self._seen = self._drawn.copy()
        # Masks that no row uses, each with the row that did and an event after the device's last look at it.
        self._spare: deque[tuple[int, Row | None, torch.cuda.Event | None]] = deque(
            (mask, None, None) for mask in range(count)
        )
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._vocabulary: scheduler_pb2.Vocabulary | None = None
        self._tokens: Future[_Tokens] = Future()
        self._tokens.set_exception(ValueError("no vocabulary has come"))
        self._compiled = lru_cache(NUM_COMPILED)(
            lambda grammar, lexer: self._threads.submit(_compiled, self._tokens, grammar)
        )
        self._rows: dict[int, Row] = {}  # by slot
        self._drawing: dict[int, Row] = {}  # by mask
        self._is_stale = False  # whether the device knows another `of_slot`
        self._jobs: queue.SimpleQueue[tuple[Row, int]] = queue.SimpleQueue()
        self._anyone = threading.Event()
        if self._on_device:
            for target in [self._watch, *[self._work] * NUM_FILLERS]:
                threading.Thread(target=target, name="masks", daemon=True).start()

    def learn(self, vocabulary: scheduler_pb2.Vocabulary) -> None:
        """What tokens stand for, from here on."""
        if vocabulary != self._vocabulary:
            self._vocabulary = vocabulary
            self._tokens = self._threads.submit(_Tokens, vocabulary, self._vocab_size)
            self._compiled.cache_clear()

    def prepare(self, step: worker_pb2.Step) -> Entering:
        """Begin to make the matchers of a step that is still to be run."""
        rows = [row for row in step.new_rows if row.sampling.grammar]
        entering = {}
        for i, row in enumerate(rows, len(self._rows)):
            compiled = self._compiled(row.sampling.grammar, i % NUM_LEXERS)
            output = row.tokens[row.num_prompt_tokens :]
            started = self._threads.submit(_started, compiled, output, self._bits.shape[1])
            entering[row.slot] = Row(started, row.num_prompt_tokens + len(output))
        return entering

    def clear(self) -> None:
        """Forget all rows."""
        self.change(list(self._rows), {})

    def change(self, released: Iterable[int], entering: Entering) -> None:
        """Follow a step's changes of rows."""
        gone = [row for slot in released if (row := self._rows.pop(slot, None)) is not None]
        event = torch.cuda.Event() if gone and self._on_device else None
        if event is not None:
            event.record()
        for row in gone:
            row.ended = True
            if row.mask != FREE:
                del self._drawing[row.mask]
                self._spare.append((row.mask, row, event))
                self._is_stale = True
        self._rows.update(entering)

    def begin(self, slots: Sequence[int]) -> None:
        """Before a step that these rows draw in: wait for first masks, and tell the device whose each is."""
        for slot in slots:
            if (row := self._rows[slot]).mask == FREE:
                self._start(row)
                self._is_stale = True
        if self._is_stale:
            self._is_stale = False
            of_slot = torch.full(
                self.masks.of_slot.shape, FREE, dtype=torch.int32, pin_memory=self._on_device
            )
            for slot, row in self._rows.items():
                of_slot[slot] = row.mask
            # Pinned memory is torch's, which uses none again before the copy out of it is done.
            self.masks.of_slot.copy_(of_slot, non_blocking=True)

    def _start(self, row: Row) -> None:
        row.mask, last, event = self._spare.popleft()
        while last is not None and last.has_job:
            time.sleep(LOOK_EVERY_S)
        if event is not None:
            event.synchronize()
        self._seen[row.mask] = self._drawn[row.mask]
        try:
            row.matcher, self._bits[row.mask] = row.started.result()
        except Exception as error:  # llguidance's, of several kinds
            self._failed(row, error)
        self._num_tokens[row.mask] = row.num_tokens
        self._drawing[row.mask] = row
        self._anyone.set()

    def settle(self) -> None:
        """Where the host computes itself: fill the masks that the draws so far ask for."""
        if not self._on_device:
            for row, token in self._look():
                self._fill(row, token)

    def _look(self) -> list[tuple[Row, int]]:
        """Rows that have drawn since the last look and go on, and their tokens."""
        drawn = self._drawn.copy()
        jobs = []
        for mask in np.flatnonzero(drawn != self._seen).tolist():
            value = int(drawn[mask])
            self._seen[mask] = value
            row = self._drawing.get(mask)
            if row is None or row.ended or value >> 32 != row.num_tokens + 1:
                continue
            row.num_tokens += 1
            row.ended = bool(value >> 31 & 1)
            if not row.ended:
                jobs.append((row, value & 0x7FFFFFFF))
        return jobs

    def _watch(self) -> None:
        last = time.monotonic()
        while self._anyone.wait():
            if not self._drawing:
                self._anyone.clear()
                if self._drawing:  # since a moment ago
                    self._anyone.set()
                continue
            if jobs := self._look():
                last = time.monotonic()
            for row, token in jobs:
                row.has_job = True
                self._jobs.put((row, token))
            time.sleep(LOOK_EVERY_S if time.monotonic() - last < IDLE_S else IDLE_LOOK_EVERY_S)

    def _work(self) -> None:
        while True:
            row, token = self._jobs.get()
            if not row.ended:
                self._fill(row, token)
            row.has_job = False

    def _fill(self, row: Row, token: int) -> None:
        """Let a row's matcher follow `token` and put its mask where the device looks."""
        if row.matcher is not None:
            try:
                row.matcher.consume_token(token)
                _fill_mask(row.matcher, self._address + row.mask * self._size, self._size)
            except Exception as error:
                self._failed(row, error)
        self._num_tokens[row.mask] = row.num_tokens

    def _failed(self, row: Row, error: Exception) -> None:
        """A row whose grammar failed may draw nothing, and so fails."""
        row.matcher = None
        self._bits[row.mask] = 0
        # Without what it quotes: outputs and schemas are nobody's but their owner's.
        reason = re.split('["\n]', str(error), maxsplit=1)[0]
        structlog.get_logger().warning("a grammar failed", service="worker", reason=reason)
        self._compiled.cache_clear()  # what was shared may be what failed


def _compiled(tokens: Future[_Tokens], grammar: str) -> LLMatcher:
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(tokens.result().made, grammar, log_level=0, limits=limits)
    matcher.compute_bitmask()  # the first takes longest
    return matcher


def _started(compiled: Future[LLMatcher], output: list[int], num_words: int) -> tuple[LLMatcher, np.ndarray]:
    matcher = compiled.result().deep_copy()
    matcher.consume_tokens(output)
    bits = np.zeros(num_words, np.int32)
    _fill_mask(matcher, bits.ctypes.data, bits.nbytes)
    return matcher, bits


def _fill_mask(matcher: LLMatcher, address: int, size: int) -> None:
    """Raises ValueError for a matcher that failed: llguidance lets it end as if it were done."""
    matcher.unsafe_compute_mask_ptr(address, size)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
