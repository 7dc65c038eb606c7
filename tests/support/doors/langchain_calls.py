"""What people do with LangChain, against the gateway; the answers as JSON. Runs in .venv-doors/sdks.

python langchain_calls.py http://127.0.0.1:8000 MODEL
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

QUESTION = "What is the capital of France?"
PROMPT = "The capital of France is"


class Place(BaseModel):
    """A city and its country."""

    city: str
    country: str


@tool
def get_weather(city: str) -> str:
    """Get the current weather of a city."""
    return f"It is 31 degrees in {city}."


def with_tools(chat: ChatOpenAI) -> dict[str, Any]:
    """A call, the same in pieces, what the model says of its result, and an answer of a certain class."""
    asked = HumanMessage("What is the weather in Paris?")
    caller = chat.bind_tools([get_weather], tool_choice="get_weather")
    call = caller.invoke([asked])
    chunks = list(caller.stream([asked]))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    results = [ToolMessage(get_weather.invoke(c["args"]), tool_call_id=c["id"]) for c in call.tool_calls]
    told = chat.bind_tools([get_weather], tool_choice="none").invoke([asked, call, *results])
    place = chat.with_structured_output(Place, method="function_calling").invoke("Where is the Eiffel Tower?")
    return {
        "call": [(c["name"], c["args"]) for c in call.tool_calls],
        "call_finish": call.response_metadata["finish_reason"],
        "call_stream": [(c["name"], c["args"]) for c in whole.tool_calls],
        "told": told.text,
        "place": place.model_dump(),
    }


async def several(chat: ChatOpenAI) -> tuple[list[str], list[str]]:
    """Three answers at once, and the pieces of a fourth."""
    answers = await chat.abatch([QUESTION] * 3)
    return [a.text for a in answers], [chunk.text async for chunk in chat.astream(QUESTION)]


def main(url: str, model: str) -> dict[str, Any]:
    """One request after another; what each gave."""
    server: dict[str, Any] = {"model": model, "base_url": f"{url}/v1", "api_key": "none", "temperature": 0}
    chat = ChatOpenAI(max_tokens=32, stream_usage=True, max_retries=0, **server)
    text = OpenAI(max_tokens=4, max_retries=0, **server)
    said = chat.invoke(QUESTION)
    chunks = list(chat.stream(QUESTION))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    chain = ChatPromptTemplate.from_messages([("human", "What is the capital of {land}?")]) | chat
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    batch, pieces = asyncio.run(several(chat))
    generated = text.generate([PROMPT, PROMPT])
    return {
        "invoke": said.text,
        "finish": said.response_metadata["finish_reason"],
        "usage": said.usage_metadata,
        "stream": [chunk.text for chunk in chunks],
        "stream_usage": whole.usage_metadata,
        "chain": (chain | StrOutputParser()).invoke({"land": "France"}),
        "logprobs": scored.response_metadata["logprobs"]["content"],
        "abatch": batch,
        "astream": pieces,
        "tools": with_tools(ChatOpenAI(max_tokens=100, max_retries=0, **server)),
        "completion": text.invoke(PROMPT),
        "completion_stream": list(text.stream(PROMPT)),
        "completion_batch": [generation[0].text for generation in generated.generations],
        "completion_usage": generated.llm_output["token_usage"],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
