"""What people do with LiteLLM, against the gateway; the answers as JSON. Runs in .venv-doors/sdks.

LITELLM_LOCAL_MODEL_COST_MAP=True python litellm_calls.py http://127.0.0.1:8000 MODEL
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import litellm

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
PROMPT = "The capital of France is"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY}}]


async def several(chat: dict[str, Any]) -> list[str]:
    """Three answers at once."""
    answers = await asyncio.gather(*(litellm.acompletion(messages=MESSAGES, **chat) for _ in range(3)))
    return [answer.choices[0].message.content for answer in answers]


def refused(**options: Any) -> dict[str, Any]:
    """What LiteLLM makes of our error."""
    try:
        litellm.completion(messages=MESSAGES, **options)
    except (litellm.BadRequestError, litellm.NotFoundError) as error:
        return {"type": type(error).__name__, "status": error.status_code, "text": str(error)}
    raise AssertionError(f"{options} was not refused")


def tool_calls(**options: Any) -> list[tuple[str, str]]:
    """Names and arguments of the calls that an answer must be."""
    answer = litellm.completion(messages=MESSAGES, tools=TOOLS, tool_choice="required", **options)
    return [(call.function.name, call.function.arguments) for call in answer.choices[0].message.tool_calls]


def main(url: str, model: str) -> dict[str, Any]:
    """One request after another; what each gave."""
    litellm.suppress_debug_info = True
    server: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": "none", "temperature": 0, "max_retries": 0}
    chat = {"model": f"openai/{model}", "max_tokens": 32, **server}
    vllm = {"model": f"hosted_vllm/{model}", "max_tokens": 32, **server}
    text = {"model": f"text-completion-openai/{model}", "max_tokens": 4, "prompt": PROMPT, **server}
    said = litellm.completion(messages=MESSAGES, **chat)
    counted = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(messages=MESSAGES, **counted, **chat))
    completion = litellm.text_completion(**text)
    pieces = litellm.text_completion(stream=True, **text)
    return {
        "completion": said.choices[0].message.content,
        "finish": said.choices[0].finish_reason,
        "usage": said.usage.model_dump(),
        "stream": [chunk.choices[0].delta.content or "" for chunk in chunks],
        "stream_usage": chunks[-1].usage.model_dump(),
        "acompletion": asyncio.run(several(chat)),
        "as_vllm": litellm.completion(messages=MESSAGES, top_k=1, **vllm).choices[0].message.content,
        "calls": tool_calls(**{**chat, "max_tokens": 200}),
        "calls_as_vllm": tool_calls(**{**vllm, "max_tokens": 200}),
        "text": completion.choices[0].text,
        "text_usage": completion.usage.model_dump(),
        "text_stream": [piece.choices[0].text or "" for piece in pieces],
        "bad_value": refused(**{**chat, "temperature": -1}),
        "bad_model": refused(**{**chat, "model": "openai/gpt-9"}),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
