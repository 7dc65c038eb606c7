"""Grammars that outputs follow: which tokens each such row may draw next.

A row's matcher is llguidance's. It starts from the output tokens that the row enters with, so that a first
run, a resume and a replay are one, and follows what the device draws. The masks of an iteration are filled
while its forward runs: the host, having launched it, waits for the tokens of the iteration before, which the
device has drawn by then. A mask that takes longer than a forward makes nobody wait but its row, which sits
that iteration out (see `kernels.rows.hold`).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import structlog
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask

from gpu_worker.batch import ALIGNMENT
from kernels.rows import GOES_ON, HELD
from pagoda.internal.v1 import worker_pb2
from pagoda.v1 import scheduler_pb2

NUM_THREADS = 2
NUM_FILLERS = min(8, len(os.sched_getaffinity(0)))
# How long to sleep between two looks at masks that are being filled.
LOOK_EVERY_S = 20e-6
FREE = -1
# Rows of one grammar share its lexers, which get faster with use, but serve one row at a time.
NUM_LEXERS = min(8, max(1, len(os.sched_getaffinity(0)) // 2))
NUM_COMPILED = 64 * NUM_LEXERS  # kept

Constrained = Sequence[tuple[int, int]]
"""Rows of a batch that follow grammars: place among the sampling rows, and slot."""


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
    """A row's matcher, and what it may draw next (int32[1, W], a bit a token), there when that is done."""

    matcher: Future[LLMatcher]
    bits: np.ndarray
    ended: bool = False


Entering = dict[int, Row]
"""A step's new rows, by slot."""


class Grammars:
    """Matchers of the rows in slots. `learn` and `prepare` belong to the thread that receives steps, all else
    to the one that runs them; what takes long is done by threads of its own."""

    def __init__(self, vocab_size: int, max_slots: int, device: torch.device) -> None:
        self._vocab_size, self._words = vocab_size, -(-vocab_size // 32)
        self._on_device = device.type != "cpu"
        # Which mask is each row's, and the masks, at a fixed place of the device: a graph may read them.
        self._start = -(-max_slots // ALIGNMENT) * ALIGNMENT
        size = self._start + max_slots * self._words
        self._staged = torch.full((size,), FREE, dtype=torch.int32, pin_memory=self._on_device)
        self._there = self._staged.to(device)
        # What the last iteration drew, and whose it is, by place.
        self._drawn = torch.empty(2 * max_slots, dtype=torch.int32, pin_memory=self._on_device)
        self._values = self._drawn
        self._unread: list[tuple[int, Row]] = []
        if self._on_device:
            self._forward, self._draw = torch.cuda.Event(), torch.cuda.Event()
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._vocabulary: scheduler_pb2.Vocabulary | None = None
        self._tokens: Future[_Tokens] = Future()
        self._tokens.set_exception(ValueError("no vocabulary has come"))
        self._compiled = lru_cache(NUM_COMPILED)(
            lambda grammar, lexer: self._threads.submit(_compiled, self._tokens, grammar)
        )
        self._fillers = ThreadPoolExecutor(NUM_FILLERS, thread_name_prefix="masks")
        self._rows: dict[int, Row] = {}

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
            output, bits = row.tokens[row.num_prompt_tokens :], np.zeros((1, self._words), np.int32)
            entering[row.slot] = Row(self._threads.submit(_started, compiled, output, bits), bits)
        return entering

    def clear(self) -> None:
        """Forget all rows."""
        self._rows.clear()
        self._unread = []

    def change(self, released: Iterable[int], entering: Entering) -> None:
        """Follow a step's changes of rows."""
        for slot in released:
            self._rows.pop(slot, None)
        self._rows.update(entering)

    def masks(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where an iteration of so many rows finds which mask is whose (int32[num_rows], see
        `kernels.sample.allow` and `kernels.rows.hold`) and the masks (int32[max_slots, W]): the same places
        each time."""
        return self._there[:num_rows], self._there[self._start :].view(-1, self._words)

    def fill(
        self, constrained: Constrained, num_rows: int, may_hold: bool,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """Put what rows may draw next where `masks` says, for the work queued from here on. A row whose
        grammar failed may draw nothing, and so fails.

        Waits for what the iterations so far drew, and for all masks; with `may_hold` only until the device
        is done with the forward that is queued by now. Before, it calls `meanwhile`.
        """
        if self._on_device:
            self._forward.record()
        self._catch_up()
        rows = [(place, row) for place, slot in constrained if not (row := self._rows[slot]).ended]
        if meanwhile is not None:
            meanwhile()
        matchers = [row.matcher for _, row in rows]
        if not (may_hold and self._on_device):
            wait(matchers)
        while not all(matcher.done() for matcher in matchers) and not self._forward.query():
            time.sleep(LOOK_EVERY_S)
        staged = self._staged.numpy()
        bits = staged[self._start :].reshape(-1, self._words)
        staged[:num_rows] = FREE
        for i, (place, row) in enumerate(rows):
            if not row.matcher.done():
                staged[place] = HELD
                continue
            staged[place] = i
            bits[i] = row.bits[0] if self._goes_on(row) else 0
            self._unread.append((place, row))
        if self._on_device:
            size = self._start + len(rows) * self._words
            self._there[:size].copy_(self._staged[:size], non_blocking=True)

    def follow(self, drawn: torch.Tensor) -> None:
        """Note what the iteration drew whose masks were the last: int32[2, R] on the device, see
        `kernels.rows.accept`."""
        self._values = self._drawn[: drawn.numel()].view(drawn.shape)
        self._values.copy_(drawn, non_blocking=True)
        if self._on_device:
            self._draw.record()

    def _catch_up(self) -> None:
        """Let matchers follow what was drawn. From then on nothing on the device uses what was staged."""
        if self._on_device:
            self._draw.synchronize()
        tokens, outcomes = self._values.tolist() if self._unread else ((), ())
        for place, row in self._unread:
            row.ended = row.ended or outcomes[place] != GOES_ON
            if not row.ended:
                matcher = row.matcher.result()
                row.matcher = self._fillers.submit(_filled, matcher, [tokens[place]], row.bits)
        self._unread = []

    def _goes_on(self, row: Row) -> bool:
        """Whether the matcher of a row, which is done, has not failed."""
        if (error := row.matcher.exception()) is None:
            return True
        row.ended = True
        # Without what it quotes: outputs and schemas are nobody's but their owner's.
        reason = re.split('["\n]', str(error), maxsplit=1)[0]
        structlog.get_logger().warning("a grammar failed", service="worker", reason=reason)
        self._compiled.cache_clear()  # what was shared may be what failed
        return False


def _compiled(tokens: Future[_Tokens], grammar: str) -> LLMatcher:
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(tokens.result().made, grammar, log_level=0, limits=limits)
    matcher.compute_bitmask()  # the first takes longest
    return matcher


def _started(compiled: Future[LLMatcher], output: list[int], bits: np.ndarray) -> LLMatcher:
    return _filled(compiled.result().deep_copy(), output, bits)


def _filled(matcher: LLMatcher, tokens: list[int], bits: np.ndarray) -> LLMatcher:
    """Let a matcher follow tokens, and fill its mask."""
    matcher.consume_tokens(tokens)
    fill_next_token_bitmask(matcher, bits)
    if matcher.is_error():  # llguidance lets one that fails end as if it were done
        raise ValueError(matcher.get_error())
    return matcher
