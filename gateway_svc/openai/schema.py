"""What clients send over HTTP, and the checks that need no model. Unknown fields are ignored.

Types are strict ("5" is not 5): a wrong type or range is a 400 that names the field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gateway_svc.gateway import MAX_REQUEST_ID_BYTES, MAX_SAMPLES, MAX_SAMPLES_A_REQUEST

UINT32_MAX = 2**32 - 1
INT32_MAX = 2**31 - 1
MAX_PROMPTS = MAX_SAMPLES
MAX_LOGPROBS = 20
MAX_BEAM_WIDTH = 16

TokenId = Annotated[int, Field(ge=0, le=UINT32_MAX)]


class Body(BaseModel):
    """Every request body."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    """How a stream looks."""

    include_usage: bool | None = Field(None, description="A last chunk with the usage and no choices.")


class JsonSchema(Body):
    """A schema with the name that OpenAI's API wants for it."""

    name: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = Field(None, description="The output follows the schema in any case.")


class ResponseFormat(Body):
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """What an output must be, in vLLM's words: exactly one of the first five."""

    json_: dict[str, Any] | bool | str | None = Field(None, alias="json", description="A JSON schema.")
    regex: str | None = Field(None, description="Matches the whole output.")
    choice: list[str] | None = None
    grammar: str | None = Field(None, description="In Lark's form as llguidance reads it, or GBNF.")
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = Field(None, description="Between parts of JSON.")


class SamplingBody(Body):
    """What chat and text completions have in common."""

    model: str | None = Field(None, description="Absent is the model that is served.")
    n: int = Field(1, ge=1, le=MAX_SAMPLES_A_REQUEST, description="Samples of each prompt.")
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_SAMPLES_A_REQUEST,
        description="Draw so many samples and answer with the n of the best mean logprob; not with stream.",
    )
    use_beam_search: bool | None = Field(
        None, description="Search instead of drawing: best_of beams, or n; the n best results, best first."
    )
    beam_width: int | None = Field(
        None, ge=1, le=MAX_BEAM_WIDTH, description="Beams of a search, which it asks for by itself."
    )
    length_penalty: float | None = Field(
        None, description="A beam's score is its logprob over its length to this power; default 1."
    )
    early_stopping: bool | Literal["never"] | None = Field(
        None,
        description="When a search that has enough results ends: when its best beam would not better the "
        "worst of them now (false, the default), at once (true), or when no beam ever can (never).",
    )
    temperature: float | None = Field(None, ge=0, description="0 is greedy; default 1.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=INT32_MAX, description="0 and -1 keep all.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    logit_bias: dict[str, float] | None = Field(None, description="Token ids, as strings, to what is added.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    max_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    min_tokens: int | None = Field(None, ge=0, le=INT32_MAX)
    stop: str | list[str] | None = Field(None, description="Strings that end a sample.")
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    priority: int = Field(0, ge=-(2**31), le=INT32_MAX, description="Lower runs first.")
    request_id: str | None = Field(None, max_length=MAX_REQUEST_ID_BYTES - 8, pattern=r"^[!-~]+$")
    cache_salt: str | None = Field(None, max_length=1024)
    return_token_ids: bool | None = None
    prompt_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Logprobs of the prompt's tokens, and so many alternatives."
    )
    add_special_tokens: bool | None = Field(None, description="Default: for text, not for chats.")
    user: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


class ContentPart(Body):
    """A part of a message; text is what this version takes."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """What was called. Arguments are JSON, or an object."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(Body):
    """A call that the model wanted to be made."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """One turn. What else it holds (name, ...) is passed to the template."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    tool_calls: list[ToolCall] | None = Field(None, description="Calls that the assistant made.")
    tool_call_id: str | None = Field(None, description="The call that this is the result of.")


class FunctionDefinition(Body):
    """A function that the model may call."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of the arguments' object.")
    strict: bool | None = Field(None, description="Arguments follow the schema exactly.")


class ToolDefinition(Body):
    """A tool that the model may use: functions are what there is."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Body):
    """One of the functions of `tools`."""

    name: str


class NamedToolChoice(Body):
    """This function is to be called."""

    type: Literal["function"]
    function: FunctionName


class ChatFields(Body):
    """What a chat becomes a prompt with."""

    messages: list[ChatMessage] = Field(min_length=1)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(ChatFields, SamplingBody):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(None, ge=1, le=INT32_MAX, description="Default: all that fit.")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[ToolDefinition] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = Field(
        None, description="Default: auto."
    )
    parallel_tool_calls: bool | None = Field(None, description="Several calls at a time; default true.")


class CompletionRequest(SamplingBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int | None = Field(None, ge=0, le=INT32_MAX, description="0 is for echo alone; default 16.")
    echo: bool | None = Field(False, description="The prompt first: its text and, if asked for, logprobs.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    # Later versions may support it. It is declared so that asking for it is an error, not a surprise.
    suffix: str | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: list[ToolDefinition] | None = None
    add_special_tokens: bool | None = Field(None, description="Default: for text, not for chats.")
    return_token_strs: bool | None = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]
