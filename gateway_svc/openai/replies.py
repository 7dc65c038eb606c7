"""What goes out over HTTP, as structs: msgspec encodes a chunk in half a microsecond."""

from __future__ import annotations

import msgspec

from pagoda.v1 import scheduler_pb2 as pb

encode = msgspec.json.Encoder().encode


class PromptTokensDetails(msgspec.Struct):
    """How many tokens of the prompt were in the prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens of a call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, usage: pb.Usage) -> Usage:
        """From the wire's columns."""
        total = usage.prompt_tokens + usage.completion_tokens
        details = PromptTokensDetails(usage.cached_tokens)
        return cls(usage.prompt_tokens, usage.completion_tokens, total, details)


class TopLogprob(msgspec.Struct):
    """One alternative for a token."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct):
    """One token of a chat's answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """One entry for each token that counts, the one that ended the sample included."""

    content: list[ChatLogprob]


class CompletionLogprobs(msgspec.Struct):
    """Parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(msgspec.Struct):
    """One of the tokens that may stand at a place of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


# One entry for each token of the prompt, null for the first: the token there and the best ones, by id.
PromptLogprobs = list[dict[str, PromptLogprob] | None]


class FunctionCall(msgspec.Struct):
    """Which function is to be called. `arguments` is JSON, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """A call that the model wants to be made."""

    id: str
    function: FunctionCall
    type: str = "function"


class Message(msgspec.Struct):
    """A chat's answer. It may be calls alone."""

    content: str | None
    role: str = "assistant"
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    """One sample of a chat."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None
    score: float | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct):
    """The answer to POST /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class FunctionDelta(msgspec.Struct, omit_defaults=True):
    """What is new of a function's call; the name comes first and once."""

    arguments: str
    name: str | None = None


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    """What is new of a call; its id and type come first and once."""

    index: int
    function: FunctionDelta
    id: str | None = None
    type: str | None = None


class ChoiceDelta(msgspec.Struct, omit_defaults=True):
    """What is new of a chat's answer."""

    role: str | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(msgspec.Struct):
    """One sample's part of a chunk of a chat."""

    index: int
    delta: ChoiceDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | msgspec.UnsetType | None = msgspec.UNSET
    score: float | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(msgspec.Struct):
    """One event of a chat's stream."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    object: str = "chat.completion.chunk"
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class CompletionChoice(msgspec.Struct):
    """One sample of a completion, whole or in part."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | msgspec.UnsetType | None = msgspec.UNSET
    score: float | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct):
    """The answer to POST /v1/completions, or one event of its stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: str = "text_completion"
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class ErrorDetail(msgspec.Struct):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(msgspec.Struct):
    """Every answer that is not a success."""

    error: ErrorDetail


class Model(msgspec.Struct):
    """One entry of GET /v1/models."""

    id: str
    created: int
    root: str
    max_model_len: int | None
    object: str = "model"
    owned_by: str = "pagoda"
    parent: str | None = None


class ModelList(msgspec.Struct):
    """The answer to GET /v1/models."""

    data: list[Model]
    object: str = "list"


class Tokenized(msgspec.Struct):
    """The answer to POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct):
    """The answer to POST /detokenize."""

    prompt: str


SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class TokenizerInfo(msgspec.Struct):
    """The answer to GET /tokenizer_info."""

    tokenizer_class: str
    model_max_length: int
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class Health(msgspec.Struct):
    """The answer to GET /health."""

    status: str = "ok"


class Ready(msgspec.Struct):
    """The answer to GET /ready."""

    num_workers: int
    status: str = "ready"


class Version(msgspec.Struct):
    """The answer to GET /version."""

    version: str
