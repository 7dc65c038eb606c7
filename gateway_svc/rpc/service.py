"""`pagoda.v1.InferenceService`: the same text tier, over gRPC."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any, NoReturn

from grpc_status import rpc_status

from gateway_svc.errors import GatewayError, InvalidField, NotSupported, to_status
from gateway_svc.gateway import (
    MAX_REQUEST_ID_BYTES,
    MAX_SAMPLES_A_REQUEST,
    Call,
    Gateway,
    best_of,
    check_stops,
    new_request_id,
    new_seed,
    usage_of,
)
from gateway_svc.generation import Best, GenerationSpec, Job, Sample
from gateway_svc.text import grammars
from gateway_svc.text.tokenizer import Message
from pagoda.tracing import contexts_in
from pagoda.v1 import inference_pb2 as pb
from pagoda.v1 import inference_pb2_grpc as rpc
from pagoda.v1 import scheduler_pb2

Context = Any  # grpc.aio.ServicerContext; its stubs lack abort_with_status
# Of prompts, in one message: with 20 alternatives each, a tenth of what many clients take at most.
MOST_LOGPROBS = 2048
ROLES = frozenset(["system", "user", "assistant"])


class InferenceService(rpc.InferenceServiceServicer):
    """Text, chats or tokens in; text and tokens out."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Run one request and stream what comes."""
        gateway = self._gateway
        max_tokens = request.sampling.max_tokens if request.sampling.HasField("max_tokens") else None
        name = request.request_id or new_request_id()
        call = Call("Generate", name, time.monotonic(), stream=True, max_tokens=max_tokens)
        if gateway.spans is not None:
            operation = "chat" if request.HasField("chat") else "text_completion"
            gateway.spans.begin(call, operation, contexts_in(context.invocation_metadata()))
        job: Job | None = None
        failure: GatewayError | None = GatewayError("a fault in the gateway")  # unless we get to know better
        try:
            spec = await self._spec(request, call.request_id)
            job = gateway.start(call, [spec])
            async for response in self._responses(job, call):
                yield response
            failure = None
        except GatewayError as error:
            failure = error
        except (asyncio.CancelledError, GeneratorExit):
            failure = None  # the client left, or its time ran out: grpc cancels this task then
            raise
        finally:
            gateway.finish(call, job, failure)
        if failure is not None:
            await abort(context, failure)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Turn text or a chat into token ids."""
        gateway = self._gateway
        try:
            gateway.check_model(request.model)
            max_model_len = gateway.model_info().max_model_len
            if request.WhichOneof("input") == "chat":
                ids = await gateway.tokenizer.encode_chat(_messages(request.chat), **_options(request.chat))
            elif request.WhichOneof("input") == "text":
                ids = await gateway.tokenizer.encode(request.text, True)
            else:
                raise InvalidField("input", "is missing; give text or chat")
        except GatewayError as error:
            await abort(context, error)
        return pb.TokenizeResponse(token_ids=ids, max_model_len=max_model_len)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Describe one model."""
        try:
            self._gateway.check_model(request.model)
            return pb.GetModelResponse(model=self._model())
        except GatewayError as error:
            await abort(context, error)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """List what is served."""
        try:
            return pb.ListModelsResponse(models=[self._model()])
        except GatewayError as error:
            await abort(context, error)

    def _model(self) -> scheduler_pb2.ModelInfo:
        model = scheduler_pb2.ModelInfo()
        model.CopyFrom(self._gateway.model_info())
        model.name = self._gateway.model_name
        return model

    async def _spec(self, request: pb.GenerateRequest, request_id: str) -> GenerationSpec:
        """The request in tokens. Ranges of the sampling parameters are checked by the scheduler."""
        gateway = self._gateway
        gateway.check_model(request.model)
        if request.resume:
            raise NotSupported("resume")
        if len(request_id.encode()) > MAX_REQUEST_ID_BYTES:
            raise InvalidField("request_id", f"is longer than {MAX_REQUEST_ID_BYTES} bytes")
        sampling = scheduler_pb2.SamplingParams()
        sampling.CopyFrom(request.sampling)
        if not sampling.HasField("seed"):
            sampling.seed = new_seed()
        if not sampling.HasField("n"):
            sampling.n = 1
        if not 1 <= sampling.n <= MAX_SAMPLES_A_REQUEST:
            raise InvalidField("sampling.n", f"is {sampling.n}; must be from 1 to {MAX_SAMPLES_A_REQUEST}")
        await self._constrain(request, sampling)
        best = _best(request, sampling)
        return GenerationSpec(
            request_id=request_id,
            prompt=await self._prompt(request),
            sampling=sampling,
            stop=check_stops(request.stop),
            include_stop=request.include_stop_str_in_output,
            skip_special=request.skip_special_tokens if request.HasField("skip_special_tokens") else True,
            priority=request.priority,
            cache_salt=request.cache_salt,
            best=best,
        )

    async def _constrain(self, request: pb.GenerateRequest, sampling: scheduler_pb2.SamplingParams) -> None:
        """Let the outputs have the form that is asked for."""
        form = request.structured_output
        kind = form.WhichOneof("form")
        field = f"structured_output.{kind}" if kind else "sampling.grammar"
        if kind and sampling.grammar:
            raise InvalidField(field, "cannot be together with sampling.grammar")
        make: Callable[[], str]
        match kind:
            case "json_object":
                make = partial(grammars.json_object_grammar, field)
            case "json_schema":
                make = partial(grammars.json_schema_grammar, form.json_schema, field)
            case "regex":
                make = partial(grammars.regex_grammar, form.regex, field)
            case "choice":
                make = partial(grammars.choice_grammar, form.choice.texts, field)
            case "grammar":
                make = partial(grammars.lark_grammar, form.grammar, field)
            case _:
                make = partial(grammars.checked, sampling.grammar, field)
        if kind or sampling.grammar:
            await self._gateway.constrain(sampling, make, field)

    async def _prompt(self, request: pb.GenerateRequest) -> list[int]:
        gateway = self._gateway
        match request.WhichOneof("prompt"):
            case "text":
                return (await gateway.text_prompts([request.text], "text"))[0]
            case "chat":
                chat = request.chat
                return await gateway.chat_prompt(_messages(chat), "chat.messages", **_options(chat))
            case "token_ids":
                return gateway.token_prompt(request.token_ids.ids, "token_ids.ids")
            case _:
                raise InvalidField("prompt", "is missing; give text, chat or token_ids")

    async def _responses(self, job: Job, call: Call) -> AsyncIterator[pb.GenerateResponse]:
        """What comes, one message behind: the last one carries the usage."""
        waiting: pb.GenerateResponse | None = None
        is_first = True
        while news := await job.next():
            for response in itertools.chain.from_iterable(map(_news, news)):
                if is_first:
                    response.request_id = call.request_id
                    is_first = False
                if waiting is not None:
                    yield waiting
                waiting = response
            # Only what may be the last is kept back, so that no token waits for the next one.
            if waiting is not None and not all(s.finish_reason for s in job.results):
                yield waiting
                waiting = None
        if waiting is None:
            waiting = pb.GenerateResponse(request_id=call.request_id if is_first else "")
        waiting.usage.CopyFrom(usage_of(job))
        yield waiting


