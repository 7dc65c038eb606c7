"""The synchronous client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from pagoda import calls
from pagoda.errors import Cancelled, PagodaError, from_grpc
from pagoda.types import Chunk, Completion, Messages, Model, Options, Prompt
from pagoda.v1 import inference_pb2 as pb
from pagoda.v1 import inference_pb2_grpc


class Stream(calls.StreamBase):
    """The chunks of one request, as they come; leaving its `with` block, or `close()`, cancels it."""

    def __init__(self, tries: _Tries) -> None:
        self._tries: _Tries = tries
        # The generator knows the tries but not this object, so that dropping the stream ends it at once.
        self._chunks = tries.follow()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel the request; another thread that waits for a chunk gets `Cancelled`."""
        self._tries.close()


class _Tries(calls.Tries):
    def follow(self) -> Iterator[Chunk]:
        while not self._closed.is_set():
            call = self._call = self._start(self.progress.next_request(), timeout=self._deadline.remaining())
            if self._closed.is_set():  # closed by another thread that did not see this call yet
                call.cancel()
            try:
                for response in call:
                    chunk = self.progress.accept(response)
                    self._retries.progressed()
                    yield chunk
                return
            except grpc.RpcError as failure:
                if self.progress.complete:  # only the stream's end was lost
                    return
                if self._closed.is_set():
                    break
                error = from_grpc(failure, self.progress.request_id)
            finally:
                call.cancel()
            self._closed.wait(self._retries.delay_after(error))
        raise Cancelled("the stream was closed", request_id=self.progress.request_id)


class Client(calls.ClientBase):
    """A client of a gateway's gRPC port; threads may share it.

    `timeout` is in seconds and covers a call with all its tries. A request that fails because the server is
    away or overloaded is submitted again, up to `max_retries` times in a row without progress, under the same
    request id and with the tokens that have come: nothing is repeated or lost.
    """

    def __init__(
        self,
        url: str = calls.DEFAULT_URL,
        token: str | None = None,
        timeout: float | None = None,
        max_retries: int = 2,
        backoff_s: float = 0.5,
    ) -> None:
        super().__init__(token, timeout, max_retries, backoff_s)
        self._channel = calls.open_channel(url)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection; what runs on it is cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Continue `prompt`, text or token ids."""
        return _drain(self.stream(prompt, **options))

    def chat(self, messages: Messages, **options: Unpack[Options]) -> Completion:
        """Answer a conversation: mappings with `role` and `content`, oldest first."""
        return _drain(self.stream_chat(messages, **options))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """Continue `prompt`, chunk by chunk."""
        return self._open(prompt, None, options)

    def stream_chat(self, messages: Messages, **options: Unpack[Options]) -> Stream:
        """Answer a conversation, chunk by chunk."""
        return self._open(None, messages, options)

    def batch(
        self,
        items: Sequence[Any],
        *,
        concurrency: int = 32,
        return_errors: bool = False,
        **options: Unpack[Options],
    ) -> list[Any]:
        """Run many requests, `concurrency` at a time; completions in the order of `items`.

        An item is a prompt, a chat, or a mapping with `prompt` or `messages` and options of its own. The
        first error cancels the rest and is raised; with `return_errors` it stands in its item's place.
        """
        results: list[Any] = [None] * len(items)
        running: set[Stream] = set()
        stopping = threading.Event()

        def run(index: int) -> None:
            try:
                stream = self._open(*calls.split_item(items[index], options))
                running.add(stream)
                if stopping.is_set():
                    stream.close()
                try:
                    results[index] = _drain(stream)
                finally:
                    running.discard(stream)
            except PagodaError as error:
                if not return_errors:
                    raise
                results[index] = error

        with ThreadPoolExecutor(max(1, min(concurrency, len(items)))) as pool:
            futures = [pool.submit(run, i) for i in range(len(items))]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for stream in list(running):
                    stream.close()
                raise
        return results

    def tokenize(self, text: str | Messages, model: str = "") -> list[int]:
        """Token ids of a text, or of a chat through the model's template."""
        return list(self._unary(self._stub.Tokenize, calls.tokenize_request(text, model)).token_ids)

    def models(self) -> list[Model]:
        """The models that are served."""
        return [calls.model_of(m) for m in self._unary(self._stub.ListModels, pb.ListModelsRequest()).models]

    def _open(self, prompt: Prompt | None, messages: Messages | None, options: Options) -> Stream:
        prepared = self._prepare(prompt, messages, options)
        return Stream(_Tries(self._generate, *prepared, threading.Event()))

    def _generate(self, request: pb.GenerateRequest, timeout: float | None) -> Any:
        return self._stub.Generate(request, timeout=timeout, metadata=self._metadata)

    def _unary(self, method: Callable[..., Any], request: Any) -> Any:
        deadline = calls.Deadline(self._timeout)
        retries = self._retries(deadline)
        while True:
            try:
                return method(request, timeout=deadline.remaining(), metadata=self._metadata)
            except grpc.RpcError as failure:
                error = from_grpc(failure)
            time.sleep(retries.delay_after(error))


def _drain(stream: Stream) -> Completion:
    with stream:
        for _ in stream:
            pass
    return stream.completion
