"""Answers as they come: alone, where every item can be shown at once, and side by side.

python examples/swift_stream.py [MODEL_TYPE]
"""

import sys

from pagoda.swift import (
    ModelType,
    get_default_template_type,
    get_template,
    get_vllm_engine,
    inference_stream_vllm,
)

model_type = sys.argv[1] if len(sys.argv) > 1 else ModelType.smollm2_135m_instruct
engine = get_vllm_engine(model_type)
template = get_template(get_default_template_type(model_type), engine.hf_tokenizer)
engine.generation_config.max_new_tokens = 64
engine.generation_config.temperature = 0

# A response is the text so far, so what is new is what lies behind the part that was printed.
generation_info: dict = {}
printed = 0
print("response: ", end="")
for responses in inference_stream_vllm(
    engine, template, [{"query": "Tell me about Paris."}], generation_info=generation_info
):
    text = responses[0]["response"]
    print(text[printed:], end="", flush=True)
    printed = len(text)
print(f"\nhistory: {responses[0]['history']}")
print(generation_info)

# In a batch an entry is None until its first token has come.
requests = [{"query": "Count to five."}, {"query": "What is the capital of France?"}]
for responses in inference_stream_vllm(engine, template, requests):
    lengths = [0 if response is None else len(response["response"]) for response in responses]
    print(f"\rcharacters so far: {lengths}", end="", flush=True)
print()
for request, response in zip(requests, responses, strict=True):
    print(f"query: {request['query']}\nresponse: {response['response']}")