def _best(request: pb.GenerateRequest, sampling: scheduler_pb2.SamplingParams) -> Best | None:
    """Let more samples be drawn than are wanted, if that is asked for."""
    if not request.HasField("best_of"):
        return None
    if sampling.HasField("beam_width"):
        raise InvalidField("best_of", "is for samples that are drawn; leave it out with sampling.beam_width")
    if not sampling.n <= request.best_of <= MAX_SAMPLES_A_REQUEST:
        allowed = f"at least sampling.n, {sampling.n}, and at most {MAX_SAMPLES_A_REQUEST}"
        raise InvalidField("best_of", f"is {request.best_of}; must be {allowed}")
    return best_of(sampling, request.best_of)


def _news(sample: Sample) -> Iterator[pb.GenerateResponse]:
    """What is new of a sample; before the first one's, what there is to say of the prompt."""
    generation = sample.generation
    told, generation.prompt_logprobs = generation.prompt_logprobs, []
    for start in range(0, len(told), MOST_LOGPROBS):
        ids = generation.spec.prompt if not start else ()
        some = told[start : start + MOST_LOGPROBS]
        yield pb.GenerateResponse(index=sample.index, prompt_logprobs=some, prompt_token_ids=ids)
    response = _response(sample)
    if response is not None:
        yield response


def _response(sample: Sample) -> pb.GenerateResponse | None:
    delta = sample.take()
    if not (delta.token_ids or delta.text or sample.finish_reason):
        return None
    response = pb.GenerateResponse(
        index=sample.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=delta.logprobs,
        finish_reason=sample.finish_reason,  # type: ignore[arg-type]
        score=sample.score,
    )
    if isinstance(sample.stop_reason, str):
        response.stop_reason = sample.stop_reason
    return response


def _messages(chat: pb.Chat) -> list[Message]:
    for i, message in enumerate(chat.messages):
        if message.role not in ROLES:
            problem = f"is {message.role!r}; must be {', '.join(sorted(ROLES))}"
            raise InvalidField(f"chat.messages[{i}].role", problem)
    if not chat.messages:
        raise InvalidField("chat.messages", "is empty; at least one message is needed")
    return [{"role": message.role, "content": message.content} for message in chat.messages]


def _options(chat: pb.Chat) -> dict[str, Any]:
    return {
        "continue_final_message": chat.continue_final_message,
        "add_generation_prompt": not chat.continue_final_message,
    }


async def abort(context: Context, error: GatewayError) -> NoReturn:
    """End a call with the rich status of `error`."""
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
    raise AssertionError("abort returned")
