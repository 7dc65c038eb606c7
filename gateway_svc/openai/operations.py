"""What tools and operators ask for: models, tokens, health, version, metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from gateway_svc.errors import InvalidField, Unavailable
from gateway_svc.gateway import Gateway, server_version
from gateway_svc.openai import replies
from gateway_svc.openai.params import messages_of, template_options
from gateway_svc.openai.requests import StrictJsonRoute, gateway_of
from gateway_svc.openai.responses import JsonReply, error_response
from gateway_svc.openai.schema import DetokenizeRequest, TokenizeRequest
from gateway_svc.openai.tools import told, tools_of

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
router = APIRouter(route_class=StrictJsonRoute)


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The models that are served: one."""
    return JsonReply(replies.ModelList([_model(gateway_of(request))]))


@router.get("/v1/models/{model:path}")
async def get_model(model: str, request: Request) -> Response:
    """One model."""
    gateway = gateway_of(request)
    gateway.check_model(model)
    return JsonReply(_model(gateway))


def _model(gateway: Gateway) -> replies.Model:
    info = gateway.link.model
    return replies.Model(
        id=gateway.model_name,
        created=gateway.created,
        root=gateway.settings.model,
        max_model_len=None if info is None else info.max_model_len,
    )


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """A text or a chat as tokens."""
    gateway = gateway_of(request)
    gateway.check_model(body.model)
    max_model_len = gateway.model_info().max_model_len
    if (body.prompt is None) == (body.messages is None):
        raise InvalidField("prompt", "give either prompt or messages")
    if body.messages is not None:
        options = template_options(body, gateway.settings.trust_request_chat_template)
        tools = tools_of(body.tools or [])
        _, messages, shown = told(gateway, messages_of(body.messages), tools, body.chat_template)
        ids = await gateway.tokenizer.encode_chat(messages, tools=shown, **options)
    else:
        special = True if body.add_special_tokens is None else body.add_special_tokens
        ids = await gateway.tokenizer.encode(body.prompt or "", special)
    spelling = gateway.tokenizer.spelling(ids) if body.return_token_strs else None
    return JsonReply(replies.Tokenized(len(ids), max_model_len, ids, spelling))


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens, special ones included."""
    gateway = gateway_of(request)
    gateway.check_model(body.model)
    vocab_size = gateway.model_info().vocab_size
    largest = max(body.tokens, default=0)
    if largest >= vocab_size:
        raise InvalidField("tokens", f"holds {largest}; token ids are below {vocab_size}")
    return JsonReply(replies.Detokenized(await gateway.tokenizer.decode(body.tokens)))


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """What clients need to know of the tokenizer when /tokenize and /detokenize do the work for them.

    Nothing in it is hidden otherwise: a chat that is tokenized and then detokenized shows the template too.
    """
    gateway = gateway_of(request)
    tokenizer = gateway.tokenizer
    special = {role: tokenizer.special_token(role) for role in replies.SPECIAL_TOKENS}
    return JsonReply(
        replies.TokenizerInfo(
            tokenizer_class="PreTrainedTokenizerFast",
            model_max_length=gateway.model_info().max_model_len,
            vocab_size=tokenizer.vocab_size,
            chat_template=tokenizer.chat_template,
            **special,
        )
    )


@router.get("/health")
@router.get("/ping")
async def health() -> Response:
    """This process is alive."""
    return JsonReply(replies.Health())


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 once the first token can be served."""
    gateway = gateway_of(request)
    if gateway.ready:
        return JsonReply(replies.Ready(gateway.link.num_workers))
    try:
        gateway.model_info()
        error = Unavailable("no worker is attached", "no_worker")
    except Unavailable as reason:
        error = reason
    return error_response(error)


@router.get("/version")
async def version() -> Response:
    """The version of this server."""
    return JsonReply(replies.Version(server_version()))


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """What Prometheus scrapes."""
    return PlainTextResponse(gateway_of(request).metrics.expose(), media_type=METRICS_TYPE)
