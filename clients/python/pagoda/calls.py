"""What the two clients share: building a request, following its answer, deciding about retries.

Nothing here does I/O, so that the synchronous and the asyncio client differ only in how they wait.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import grpc

from pagoda.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PagodaError,
    Unavailable,
)
from pagoda.progress import Progress
from pagoda.transport import CHANNEL_OPTIONS, bearer
from pagoda.types import Completion, Messages, Model, Options, Prompt
from pagoda.v1 import inference_pb2 as pb
from pagoda.v1 import scheduler_pb2 as spb

DEFAULT_URL = "127.0.0.1:8001"
BACKOFF_FACTOR = 3.0
MAX_BACKOFF_S = 5.0
MAX_RETRY_AFTER_S = 60.0

_ON_REQUEST = frozenset(
    {
        "model",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "request_id",
        "priority",
        "cache_salt",
        "best_of",
    }
)
_GATEWAYS_OWN = frozenset({"grammar", "await_verdicts"})
_ON_SAMPLING = frozenset(field.name for field in spb.SamplingParams.DESCRIPTOR.fields) - _GATEWAYS_OWN
_EARLY_STOPPING: dict[Any, int] = {
    False: spb.EARLY_STOPPING_HEURISTIC,
    True: spb.EARLY_STOPPING_FIRST,
    "never": spb.EARLY_STOPPING_NEVER,
}
_ELSEWHERE = frozenset({"stop", "continue_final_message", "structured_output", "timeout"})


def target_of(url: str) -> tuple[str, bool]:
    """The gRPC target that `url` means, and whether it wants TLS (`https://` or `grpcs://`)."""
    scheme, found, rest = url.partition("://")
    if not found or scheme == "unix":
        return url, False
    if scheme not in ("http", "https", "grpc", "grpcs"):
        raise InvalidRequest(f"url: {url!r} is not http, https, grpc or grpcs", field="url")
    return rest.rstrip("/"), scheme.endswith("s")


def open_channel(url: str, module: Any = grpc) -> Any:
    """A channel to `url`; `module` is `grpc` or `grpc.aio`."""
    target, tls = target_of(url)
    if tls:
        return module.secure_channel(target, grpc.ssl_channel_credentials(), options=CHANNEL_OPTIONS)
    return module.insecure_channel(target, options=CHANNEL_OPTIONS)


def metadata_for(token: str | None) -> tuple[tuple[str, str], ...]:
    """Call metadata for `token`; without one, for PAGODA_TOKEN."""
    return bearer(os.environ.get("PAGODA_TOKEN", "") if token is None else token)


def build_request(prompt: Prompt | None, messages: Messages | None, options: Options) -> pb.GenerateRequest:
    """The message for a prompt (text or token ids) or a chat, with its options.

    A request id is made where none is given, and a seed: so a retry is the same request, and draws the same.

    Raises:
        TypeError: an option has no such name.
        InvalidRequest: a value does not fit its field.
    """
    unknown = set(options) - _ON_REQUEST - _ON_SAMPLING - _ELSEWHERE
    if unknown:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}")
    request = pb.GenerateRequest()
    if messages is not None:
        fill_chat(request.chat, messages)
        continues = options.get("continue_final_message", False)
        _set(request.chat, "continue_final_message", continues)
    elif isinstance(prompt, str):
        _set(request, "text", prompt)
    else:
        request.token_ids.SetInParent()
        _extend(request.token_ids.ids, prompt or (), "token_ids")
    stop = options.get("stop", ())
    _extend(request.stop, [stop] if isinstance(stop, str) else stop, "stop")
    if (form := options.get("structured_output")) is not None:
        fill_form(request.structured_output, form)
    for name, value in options.items():
        if value is None or name in _ELSEWHERE:
            continue
        if name in _ON_REQUEST:
            _set(request, name, value)
        else:
            _set_sampling(request.sampling, name, value)
    if not request.request_id:
        request.request_id = uuid.uuid4().hex
    if not request.sampling.HasField("seed"):
        request.sampling.seed = secrets.randbits(63)
    return request


def fill_form(form: pb.StructuredOutput, asked: Mapping[str, Any]) -> None:
    """Put what an output must be into `form`. Raises InvalidRequest."""
    names = [field.name for field in form.DESCRIPTOR.oneofs_by_name["form"].fields]
    if len(asked) != 1 or not set(asked) <= set(names):
        problem = f"structured_output: give exactly one of {', '.join(names)}"
        raise InvalidRequest(problem, field="structured_output")
    ((name, value),) = asked.items()
    field = f"structured_output.{name}"
    if name == "choice":
        _extend(form.choice.texts, [value] if isinstance(value, str) else value, field)
        return
    if name == "json_schema" and not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            _refuse(field, error)
    _set(form, name, value, field)


def fill_chat(chat: pb.Chat, messages: Messages) -> None:
    """Put `messages` into `chat`."""
    for i, message in enumerate(messages):
        turn = chat.messages.add()
        _set(turn, "role", message.get("role", ""), f"chat.messages[{i}].role")
        _set(turn, "content", message.get("content", ""), f"chat.messages[{i}].content")


def tokenize_request(text: str | Messages, model: str) -> pb.TokenizeRequest:
    """The message that asks for the token ids of a text or a chat."""
    request = pb.TokenizeRequest(model=model)
    if isinstance(text, str):
        _set(request, "text", text)
    else:
        fill_chat(request.chat, text)
    return request


def is_messages(value: Any) -> bool:
    """Whether a sequence is a chat rather than token ids."""
    return not isinstance(value, str) and bool(value) and isinstance(value[0], Mapping)


def split_item(item: Any, common: Options) -> tuple[Prompt | None, Messages | None, Options]:
    """One item of a batch: a prompt, a chat, or a mapping with `prompt` or `messages` and its own options."""
    if isinstance(item, Mapping):
        own: dict[str, Any] = {**common, **item}
        prompt, messages = own.pop("prompt", None), own.pop("messages", None)
        if (prompt is None) == (messages is None):
            raise InvalidRequest("a batch item has either a prompt or messages", field="prompt")
        return prompt, messages, own  # type: ignore[return-value]  # build_request checks the names
    if is_messages(item):
        return None, item, common
    return item, None, common


def model_of(info: spb.ModelInfo) -> Model:
    """The dataclass for a message."""
    return Model(
        name=info.name,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        eos_token_ids=tuple(info.eos_token_ids),
        digest=info.digest,
        device=info.device,
        dtype=info.dtype,
    )


class Deadline:
    """A point in time by which a call, all its tries included, must be over."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def remaining(self) -> float | None:
        """Seconds left, None when there is no limit.

        Raises:
            DeadlineExceeded: none are left.
        """
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the time allowed for this call is over")
        return left


