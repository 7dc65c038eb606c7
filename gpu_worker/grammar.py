"""Grammars that outputs follow: which tokens each such row may draw next.

A row's matcher is llguidance's. It starts from the output tokens that the row enters with, so that a first
run, a resume and a replay are one, and follows what the device draws. The masks of an iteration are filled
while its forward runs: the host, having launched it, waits for the tokens of the iteration before, which the
device has drawn by then. So the device waits for masks only where they take longer than a forward.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import structlog
import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask_par

from gpu_worker.batch import ALIGNMENT
from kernels.rows import GOES_ON
from pagoda.internal.v1 import worker_pb2
from pagoda.v1 import scheduler_pb2

NUM_THREADS = 2
# Rows of one grammar share its lexers, which get faster with use, but serve one row at a time.
NUM_LEXERS = min(8, max(1, len(os.sched_getaffinity(0)) // 2))
NUM_COMPILED = 64 * NUM_LEXERS  # kept

Entering = dict[int, Future[LLMatcher]]
"""Matchers of a step's new rows, by slot."""
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
class _Row:
    matcher: Future[LLMatcher]
    ended: bool = False


class Grammars:
    """Matchers of the rows in slots. `learn` and `prepare` belong to the thread that receives steps, all else
    to the one that runs them; what takes long is done by threads of its own."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._on_device = device.type != "cpu"
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._vocabulary: scheduler_pb2.Vocabulary | None = None
        self._tokens: Future[_Tokens] = Future()
        self._tokens.set_exception(ValueError("no vocabulary has come"))
        self._compiled = lru_cache(NUM_COMPILED)(
            lambda grammar, lexer: self._threads.submit(_compiled, self._tokens, grammar)
        )
        self._fillers = LLExecutor()
        self._rows: dict[int, _Row] = {}
        # What iterations drew, int32[2, R] in host memory, there after an event; and whose it is, by place.
        self._unread: deque[tuple[torch.cuda.Event | None, torch.Tensor, list[tuple[int, _Row]]]] = deque()

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
            entering[row.slot] = self._threads.submit(_started, compiled, output)
        return entering

    def clear(self) -> None:
        """Forget all rows."""
        self._rows.clear()
        self._unread.clear()

    def change(self, released: Iterable[int], entering: Entering) -> None:
        """Follow a step's changes of rows."""
        for slot in released:
            self._rows.pop(slot, None)
        self._rows.update((slot, _Row(matcher)) for slot, matcher in entering.items())

    def masks(self, constrained: Constrained) -> tuple[torch.Tensor, torch.Tensor]:
        """What rows may draw next: their places (int32[G]) and a bit a token (int32[G, W]), on the device for
        the work queued from here on. A row whose grammar failed may draw nothing, and so fails.

        Waits for what the iterations so far drew; call it when the forward is queued.
        """
        self._catch_up()
        count, words = len(constrained), -(-self._vocab_size // 32)
        start = -(-count // ALIGNMENT) * ALIGNMENT
        # Pinned memory is torch's, which uses none again before the copy out of it is done.
        packed = torch.zeros(start + count * words, dtype=torch.int32, pin_memory=self._on_device)
        packed[:count] = torch.tensor([place for place, _ in constrained], dtype=torch.int32)
        bits = packed[start:].view(count, words)
        rows = [self._rows[slot] for _, slot in constrained]
        ready = [(row.matcher.result(), i) for i, row in enumerate(rows) if self._goes_on(row)]
        if ready:
            fill_next_token_bitmask_par(self._fillers, ready, bits.numpy())
        for _, i in ready:
            if not self._goes_on(rows[i]):
                bits[i] = 0  # llguidance lets a matcher that fails end as if it were done
        packed = packed.to(self._device, non_blocking=True)
        return packed[:count], packed[start:].view(count, words)

    def follow(self, constrained: Constrained, drawn: torch.Tensor) -> None:
        """Note what an iteration draws: int32[2, R] on the device, see `kernels.rows.accept`."""
        values = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=self._on_device)
        values.copy_(drawn, non_blocking=True)
        event = None
        if self._on_device:
            event = torch.cuda.Event()
            event.record()
        self._unread.append((event, values, [(place, self._rows[slot]) for place, slot in constrained]))

    def _catch_up(self) -> None:
        while self._unread:
            event, values, rows = self._unread.popleft()
            if event is not None:
                event.synchronize()
            tokens, outcomes = values.tolist()
            for place, row in rows:
                row.ended = row.ended or outcomes[place] != GOES_ON
                if not row.ended:
                    row.matcher.result().consume_token(tokens[place])

    def _goes_on(self, row: _Row) -> bool:
        """Whether a row has not ended, nor its matcher failed. Waits for a matcher that is being made."""
        if row.ended:
            return False
        error = row.matcher.exception()
        if error is None and not (matcher := row.matcher.result()).is_error():
            return True
        row.ended = True
        # Without what it quotes: outputs and schemas are nobody's but their owner's.
        reason = re.split('["\n]', str(error or matcher.get_error()), maxsplit=1)[0]
        structlog.get_logger().warning("a grammar failed", service="worker", reason=reason)
        self._compiled.cache_clear()  # what was shared may be what failed
        return False


def _compiled(tokens: Future[_Tokens], grammar: str) -> LLMatcher:
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(tokens.result().made, grammar, log_level=0, limits=limits)
    matcher.compute_bitmask()  # the first takes longest
    return matcher


def _started(compiled: Future[LLMatcher], output: list[int]) -> LLMatcher:
    matcher = compiled.result().deep_copy()
    matcher.consume_tokens(output)
    return matcher
