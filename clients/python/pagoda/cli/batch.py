"""`pagoda batch`: a file of requests, one JSON object a line.

A line is OpenAI's batch form (`{"custom_id", "method", "url", "body"}`) or plain (`{"prompt": ...}` or
`{"messages": [...]}` with options beside it). Results are appended as they come, so that a run that was
stopped goes on where it was, and put in input order at the end.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pagoda.aio import AsyncClient
from pagoda.calls import split_item
from pagoda.errors import InvalidRequest, PagodaError, Unauthenticated, Unavailable
from pagoda.types import Completion, Options

MAX_RETRIES = 6
# Not the fault of a line: the run stops and can go on later.
STOPPING = (Unavailable, Unauthenticated)
_KNOWN = frozenset(Options.__annotations__) - {"timeout", "request_id"}


@dataclass(frozen=True)
class Line:
    """One line of the input. `digest` says whether a result belongs to it."""

    number: int
    digest: str
    text: bytes


@dataclass(frozen=True)
class Request:
    """What a line asks for."""

    custom_id: str | None
    item: dict[str, Any]


def run(
    file: Path,
    output: Path | None,
    concurrency: int,
    url: str,
    token: str | None,
    model: str | None,
    sampling: dict[str, Any],
) -> int:
    """Run what is not done yet; the exit status, 1 when lines have errors. Raises PagodaError, OSError."""
    output = output or file.with_suffix(".out.jsonl")
    if output.resolve() == file.resolve():
        raise InvalidRequest(f"{output} is the input; name another --output")
    done = _done_before(output, {line.number: line.digest for line in read_lines(file)})
    lines = [line for line in read_lines(file) if line.number not in done]
    total = len(lines) + len(done)
    console = Console(stderr=True)
    if done:
        console.print(f"{len(done)} of {total} lines are done already, in {output}")
    forced = {**sampling, **({"model": model} if model is not None else {})}
    client = AsyncClient(url, token, max_retries=MAX_RETRIES)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with open(output, "ab") as results, Progress(*columns, console=console) as progress:
            task = progress.add_task("requests", total=total, completed=len(done))

            def keep(record: dict[str, Any]) -> None:
                results.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                results.flush()
                progress.advance(task)

            asyncio.run(_run(client, lines, concurrency, forced, keep))
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on from {output}")
        raise
    failed = _put_in_order(output)
    console.print(f"{total - len(failed)} of {total} answered, in {output}")
    if failed:
        shown = ", ".join(map(str, failed[:10])) + (", ..." if len(failed) > 10 else "")
        console.print(f"{len(failed)} with errors: lines {shown}")
    return 1 if failed else 0


def read_lines(file: Path) -> Iterator[Line]:
    """The lines of a file that are not blank, numbered from 1."""
    with open(file, "rb") as lines:
        for number, text in enumerate(lines, 1):
            if text.strip():
                yield Line(number, hashlib.blake2b(text.strip(), digest_size=8).hexdigest(), text)


def parse(line: Line, forced: dict[str, Any]) -> Request:
    """What a line asks for, with `forced` options above its own. Raises InvalidRequest."""
    try:
        value = json.loads(line.text)
    except ValueError as error:
        raise InvalidRequest(f"not a line of JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest("not a JSON object")
    custom_id = value.pop("custom_id", None)
    if "body" in value:
        body = value["body"]
        if not isinstance(body, dict):
            raise InvalidRequest("body: not a JSON object", field="body")
        item = _from_openai(body)
    else:
        item = value
    for name in item:
        if name not in _KNOWN | {"prompt", "messages"}:
            raise InvalidRequest(f"{name}: there is no such option", field=name)
    if isinstance(item.get("messages"), list):
        item["messages"] = [_flat(message) for message in item["messages"]]
    if isinstance(item.get("logit_bias"), dict):
        item["logit_bias"] = {_token_id(key): bias for key, bias in item["logit_bias"].items()}
    return Request(None if custom_id is None else str(custom_id), {**item, **forced})


def _from_openai(body: dict[str, Any]) -> dict[str, Any]:
    """The options of an OpenAI body under our names; unknown ones are ignored, which is that API's habit."""
    item = {
        name: value
        for name, value in body.items()
        if name in _KNOWN | {"prompt", "messages"} and value is not None
    }
    if body.get("max_completion_tokens") is not None:
        item["max_tokens"] = body["max_completion_tokens"]
    if isinstance(body.get("logprobs"), bool):  # a chat's; a completion's is a number as ours is
        item.pop("logprobs", None)
        if body["logprobs"]:
            item["logprobs"] = body.get("top_logprobs") or 0
    _read_beams(item, body)
    form = _form_of(body.get("response_format"), body.get("structured_outputs"))
    return item if form is None else {**item, "structured_output": form}


def _read_beams(item: dict[str, Any], body: dict[str, Any]) -> None:
    """OpenAI's API has no beam search; in vLLM's words, best_of is how many beams there are."""
    if body.get("use_beam_search") or item.get("beam_width"):
        item["beam_width"] = item.get("beam_width") or item.get("best_of") or item.get("n", 1)
        item.pop("best_of", None)
        return
    for name, neutral in (("length_penalty", 1), ("early_stopping", False)):  # as vLLM's clients send them
        if item.get(name) == neutral:
            del item[name]