class Retries:
    """How often and after which wait a failed call is tried again."""

    def __init__(self, max_retries: int, backoff_s: float, deadline: Deadline) -> None:
        self._max_retries, self._backoff_s, self._deadline = max_retries, backoff_s, deadline
        self._failures = 0
        self._before: PagodaError | None = None

    def progressed(self) -> None:
        """The call gained something, so its failures so far no longer count."""
        self._failures = 0

    def delay_after(self, error: PagodaError) -> float:
        """Seconds to wait before the next try.

        Raises:
            PagodaError: `error` itself, when there is no next try.
        """
        self._failures += 1
        # The server may not have noticed yet that the stream of the try before this one broke.
        own_ghost = isinstance(error, AlreadyExists) and self._before is not None
        passing = isinstance(error, Unavailable | Overloaded) or own_ghost
        if self._before is not None and isinstance(error, InvalidRequest) and error.field == "resume":
            raise self._before  # a server that takes up no request again: what interrupted it is the reason
        if not passing or self._failures > self._max_retries:
            raise error
        self._before = error
        delay = min(self._backoff_s * BACKOFF_FACTOR ** (self._failures - 1), MAX_BACKOFF_S)
        delay *= random.uniform(0.8, 1.2)
        asked = getattr(error, "retry_after", None)
        if asked is not None:
            delay = max(asked, 0.0)
        left = self._deadline.remaining()
        if delay > MAX_RETRY_AFTER_S or (left is not None and delay >= left):
            raise error
        return delay


class Tries:
    """One request, submitted as often as it takes. The clients add `follow`, which waits in their way."""

    def __init__(
        self, start: Callable[..., Any], progress: Progress, retries: Retries, deadline: Deadline, closed: Any
    ) -> None:
        self.progress = progress
        self._start, self._retries, self._deadline = start, retries, deadline
        self._closed = closed  # an event, of threading or of asyncio
        self._call: Any = None

    def close(self) -> None:
        """Cancel the request, also while it waits for its next try."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()


class StreamBase:
    """What both kinds of stream tell of their request."""

    _tries: Tries

    @property
    def request_id(self) -> str:
        """The id under which the request runs."""
        return self._tries.progress.request_id

    @property
    def completion(self) -> Completion:
        """What has come so far, as a whole."""
        return self._tries.progress.completion()


class ClientBase:
    """What both clients keep. `timeout` and `backoff_s` are in seconds."""

    def __init__(self, token: str | None, timeout: float | None, max_retries: int, backoff_s: float) -> None:
        self._metadata = metadata_for(token)
        self._timeout, self._max_retries, self._backoff_s = timeout, max_retries, backoff_s

    def _retries(self, deadline: Deadline) -> Retries:
        return Retries(self._max_retries, self._backoff_s, deadline)

    def _prepare(
        self, prompt: Prompt | None, messages: Messages | None, options: Options
    ) -> tuple[Progress, Retries, Deadline]:
        deadline = Deadline(options.get("timeout", self._timeout))
        progress = Progress(build_request(prompt, messages, options))
        return progress, self._retries(deadline), deadline


def _set_sampling(sampling: spb.SamplingParams, name: str, value: Any) -> None:
    if name == "logit_bias":
        try:
            for token, bias in dict(value).items():
                sampling.logit_bias[int(token)] = bias
        except (TypeError, ValueError) as error:
            _refuse("sampling.logit_bias", error)
    elif name == "stop_token_ids":
        _extend(sampling.stop_token_ids, value, "sampling.stop_token_ids")
    elif name == "early_stopping":
        if not isinstance(value, bool | str) or value not in _EARLY_STOPPING:
            problem = f"sampling.early_stopping: {value!r} is not True, False or 'never'"
            raise InvalidRequest(problem, field="sampling.early_stopping")
        _set(sampling, name, _EARLY_STOPPING[value], f"sampling.{name}")
    else:
        _set(sampling, name, value, f"sampling.{name}")


def _set(message: Any, name: str, value: Any, field: str | None = None) -> None:
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as error:
        _refuse(field or name, error)


def _extend(repeated: Any, values: Sequence[Any], field: str) -> None:
    try:
        repeated.extend(values)
    except (TypeError, ValueError) as error:
        _refuse(field, error)


def _refuse(field: str, error: Exception) -> NoReturn:
    raise InvalidRequest(f"{field}: {error}", field=field) from error
