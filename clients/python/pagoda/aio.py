"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from pagoda import calls
from pagoda.errors import Cancelled, PagodaError, from_grpc
from pagoda.types import Chunk, Completion, Messages, Model, Options, Prompt
from pagoda.v1 import inference_pb2 as pb
from pagoda.v1 import inference_pb2_grpc


class AsyncStream(calls.StreamBase):
    """The chunks of one request, as they come; leaving its `async with` block, or `aclose()`, cancels it."""

    def __init__(self, tries: _Tries) -> None:
        self._tries: _Tries = tries
        # The generator knows the tries but not this object, so that dropping the stream ends it at once.
        self._chunks = tries.follow()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel the request; a task that waits for a chunk gets `Cancelled`."""
        self._tries.close()


class _Tries(calls.Tries):
    async def follow(self) -> AsyncIterator[Chunk]:
        while not self._closed.is_set():
            call = self._call = self._start(self.progress.next_request(), timeout=self._deadline.remaining())
            try:
                async for response in call:
                    chunk = self.progress.accept(response)
                    self._retries.progressed()
                    yield chunk
                return
            except asyncio.CancelledError:
                # grpc says the same for "this task is cancelled" and "somebody cancelled the call".
                if self._closed.is_set() and not _task_is_cancelled():
                    break
                raise
            except grpc.RpcError as failure:
                if self.progress.complete:  # only the stream's end was lost
                    return
                error = from_grpc(failure, self.progress.request_id)
            finally:
                call.cancel()
            await self._sleep(self._retries.delay_after(error))
        raise Cancelled("the stream was closed", request_id=self.progress.request_id)

    async def _sleep(self, seconds: float) -> None:
        closing = asyncio.ensure_future(self._closed.wait())
        try:
            await asyncio.wait({closing}, timeout=seconds)
        finally:
            closing.cancel()


class AsyncClient(calls.ClientBase):
    """A client of a gateway's gRPC port, for one event loop; tasks may share it.

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
        calls.target_of(url)  # a bad address is refused here rather than at the first call
        self._url = url
        self._channel: Any = None
        self._lazy_stub: Any = None

    @property
    def _stub(self) -> Any:
        # A channel belongs to the loop that runs when it is made, so it is made by the first call.
        if self._lazy_stub is None:
            self._channel = calls.open_channel(self._url, grpc.aio)
            self._lazy_stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        return self._lazy_stub

    async def close(self) -> None:
        """Close the connection; what runs on it is cancelled."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = self._lazy_stub = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Continue `prompt`, text or token ids."""
        return await _drain(self.stream(prompt, **options))

    async def chat(self, messages: Messages, **options: Unpack[Options]) -> Completion:
        """Answer a conversation: mappings with `role` and `content`, oldest first."""
        return await _drain(self.stream_chat(messages, **options))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncStream:
        """Continue `prompt`, chunk by chunk."""
        return self._open(prompt, None, options)

    def stream_chat(self, messages: Messages, **options: Unpack[Options]) -> AsyncStream:
        """Answer a conversation, chunk by chunk."""
        return self._open(None, messages, options)

    async def batch(
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
        todo = iter(range(len(items)))

        async def work() -> None:
            for index in todo:
                try:
                    results[index] = await _drain(self._open(*calls.split_item(items[index], options)))
                except PagodaError as error:
                    if not return_errors:
                        raise
                    results[index] = error

        tasks = [asyncio.create_task(work()) for _ in range(max(1, min(concurrency, len(items))))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return results

    async def tokenize(self, text: str | Messages, model: str = "") -> list[int]:
        """Token ids of a text, or of a chat through the model's template."""
        request = calls.tokenize_request(text, model)
        return list((await self._unary(self._stub.Tokenize, request)).token_ids)

    async def models(self) -> list[Model]:
        """The models that are served."""
        response = await self._unary(self._stub.ListModels, pb.ListModelsRequest())
        return [calls.model_of(m) for m in response.models]

    def _open(self, prompt: Prompt | None, messages: Messages | None, options: Options) -> AsyncStream:
        prepared = self._prepare(prompt, messages, options)
        return AsyncStream(_Tries(self._generate, *prepared, asyncio.Event()))

    def _generate(self, request: pb.GenerateRequest, timeout: float | None) -> Any:
        return self._stub.Generate(request, timeout=timeout, metadata=self._metadata)

    async def _unary(self, method: Callable[..., Any], request: Any) -> Any:
        deadline = calls.Deadline(self._timeout)
        retries = self._retries(deadline)
        while True:
            try:
                return await method(request, timeout=deadline.remaining(), metadata=self._metadata)
            except grpc.RpcError as failure:
                error = from_grpc(failure)
            await asyncio.sleep(retries.delay_after(error))


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _drain(stream: AsyncStream) -> Completion:
    async with stream:
        async for _ in stream:
            pass
    return stream.completion