def _form_of(response_format: Any, structured_outputs: Any) -> dict[str, Any] | None:
    """What an output must be, in our words."""
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        asked = response_format.get("json_schema")
        return {"json_schema": asked.get("schema") if isinstance(asked, dict) else None}
    if isinstance(structured_outputs, dict):
        return {"json_schema" if name == "json" else name: form for name, form in structured_outputs.items()}
    return None


def _flat(message: Any) -> Any:
    """A message whose content is one string, where it came in parts."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = message["content"]
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        raise InvalidRequest("messages: only parts of type text are read", field="messages")
    return {**message, "content": "".join(str(part.get("text", "")) for part in parts)}


def _token_id(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InvalidRequest(f"logit_bias: {text!r} is not a token id", field="logit_bias") from error


async def _run(
    client: AsyncClient,
    lines: list[Line],
    concurrency: int,
    forced: dict[str, Any],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    todo = iter(lines)

    async def work() -> None:
        for line in todo:
            keep(await _answer(client, line, forced, served))

    async with client:
        # Asked for also because an address where nobody is should not become an error of every line.
        served = (await client.models())[0].name if lines else ""
        tasks = [asyncio.create_task(work()) for _ in range(min(concurrency, len(lines)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(client: AsyncClient, line: Line, forced: dict[str, Any], served: str) -> dict[str, Any]:
    """The result of one line: a response or an error."""
    record: dict[str, Any] = {"line": line.number, "digest": line.digest, "custom_id": None}
    try:
        request = parse(line, forced)
        record["custom_id"] = request.custom_id
        prompt, messages, options = split_item(request.item, {})
        if messages is None:
            completion = await client.generate(_prompt(prompt), **options)
        else:
            completion = await client.chat(_messages(messages), **options)
        body = _body(completion, request.item.get("model") or served, messages is not None)
        response = {"status_code": 200, "request_id": completion.request_id, "body": body}
        return {**record, "response": response, "error": None}
    except STOPPING:
        raise
    except PagodaError as error:
        described = {"code": error.code, "message": error.message, "field": getattr(error, "field", "")}
        return {**record, "response": None, "error": described}


def _prompt(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise InvalidRequest("prompt: neither text nor token ids", field="prompt")
    return value


def _messages(value: Any) -> Any:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise InvalidRequest("messages: not a list of objects", field="messages")
    return value


def _body(completion: Completion, model: str, is_chat: bool) -> dict[str, Any]:
    choices = []
    for sample in completion.samples:
        said = (
            {"message": {"role": "assistant", "content": sample.text}} if is_chat else {"text": sample.text}
        )
        choice: dict[str, Any] = {"index": sample.index, **said, "finish_reason": sample.finish_reason}
        if sample.score is not None:
            choice["score"] = sample.score
        if sample.logprobs:
            choice["token_logprobs"] = [
                {"token_id": lp.token_id, "logprob": lp.logprob, "top": lp.top} for lp in sample.logprobs
            ]
        choices.append(choice)
    body: dict[str, Any] = {"object": "chat.completion" if is_chat else "text_completion", "model": model}
    body["choices"] = choices
    if completion.usage is not None:
        body["usage"] = {
            "prompt_tokens": completion.usage.prompt_tokens,
            "completion_tokens": completion.usage.completion_tokens,
            "total_tokens": completion.usage.prompt_tokens + completion.usage.completion_tokens,
        }
    return body


def _done_before(output: Path, digests: dict[int, str]) -> set[int]:
    """The lines that earlier runs have answered or found wrong; results that no longer belong are dropped."""
    if not output.exists():
        return set()
    kept: dict[int, bytes] = {}
    with open(output, "rb") as results:
        for text in results:
            record = _record(text)
            if record is None or digests.get(record["line"]) != record["digest"]:
                continue
            error = record["error"]
            if error is None or error["code"] == InvalidRequest.code:
                kept[record["line"]] = text
            else:
                kept.pop(record["line"], None)
    _write(output, [kept[number] for number in kept])
    return set(kept)


def _record(text: bytes) -> dict[str, Any] | None:
    """A result, None for one that was cut off when a run was killed."""
    if not text.endswith(b"\n"):
        return None
    try:
        record = json.loads(text)
        return record if {"line", "digest", "error"} <= set(record) else None
    except ValueError:
        return None


def _put_in_order(output: Path) -> list[int]:
    """Sort the results by line; the numbers of those with an error."""
    with open(output, "rb") as results:
        records = sorted(((json.loads(text), text) for text in results), key=lambda pair: pair[0]["line"])
    _write(output, [text for _, text in records])
    return [record["line"] for record, _ in records if record["error"] is not None]


def _write(output: Path, texts: list[bytes]) -> None:
    """Replace the file at once, so that it is never half there."""
    beside = output.with_name(output.name + ".tmp")
    with open(beside, "wb") as file:
        file.writelines(texts)
    os.replace(beside, output)
