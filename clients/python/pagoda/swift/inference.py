"""`inference_vllm` and `inference_stream_vllm`: lists of requests, answered side by side."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

from pagoda.client import Stream
from pagoda.errors import InvalidRequest, PagodaError, ServerError
from pagoda.swift.engine import Engine
from pagoda.swift.generation import VllmGenerationConfig
from pagoda.swift.templates import Template, history_of
from pagoda.swift.unsupported import refuse
from pagoda.types import Chunk

MAX_AT_ONCE = 256
_NOT_YET: dict[str, Any] = {"lora_request": None, "max_batch_size": None, "verbose": False}
_OF_STREAMS: dict[str, Any] = {"flush_steps": None, "lora_request": None}

Response = dict[str, Any]
Event = tuple[int, Chunk | None, BaseException | None]  # of the request at a place: neither is its end


def inference_vllm(
    llm_engine: Engine,
    template: Template,
    request_list: Sequence[Mapping[str, Any]],
    *,
    generation_config: VllmGenerationConfig | None = None,
    generation_info: dict[str, Any] | None = None,
    use_tqdm: bool = False,
    **unsupported: Any,
) -> list[Response]:
    """Answer every request of `{"query": ..., "history": [[query, response], ...], "system": ...}`.

    Returns, in their order, `{"response": ..., "history": ...}`, the history with this turn at its end. Where
    the configuration's `n` is above 1, "responses" has all of them, of which "response" is the first.
    `generation_info` is cleared and filled: num_prompt_tokens, num_generated_tokens, num_samples, runtime
    (seconds), samples/s and tokens/s.

    Raises:
        InvalidRequest: an argument or a part of a request that is not supported.
        PagodaError: what became of a request; the others are cancelled.
    """
    refuse("inference_vllm", unsupported, _NOT_YET)
    batch = _Batch(llm_engine, template, request_list, generation_config, generation_info, use_tqdm)
    for _ in batch.run():
        pass
    return [response for response in batch.responses() if response is not None]


def inference_stream_vllm(
    llm_engine: Engine,
    template: Template,
    request_list: Sequence[Mapping[str, Any]],
    *,
    generation_config: VllmGenerationConfig | None = None,
    generation_info: dict[str, Any] | None = None,
    use_tqdm: bool = False,
    **unsupported: Any,
) -> Generator[list[Any], None, None]:
    """As `inference_vllm`, while the answers come: each item is the whole list, with the text so far.

    An entry is None until its first token has come; a lone request's never is, because nothing is handed out
    before. `generation_info` is up to date with each item. Closing the iterator cancels what still runs.
    """
    refuse("inference_stream_vllm", unsupported, _OF_STREAMS)
    batch = _Batch(llm_engine, template, request_list, generation_config, generation_info, use_tqdm)
    return batch.stream()


class _Batch:
    """The requests of one call, and what has come of them."""

    def __init__(
        self,
        engine: Engine,
        template: Template,
        requests: Sequence[Mapping[str, Any]],
        config: VllmGenerationConfig | None,
        info: dict[str, Any] | None,
        use_tqdm: bool,
    ) -> None:
        config = engine.generation_config if config is None else config
        if not isinstance(config, VllmGenerationConfig):
            message = f"generation_config: {config!r} is not a pagoda.swift.VllmGenerationConfig"
            raise InvalidRequest(message, field="generation_config")
        self._engine = engine
        self._requests = [(request["query"], history_of(request)) for request in map(_checked, requests)]
        self._options = _options(engine, template, config)
        self._prompts = [template.prompt(request) for request in requests]
        self._info = {} if info is None else info
        self._use_tqdm = use_tqdm
        self._n = config.n
        self._texts: list[list[str] | None] = [None] * len(requests)  # of each of the n samples, so far
        self._num_ended = 0

    def responses(self) -> list[Response | None]:
        """What has come so far, in the order of the requests."""
        return [
            None if texts is None else self._response(texts, query, history)
            for texts, (query, history) in zip(self._texts, self._requests, strict=True)
        ]

    def _response(self, texts: list[str], query: str, history: Sequence[Sequence[str]]) -> Response:
        response: Response = {"response": texts[0], "history": [*map(list, history), [query, texts[0]]]}
        if self._n > 1:
            response["responses"] = list(texts)
        return response

    def stream(self) -> Generator[list[Response | None], None, None]:
        """The responses each time that something has come."""
        with closing(self.run()) as steps:
            for _ in steps:
                yield self.responses()

    def run(self) -> Generator[None, None, None]:
        """Ask everything; a turn each time that something has come. Raises PagodaError."""
        begin = time.perf_counter()
        self._info.clear()
        self._info.update(num_prompt_tokens=0, num_generated_tokens=0, num_samples=len(self._requests))
        self._account(begin)
        with _progress(len(self._requests), self._use_tqdm) as progress, _Side(self._ask) as side:
            side.start(len(self._requests))
            while self._num_ended < len(self._requests):
                ended_before, has_news = self._num_ended, False
                for event in side.news():
                    has_news |= self._accept(*event)
                progress(self._num_ended - ended_before)
                self._account(begin)
                if has_news:
                    yield

    def _ask(self, place: int) -> Stream:
        prompt = self._prompts[place]
        if "messages" in prompt:
            return self._engine.client.stream_chat(prompt["messages"], **self._options)
        return self._engine.client.stream(prompt["prompt"], **self._options)

    def _accept(self, place: int, chunk: Chunk | None, error: BaseException | None) -> bool:
        """Take an event; whether it brought something to show."""
        if isinstance(error, PagodaError):
            raise self._engine.explain(error) from error
        if error is not None:
            raise error
        texts = self._texts[place]
        is_first = texts is None
        if texts is None:
            texts = self._texts[place] = [""] * self._n
        if chunk is None:
            self._num_ended += 1
            return is_first
        if chunk.finish_reason in ("error", "cancelled"):
            raise ServerError(f"the request at place {place} ended with {chunk.finish_reason}")
        self._info["num_generated_tokens"] += len(chunk.token_ids)
        if chunk.usage is not None:
            self._info["num_prompt_tokens"] += chunk.usage.prompt_tokens
        texts[chunk.index] += chunk.text
        return True

    def _account(self, begin: float) -> None:
        runtime = time.perf_counter() - begin
        self._info["runtime"] = runtime
        self._info["samples/s"] = self._num_ended / runtime
        self._info["tokens/s"] = self._info["num_generated_tokens"] / runtime


class _Side:
    """Streams followed side by side, by threads: it works inside a running event loop as well as without."""

    def __init__(self, ask: Any) -> None:
        self._ask = ask
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._running: set[Stream] = set()
        self._closed = threading.Event()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for stream in list(self._running):
            stream.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def start(self, count: int) -> None:
        """Follow the streams that `ask` opens for the places 0 to `count` - 1."""
        self._pool = ThreadPoolExecutor(max(1, min(count, MAX_AT_ONCE)), thread_name_prefix="pagoda-swift")
        for place in range(count):
            self._pool.submit(self._follow, place)

    def news(self) -> list[Event]:
        """Everything that has come, waiting for the first."""
        events = [self._events.get()]
        while not self._events.empty():
            events.append(self._events.get())
        return events

    def _follow(self, place: int) -> None:
        try:
            with self._ask(place) as stream:
                self._running.add(stream)
                try:
                    if not self._closed.is_set():
                        for chunk in stream:
                            self._events.put((place, chunk, None))
                finally:
                    self._running.discard(stream)
            self._events.put((place, None, None))
        except BaseException as error:
            self._events.put((place, None, error))  # raised where the events are read


def _checked(request: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(request, Mapping) or "query" not in request:
        raise InvalidRequest(f"{request!r} is not a request: it has no 'query'", field="query")
    return request


def _options(engine: Engine, template: Template, config: VllmGenerationConfig) -> dict[str, Any]:
    """The SDK's options. The template's end of an answer is told to the server as a token, else as text."""
    options = {"model": engine.served_name, **config.options()}
    if template.suffix is not None:
        token = engine.single_token(template.suffix)
        if token is not None:
            options["stop_token_ids"] = [token]
        else:
            options["stop"] = [*options["stop"], template.suffix]
    return options


@contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[int], object]]:
    """A function that moves a progress bar, where one is wanted."""
    if not wanted:
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, dynamic_ncols=True) as bar:
        yield bar.update
